"""Following records of one kind in the online store: everything once, then what changes."""

from collections.abc import Iterator, Sequence

from serving.store.protocol import OnlineStore

_CHUNK = 500


class Feed:
    """A follower of one kind of a bundle's records.

    The place up to which it has read names a write that the store must still know. A store that was emptied, filled
    again, restored from an older file, or that has forgotten so old a write does not know it: all is read again.

    Args:
        store: Where the records are.
        bundle: Id of the bundle.
        kind: One of `FOLLOWED`.
    """

    def __init__(self, store: OnlineStore, bundle: str, kind: str) -> None:
        self._store = store
        self._bundle = bundle
        self._kind = kind
        self._cursor = ""

    def read(self) -> Iterator[list[tuple[str, bytes]]]:
        """Yields ids and payloads of what changed since the last call, some at a time.

        A record may come more than once. When the caller stops before the end, the next call begins at the same place.

        Raises:
            StoreError: The store does not answer.
        """
        while True:
            found = self._store.changes(self._bundle, self._kind, self._cursor)
            yield from self._everything() if found.lost else self._records(found.ids)
            self._cursor = found.cursor
            if found.lost or not found.ids:
                return

    def _everything(self) -> Iterator[list[tuple[str, bytes]]]:
        return self._store.scan_records(self._bundle, self._kind)

    def _records(self, ids: Sequence[str]) -> Iterator[list[tuple[str, bytes]]]:
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            read = self._store.read_records(self._bundle, self._kind, chunk)
            yield [(name, data) for name, data in zip(chunk, read, strict=True) if data is not None]
