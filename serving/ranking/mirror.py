"""The mirror: a copy of a bundle's whole table in this process, read from the store and kept fresh from the deltas.

The table's budget bounds its size, so the copy fits into memory. The mirror folds deltas by the same rule as the store:
a row keeps the highest sequence number. Pages of the store and deltas may therefore arrive in any order.
"""

import itertools
import threading
import time

import numpy as np
from numpy.typing import NDArray

from features.aggregate.plan import AggregatePlan
from models.bundle import aggregate_record
from models.bundle.delta import Delta
from models.bundle.request_aggregates import AsOf, Parts, answer
from serving.ranking.held_rows import HeldRows, OwnRows
from serving.store.check import check_rows
from serving.store.page import pack, unpack
from serving.store.protocol import Float32, Int64, OnlineStore
from streaming.log.protocol import Offsets

# Keys that the trainer has forgotten take memory until they are this many, and a quarter of all keys.
_LEAST_FORGOTTEN, _SHARE = 1_024, 4


class Mirror:
    """Rows of one bundle in memory.

    Attributes:
        bundle: Id of the bundle.
        position: First offset in each partition of the deltas' topic that the mirror may lack.

    Args:
        store: Store that has the bundle. The table is read once.
        bundle: Id of the bundle.
        plan: Plan of the bundle's aggregates.
        rows: Holds the table. Default: this process.
    """

    def __init__(self, store: OnlineStore, bundle: str, plan: AggregatePlan, rows: HeldRows | None = None) -> None:
        self.bundle = bundle
        self.position: Offsets = ()
        self._table = store.table(bundle)
        self._rows = OwnRows(store, bundle) if rows is None else rows
        held = store.scan_records(bundle, aggregate_record.AGGREGATE) if plan.columns else iter(())
        self._aggregates = aggregate_record.restored(plan, dict(itertools.chain.from_iterable(held)))
        self._forgotten = 0
        self._lock = threading.Lock()
        self._caught_up = time.monotonic()

    def moved(self, position: Offsets) -> None:
        """Records that the mirror has all deltas before a position. The feed calls this method after each fold."""
        self.position = position
        self._rows.moved(position)

    def caught_up(self) -> None:
        """Records that the mirror has all deltas of the log at this moment."""
        self._caught_up = time.monotonic()

    def lag_s(self) -> float:
        """Returns the time since the mirror last had all deltas of the log, seconds."""
        return time.monotonic() - self._caught_up

    def fold(self, delta: Delta) -> int:
        """Applies a delta. Deltas of other bundles are skipped. Returns the number of changed rows.

        One thread calls this method.
        """
        if delta.bundle != self.bundle:
            return 0
        changed = self._rows.fold(delta.row_numbers, unpack(pack(self._table, delta.vectors)), delta.seq)
        with self._lock:
            self._forgotten += aggregate_record.apply(self._aggregates, delta.records)
        self._compact()
        return changed

    def _compact(self) -> None:
        """Releases the memory of forgotten keys. The states are made beside those that answer, and swapped."""
        states = self._aggregates.states
        if self._forgotten <= max(_LEAST_FORGOTTEN, sum(len(state) for state in states.values()) // _SHARE):
            return
        self._forgotten = 0
        for by, state in list(states.items()):
            fresh = state.compacted()
            with self._lock:
                states[by] = fresh

    def read_rows(self, rows: Int64) -> Float32:
        """Returns the vectors (N, D) float32 of rows (N,), all of the same moment.

        Raises:
            StoreError: The rows cannot be read at present.
        """
        check_rows(self._table, rows)
        return self._rows.take(rows)

    def aggregates(self, parts: Parts, candidates: int, at: int | None) -> tuple[Float32, AsOf | None]:
        """Answers for the candidates of one request; see `models.bundle.request_aggregates.answer`."""
        with self._lock:
            return answer(self._aggregates, parts, candidates, at)

    def seqs(self) -> NDArray[np.int64]:
        """Returns the sequence numbers of all rows, (R,) int64."""
        return self._rows.seqs()
