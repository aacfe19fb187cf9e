"""Users' histories from the store, and what stands in for them while it is away."""

import threading

import polars as pl

from features.errors import StoreError
from models.bundle import record
from models.bundle.bundle import Bundle
from serving.breaker import Breaker
from serving.store.protocol import OnlineStore

# How long nothing is asked of a store that just failed.
_AWAY_S = 0.5
_MOST = 100_000


class Histories:
    """Reads one bundle's histories.

    Args:
        outlasts: True if to go on without the store, with what was last seen of a user, or was published; else a store
            that does not answer is an error.
    """

    def __init__(self, bundle: Bundle, store: OnlineStore, *, outlasts: bool) -> None:
        self._bundle = bundle
        self._store = store
        self._outlasts = outlasts
        self._lock = threading.Lock()
        self._seen: dict[str, bytes | None] = {}
        self._breaker = Breaker(_AWAY_S)
        # The store answers and has lost the bundle; the refresh reports it.
        self.emptied = False

    @property
    def away(self) -> bool:
        """Returns whether the store failed a moment ago, and should not be asked."""
        return self._breaker.open

    def read(self, user: str) -> tuple[bytes | None, bool]:
        """A user's record, None where there is none; and whether it is an old one because the store is away.

        Raises:
            StoreError: the store does not answer, and this service does not outlast it.
        """
        if not self._outlasts:
            return self._store.read_records(self._bundle.id, record.HISTORY, [user])[0], False
        if not self.emptied and self._breaker.allows():
            try:
                found = self._store.read_records(self._bundle.id, record.HISTORY, [user])[0]
            except StoreError:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
                self._remember(user, found)
                return found, False
        return self._seen.get(user) or self._published(user), True

    def _remember(self, user: str, found: bytes | None) -> None:
        with self._lock:
            self._seen.pop(user, None)
            if len(self._seen) >= _MOST:
                self._seen.pop(next(iter(self._seen)))
            self._seen[user] = found

    def _published(self, user: str) -> bytes | None:
        visits = self._bundle.history.filter(pl.col("user_id") == user)
        if not visits.height:
            return None
        return record.encode(record.HistoryRecord(visits["item_id"].to_list(), visits["time"].to_list()))
