"""Users' histories from the store, and their replacement while the store is unavailable."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from features.errors import StoreError
from features.hashing import fingerprint
from features.shown.consumed import HEAD
from models.bundle import record
from models.bundle.aggregate_record import AGGREGATE
from models.bundle.bundle import Bundle
from serving.breaker import Breaker
from serving.policy.consumed_pages import ConsumedPages
from serving.policy.policies import NO_KEYS, Keys
from serving.store.protocol import OnlineStore

# Pause after a failure of the store, in which the store is not called.
_PAUSE_S = 0.5
# Largest number of remembered users.
_MOST = 100_000


@dataclass(frozen=True)
class UserRecords:
    """Records of one request.

    Attributes:
        history: Record of the user's history, None if there is none.
        stale: True if the history is an old one, because the store is away.
        aggregates: Records of aggregates by id, None for a record that the store lacks; empty while it is away.
        consumed: Keys of the items that the user has consumed, ascending; empty unless they were asked for.
    """

    history: bytes | None
    stale: bool
    aggregates: Mapping[str, bytes | None] = field(default_factory=dict)
    consumed: Keys = field(default_factory=lambda: NO_KEYS)


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
        self._forgotten: set[str] = set()
        self._pages = ConsumedPages(bundle, store)
        self._breaker = Breaker(_PAUSE_S)
        self.emptied = False

    @property
    def unavailable(self) -> bool:
        """True if the store has just failed and should not be called."""
        return self._breaker.open

    def read(self, user: str, aggregates: Sequence[str] = (), *, consumed: bool = False) -> UserRecords:
        """Reads a user's record, and records of aggregates in the same round trip.

        Args:
            user: Id of the user.
            aggregates: Ids of records.
            consumed: True reads the items that the user has consumed.

        Raises:
            StoreError: The store does not answer, and `outlasts` is False.
        """
        wanted = {record.HISTORY: [user]} | ({AGGREGATE: aggregates} if aggregates else {})
        if consumed:
            wanted |= {HEAD: [user]}
        if not self._outlasts:
            return self._read(wanted)
        if not self.emptied and self._breaker.allows():
            try:
                found = self._read(wanted)
            except StoreError:
                self._breaker.failed()
            else:
                self._breaker.succeeded()
                self._remember(user, found.history)
                return found
        history = self._seen.get(user) or self._published(user)
        keys = _keys(history, self._pages.last(user, published=user not in self._forgotten)) if consumed else NO_KEYS
        return UserRecords(history, stale=True, consumed=keys)

    def consumed(self, user: str) -> Keys:
        """Returns the keys of the items that a user has consumed, ascending."""
        return self.read(user, consumed=True).consumed

    def remembered(self) -> list[str]:
        """Returns the users of whom something is remembered."""
        with self._lock:
            return list({*self._seen, *self._pages.users()})

    def forget(self, users: Sequence[str]) -> None:
        """Removes what is remembered of users. Their published histories are no longer read."""
        with self._lock:
            self._forgotten.update(users)
            for user in users:
                self._seen.pop(user, None)
        self._pages.forget(users)

    def _read(self, wanted: Mapping[str, Sequence[str]]) -> UserRecords:
        found = self._store.read_kinds(self._bundle.id, wanted)
        aggregates = dict(zip(wanted.get(AGGREGATE, ()), found.get(AGGREGATE, ()), strict=True))
        history, keys = found[record.HISTORY][0], NO_KEYS
        if HEAD in wanted:
            keys = _keys(history, self._pages.read(wanted[HEAD][0], found[HEAD][0]))
        return UserRecords(history, stale=False, aggregates=aggregates, consumed=keys)

    def _remember(self, user: str, payload: bytes | None) -> None:
        with self._lock:
            self._seen.pop(user, None)
            if len(self._seen) >= _MOST:
                self._seen.pop(next(iter(self._seen)))
            self._seen[user] = payload

    def _published(self, user: str) -> bytes | None:
        if user in self._forgotten:
            return None
        found = next(record.published_histories(self._bundle, user), None)
        return None if found is None else record.encode(found[1])


def _keys(history: bytes | None, consumed: Keys) -> Keys:
    """Returns the keys of consumed items, those of the history's visits among them, ascending."""
    visits = fingerprint(record.decode_history(history).items) if history else NO_KEYS
    return np.sort(np.concatenate([consumed, visits]), kind="stable")
