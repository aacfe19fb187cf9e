"""Reads consumed items from a store. A full page never changes, so a server reads each page of a user once."""

import threading
from collections.abc import Sequence

import numpy as np
import polars as pl

from features.shown.consumed import FULL, PAGES, decode_head, decode_page, page_ids
from models.bundle.bundle import Bundle
from serving.policy.policies import NO_KEYS, Keys
from serving.store.protocol import OnlineStore

# Largest number of users whose pages are remembered.
_MOST = 10_000


class ConsumedPages:
    """Reader of the consumed items of one bundle's users.

    Args:
        bundle: The bundle.
        store: Store of the records.
    """

    def __init__(self, bundle: Bundle, store: OnlineStore) -> None:
        self._bundle, self._store = bundle, store
        self._lock = threading.Lock()
        # By user: number of full pages, keys of the kept ones, and keys of the last head.
        self._known: dict[str, tuple[int, Keys, Keys]] = {}

    def read(self, user: str, head: bytes | None) -> Keys:
        """Returns the keys of a user's consumed items, in no order.

        Args:
            user: Id of the user.
            head: Record of the user's head, None if there is none.

        Raises:
            StoreError: The store does not answer.
        """
        if head is None:
            self.forget([user])
            return NO_KEYS
        full, keys = decode_head(head)
        with self._lock:
            known, pages, _ = self._known.get(user, (0, NO_KEYS, NO_KEYS))
        # A user who was forgotten begins with page 0 again.
        if full < known or full - known > PAGES:
            known, pages = 0, NO_KEYS
        if full > known:
            ids = page_ids(user, full)[-(full - known) :]
            read = [decode_page(page) for page in self._store.read_records(self._bundle.id, FULL, ids) if page]
            pages = np.concatenate([pages, *read])
        with self._lock:
            self._known.pop(user, None)
            if len(self._known) >= _MOST:
                self._known.pop(next(iter(self._known)))
            self._known[user] = full, pages, keys
        return np.concatenate([pages, keys])

    def last(self, user: str, *, published: bool) -> Keys:
        """Returns the keys that were read last, for a time without the store.

        Args:
            user: Id of the user.
            published: True returns the keys of the bundle, if none of the user were read.
        """
        with self._lock:
            known = self._known.get(user)
        if known is not None:
            return np.concatenate(known[1:])
        if not published:
            return NO_KEYS
        return self._bundle.consumed.filter(pl.col("user_id") == user)["key"].to_numpy()

    def users(self) -> list[str]:
        """Returns the users whose keys are remembered."""
        with self._lock:
            return list(self._known)

    def forget(self, users: Sequence[str]) -> None:
        """Removes what is remembered of users."""
        with self._lock:
            for user in users:
                self._known.pop(user, None)
