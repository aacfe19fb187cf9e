"""The mirror: a bundle's whole table in this process, bootstrapped from pages and kept fresh from the deltas.

The table's size is fixed by its budget, so it always fits. Rows are the same fold as everywhere, by the same rule: a
row keeps the highest sequence number it has seen. What the pages say and what the deltas say may come in any order.
"""

import threading
import time

import numpy as np
from numpy.typing import NDArray

from models.bundle.delta import Delta
from serving.store.check import check_rows
from serving.store.page import pack, unpack
from serving.store.protocol import Float32, Int64, OnlineStore


class Mirror:
    """One bundle's rows in memory.

    Args:
        store: read once, whole; loaded with the bundle.
        bundle: its id.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self.bundle = bundle
        self._table = store.table(bundle)
        self._vectors, self._seqs = store.read_table(bundle)
        self._lock = threading.Lock()
        self._caught_up = time.monotonic()

    def caught_up(self) -> None:
        """Notes that all of the log is in the mirror at this moment."""
        self._caught_up = time.monotonic()

    def lag_s(self) -> float:
        """Seconds since the mirror last had all of the log."""
        return time.monotonic() - self._caught_up

    def fold(self, delta: Delta) -> int:
        """Applies a delta; deltas of other bundles are skipped. Returns the number of new rows."""
        if delta.bundle != self.bundle:
            return 0
        rows = delta.row_numbers
        with self._lock:
            newer = self._seqs[rows] < delta.seq
            rows = rows[newer]
            self._vectors[rows] = unpack(pack(self._table, delta.vectors[newer]))
            self._seqs[rows] = delta.seq
        return len(rows)

    def read_rows(self, rows: Int64) -> Float32:
        """Vectors (N, D) float32 of rows (N,), all of one moment."""
        check_rows(self._table, rows)
        with self._lock:
            return self._vectors.take(rows, axis=0)

    def seqs(self) -> NDArray[np.int64]:
        """Sequence numbers of all rows (R,)."""
        with self._lock:
            return self._seqs.copy()
