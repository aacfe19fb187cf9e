"""Admitted values in a store: records of micro-batches, merged into few large ones, so that a start reads few."""

from collections.abc import Sequence

import numpy as np

from models.bundle import record
from serving.store.protocol import OnlineStore

_SMALL = 256


class Admitted:
    """Keeps the records of admitted values of one bundle few.

    A record's id is the number of the micro-batch that wrote it, or a hash of its values where it was merged. Several
    writers may merge at a time: a record is removed after one that has all its values is there.

    Args:
        store: Where the records are.
        bundle: Id of the bundle.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self._store = store
        self._bundle = bundle
        self._small: set[str] | None = None

    def wrote(self, ids: Sequence[str]) -> None:
        """Notes new records, and merges the small ones where they have become many.

        Raises:
            StoreError: The store does not answer; records that are left are merged later.
        """
        if not ids:
            return
        if self._small is None:
            held = self._store.scan_records(self._bundle, record.ADMITTED)
            self._small = {name for chunk in held for name, data in chunk if not record.is_full_admitted(data)}
        self._small.update(ids)
        if len(self._small) >= _SMALL:
            self._small = self._merged(sorted(self._small))

    def _merged(self, small: list[str]) -> set[str]:
        read = self._store.read_records(self._bundle, record.ADMITTED, small)
        keys = [record.decode_admitted(data) for data in read if data is not None]
        made = dict(record.admitted_records(np.unique(np.concatenate(keys)))) if keys else {}
        self._store.write_records(self._bundle, record.ADMITTED, list(made), [0] * len(made), list(made.values()))
        self._store.remove_records(self._bundle, record.ADMITTED, [name for name in small if name not in made])
        return {name for name, data in made.items() if not record.is_full_admitted(data)}
