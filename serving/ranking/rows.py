"""Sources of a server's rows: the online store, or a mirror of it in this process while the mirror is fresh."""

import contextlib
from typing import Protocol

from features import tracing as trace
from features.errors import StoreError
from serving.ranking.mirror import Mirror
from serving.store.protocol import Float32, Int64, OnlineStore

MOST_LAG_S = 2.0


class RowReader(Protocol):
    """One bundle's rows."""

    @property
    def outlasts_store(self) -> bool:
        """True if rows can be read while the store is away."""
        ...

    def read_rows(self, rows: Int64) -> Float32:
        """Vectors (N, D) float32 of rows (N,) int64, in their order, repeated or not; the caller's own."""
        ...


class StoreRows:
    """Rows from the store, one round trip a call.

    Args:
        store: loaded with the bundle.
        bundle: its id.
    """

    def __init__(self, store: OnlineStore, bundle: str) -> None:
        self._store = store
        self._bundle = bundle

    @property
    def outlasts_store(self) -> bool:
        """See `RowReader`."""
        return False

    def read_rows(self, rows: Int64) -> Float32:
        """See `RowReader`; raises StoreError when the store does not answer."""
        with trace.span("lookup", rows=len(rows), source="store"):
            return self._store.read_rows(self._bundle, rows)


class MirrorRows:
    """Rows from a mirror, or from the store while the mirror lags; old ones while the store is away too.

    Args:
        mirror: followed by somebody, who says when it has caught up.
        store: read meanwhile.
        most_lag_s: since the mirror last had all of the log; more is a lag.
    """

    def __init__(self, mirror: Mirror, store: StoreRows, *, most_lag_s: float = MOST_LAG_S) -> None:
        self.mirror = mirror
        self._store = store
        self._most_lag_s = most_lag_s

    @property
    def fresh(self) -> bool:
        """True if the mirror answers."""
        return self.mirror.lag_s() <= self._most_lag_s

    @property
    def outlasts_store(self) -> bool:
        """See `RowReader`."""
        return True

    def read_rows(self, rows: Int64) -> Float32:
        """See `RowReader`."""
        if not self.fresh:
            with contextlib.suppress(StoreError):
                return self._store.read_rows(rows)
        with trace.span("lookup", rows=len(rows), source="mirror"):
            return self.mirror.read_rows(rows)
