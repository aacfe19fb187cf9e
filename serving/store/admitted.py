"""Admitted values in a store. Small records are merged, so that a starting server reads few records."""

from collections.abc import Sequence

import numpy as np

from models.bundle import record
from serving.store.protocol import OnlineStore

_SMALL = 256


class Admitted:
    """Merges small records of admitted values of one bundle.

    The id of a record is the number of the micro-batch that wrote it, and the id of a merged record is a hash of its
    values. Several writers may merge at the same time, since a record is removed only after a record with all its
    values is written.

    Args:
        store: Store with the records.
        bundle: Id of the bundle.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self._store = store
        self._bundle = bundle
        self._small: set[str] | None = None

    def wrote(self, ids: Sequence[str]) -> None:
        """Registers new records. Merges all small records if there are too many.

        Args:
            ids: Ids of the new records.

        Raises:
            StoreError: The store does not answer. The remaining records are merged later.
        """
        if not ids:
            return
        if self._small is None:
            stored = self._store.scan_records(self._bundle, record.ADMITTED)
            self._small = {name for chunk in stored for name, data in chunk if not record.is_full_admitted(data)}
        self._small.update(ids)
        if len(self._small) >= _SMALL:
            self._small = self._merged(sorted(self._small))

    def _merged(self, small: list[str]) -> set[str]:
        payloads = self._store.read_records(self._bundle, record.ADMITTED, small)
        keys = [record.decode_admitted(data) for data in payloads if data is not None]
        merged = dict(record.admitted_records(np.unique(np.concatenate(keys)))) if keys else {}
        self._store.write_records(self._bundle, record.ADMITTED, list(merged), [0] * len(merged), list(merged.values()))
        self._store.remove_records(self._bundle, record.ADMITTED, [name for name in small if name not in merged])
        return {name for name, data in merged.items() if not record.is_full_admitted(data)}
