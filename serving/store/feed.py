"""Follows the records of one kind in the online store: first all records, then each change."""

from collections.abc import Iterator, Sequence

from serving.store.protocol import OnlineStore

_CHUNK = 500


class Feed:
    """Follower of one kind of a bundle's records.

    The follower keeps a cursor, which names the last write that it has read. If the store does not know this write, all
    records are read again. A store does not know the write if it was emptied, filled again or restored from an older
    file, or if the write is too old.

    Args:
        store: Store with the records.
        bundle: Id of the bundle.
        kind: Kind of the records, one of `FOLLOWED`.
    """

    def __init__(self, store: OnlineStore, bundle: str, kind: str) -> None:
        self._store = store
        self._bundle = bundle
        self._kind = kind
        self._cursor = ""

    def read(self) -> Iterator[list[tuple[str, bytes]]]:
        """Yields ids and payloads of the records that changed since the last call, in lists.

        A record may occur several times. If the caller stops before the end, the next call starts again at the cursor.

        Raises:
            StoreError: The store does not answer.
        """
        while True:
            changes = self._store.changes(self._bundle, self._kind, self._cursor)
            yield from self._all() if changes.lost else self._records(changes.ids)
            self._cursor = changes.cursor
            if changes.lost or not changes.ids:
                return

    def _all(self) -> Iterator[list[tuple[str, bytes]]]:
        return self._store.scan_records(self._bundle, self._kind)

    def _records(self, ids: Sequence[str]) -> Iterator[list[tuple[str, bytes]]]:
        for start in range(0, len(ids), _CHUNK):
            chunk = ids[start : start + _CHUNK]
            payloads = self._store.read_records(self._bundle, self._kind, chunk)
            yield [(name, data) for name, data in zip(chunk, payloads, strict=True) if data is not None]
