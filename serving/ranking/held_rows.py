"""Rows that a mirror holds: a copy of a bundle's table in the memory of this process."""

import threading
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.store.protocol import Float32, Int64, OnlineStore
from streaming.log.protocol import Offsets


class HeldRows(Protocol):
    """Copy of a bundle's table. A row keeps the highest sequence number."""

    @property
    def position(self) -> Offsets:
        """First offset of each partition of the deltas' topic that the copy may lack."""
        ...

    def moved(self, position: Offsets) -> None:
        """Records that the copy has all deltas before a position."""
        ...

    def fold(self, rows: Int64, vectors: Float32, seq: int) -> int:
        """Sets distinct rows (N,) to vectors (N, D) where theirs are older. Returns the number of changed rows."""
        ...

    def take(self, rows: Int64) -> Float32:
        """Returns the vectors (N, D) of rows (N,), all of the same moment.

        Raises:
            StoreError: The copy cannot be read at present.
        """
        ...

    def seqs(self) -> NDArray[np.int64]:
        """Returns the sequence numbers of all rows, (R,) int64."""
        ...


class OwnRows:
    """See `HeldRows`. The table is read from the store once.

    Args:
        store: Store that has the bundle.
        bundle: Id of the bundle.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self.position: Offsets = ()
        self._vectors, self._seqs = store.read_table(bundle)
        self._lock = threading.Lock()

    def moved(self, position: Offsets) -> None:
        """See `HeldRows`."""
        self.position = position

    def fold(self, rows: Int64, vectors: Float32, seq: int) -> int:
        """See `HeldRows`."""
        with self._lock:
            newer = self._seqs[rows] < seq
            rows = rows[newer]
            self._vectors[rows], self._seqs[rows] = vectors[newer], seq
        return len(rows)

    def take(self, rows: Int64) -> Float32:
        """See `HeldRows`."""
        with self._lock:
            return self._vectors.take(rows, axis=0)

    def seqs(self) -> NDArray[np.int64]:
        """See `HeldRows`."""
        with self._lock:
            return self._seqs.copy()
