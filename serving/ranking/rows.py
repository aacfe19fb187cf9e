"""Sources of a server's rows: the online store, or a mirror in this process while the mirror is fresh."""

import contextlib
from typing import Protocol

from features import tracing as trace
from features.errors import StoreError
from serving.ranking.mirror import Mirror
from serving.store.protocol import Float32, Int64, OnlineStore

MOST_LAG_S = 2.0
"""Default of the largest lag of a fresh mirror, seconds."""


class RowReader(Protocol):
    """Reader of one bundle's rows."""

    @property
    def outlasts_store(self) -> bool:
        """True if rows can be read while the store is unavailable."""
        ...

    def read_rows(self, rows: Int64) -> Float32:
        """Returns the vectors (N, D) float32 of rows (N,) int64, in the order of the rows.

        A row may occur several times. The caller may change the array.
        """
        ...

    def mirrored(self, *, away: bool) -> Mirror | None:
        """Returns the mirror that answers for aggregates, None if the store does.

        Args:
            away: True if the store does not answer.
        """
        ...


class StoreRows:
    """Rows from the store, in one round trip per call.

    Args:
        store: Store that has the bundle.
        bundle: Id of the bundle.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self._store = store
        self._bundle = bundle

    @property
    def outlasts_store(self) -> bool:
        """See `RowReader`."""
        return False

    def read_rows(self, rows: Int64) -> Float32:
        """See `RowReader`. Raises StoreError if the store does not answer."""
        with trace.span("lookup", rows=len(rows), source="store"):
            return self._store.read_rows(self._bundle, rows)

    def mirrored(self, *, away: bool) -> Mirror | None:
        """See `RowReader`."""
        return None


class MirrorRows:
    """Rows from a mirror, or from the store while the mirror lags.

    While the store is unavailable too, old rows come from the mirror.

    Attributes:
        mirror: The mirror.

    Args:
        mirror: Mirror that a feed keeps fresh.
        store: Source of rows while the mirror lags.
        most_lag_s: Largest lag of a fresh mirror, seconds.
    """

    def __init__(self, mirror: Mirror, store: StoreRows, *, most_lag_s: float = MOST_LAG_S) -> None:
        self.mirror = mirror
        self._store = store
        self._most_lag_s = most_lag_s

    @property
    def fresh(self) -> bool:
        """True if the mirror is fresh, so that rows come from the mirror."""
        return self.mirror.lag_s() <= self._most_lag_s

    @property
    def outlasts_store(self) -> bool:
        """See `RowReader`."""
        return True

    def read_rows(self, rows: Int64) -> Float32:
        """See `RowReader`."""
        # A source that fails leaves the rows to the other one, which is the last.
        if self.fresh:
            with contextlib.suppress(StoreError):
                return self._mirrored(rows)
            return self._store.read_rows(rows)
        with contextlib.suppress(StoreError):
            return self._store.read_rows(rows)
        return self._mirrored(rows)

    def _mirrored(self, rows: Int64) -> Float32:
        with trace.span("lookup", rows=len(rows), source="mirror"):
            return self.mirror.read_rows(rows)

    def mirrored(self, *, away: bool) -> Mirror | None:
        """See `RowReader`."""
        return self.mirror if away or self.fresh else None
