"""Users' histories from the store, and their replacement while the store is unavailable."""

import threading

import polars as pl

from features.errors import StoreError
from models.bundle import record
from models.bundle.bundle import Bundle
from serving.breaker import Breaker
from serving.store.protocol import OnlineStore

# Pause after a failure of the store, in which the store is not called.
_PAUSE_S = 0.5
# Largest number of remembered users.
_MOST = 100_000


class Histories:
    """Reader of one bundle's histories.

    Attributes:
        emptied: True if the store answers and no longer has the bundle. The service's refresh sets the value.

    Args:
        bundle: The bundle.
        store: Store of the histories.
        outlasts: True if reads continue while the store is unavailable, with the last seen or the published history. If
            False, an unavailable store is an error.
    """

    def __init__(self, bundle: Bundle, store: OnlineStore, *, outlasts: bool) -> None:
        self._bundle = bundle
        self._store = store
        self._outlasts = outlasts
        self._lock = threading.Lock()
        self._seen: dict[str, bytes | None] = {}
        self._breaker = Breaker(_PAUSE_S)
        self.emptied = False

    @property
    def unavailable(self) -> bool:
        """True if the store has just failed and should not be called."""
        return self._breaker.open

    def read(self, user: str) -> tuple[bytes | None, bool]:
        """Reads the record of a user's history.

        Args:
            user: Id of the user.

        Returns:
            The record, or None without a history, and True if the record may be old since the store is unavailable.

        Raises:
            StoreError: The store does not answer, and `outlasts` is False.
        """
        if not self._outlasts:
            return self._store.read_records(self._bundle.id, record.HISTORY, [user])[0], False
        if not self.emptied and self._breaker.allows():
            try:
                payload = self._store.read_records(self._bundle.id, record.HISTORY, [user])[0]
            except StoreError:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
                self._remember(user, payload)
                return payload, False
        return self._seen.get(user) or self._published(user), True

    def _remember(self, user: str, payload: bytes | None) -> None:
        with self._lock:
            self._seen.pop(user, None)
            if len(self._seen) >= _MOST:
                self._seen.pop(next(iter(self._seen)))
            self._seen[user] = payload

    def _published(self, user: str) -> bytes | None:
        visits = self._bundle.history.filter(pl.col("user_id") == user)
        if not visits.height:
            return None
        return record.encode(record.HistoryRecord(visits["item_id"].to_list(), visits["time"].to_list()))
