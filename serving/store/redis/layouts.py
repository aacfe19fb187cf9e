"""Finds and states the number of shares of each bundle, and lists and removes the keys of shares.

On a cluster, the key `shares` of a bundle's home states the number. It is set before the first key of the bundle. A
bundle that a release before shares has loaded has no such key and one share, and stays so until it is dropped.
"""

import time
from collections.abc import Iterator

import numpy as np

from serving.store.page import chunks, page_count, parse_mark
from serving.store.protocol import FOLLOWED, StoredTable
from serving.store.redis.commands import RedisCommands
from serving.store.redis.scripts import Script
from serving.store.redis.spread import Spread

_SHARES = Script("shares")
_OLD_FOR_S = 5.0
_PAGES = 1024


class Layouts:
    """Shares of the bundles on the servers of one address.

    Args:
        commands: Client of the servers.
    """

    def __init__(self, commands: RedisCommands) -> None:
        self._redis = commands
        self._known: dict[str, tuple[Spread, float]] = {}

    def find(self, bundle: str) -> Spread | None:
        """Returns the shares of a bundle, or None if the store has nothing of the bundle.

        On a cluster, one share is asked for again after a few seconds, since another client may load the bundle again
        with more shares.
        """
        if self._redis.servers.shares == 1:
            return Spread(bundle)
        spread, until = self._known.get(bundle, (None, 0.0))
        if spread is not None and time.monotonic() < until:
            return spread
        shares = self._ask(bundle, 0)
        return self._keep(bundle, shares) if shares else None

    def state(self, bundle: str) -> Spread:
        """Returns the shares of a bundle, and states their number if the store has nothing of the bundle.

        If the node of the home has lost its data, the other nodes may still have shares. These are removed.
        """
        spread = self.find(bundle)
        if spread is None:
            leftover = Spread(bundle, self._redis.servers.shares)
            marks = leftover.keys("table") + leftover.keys("kinds")
            if any(self._redis.all([(key, ("EXISTS", key)) for key in marks])):
                self.remove(leftover)
            spread = self._keep(bundle, self._ask(bundle, leftover.shares))
        return spread

    def forget(self, bundle: str) -> None:
        """Forgets what this client knows of a bundle."""
        self._known.pop(bundle, None)

    def keys(self, spread: Spread, table: StoredTable | None) -> Iterator[list[bytes]]:
        """Yields all keys of the shares in lists. The first list has the marks of the table."""
        yield [*spread.keys("table"), *self._record_keys(spread), *spread.keys("kinds")]
        if table is not None:
            for chunk in chunks(np.arange(page_count(table)), _PAGES):
                yield spread.page_keys(chunk)

    def remove(self, spread: Spread, table: StoredTable | None = None) -> None:
        """Removes all keys of the shares. The marks go first, so that no client reads or writes a page.

        Args:
            spread: The shares.
            table: The table, if its mark is gone already.
        """
        marks = [mark for mark in self._redis.all([(key, ("GET", key)) for key in spread.keys("table")]) if mark]
        if table is None and marks:
            table = parse_mark(marks[0], spread.shares)
        self.unlink(spread.keys("table"))
        for keys in self.keys(spread, table):
            self.unlink(keys)

    def unlink(self, keys: list[bytes]) -> None:
        """Removes keys."""
        self._redis.all([(key, ("UNLINK", key)) for key in keys])

    def _record_keys(self, spread: Spread) -> list[bytes]:
        """Returns the keys of all kinds. A kind with followers has keys before its first record."""
        kinds = self._redis.all([(key, ("SMEMBERS", key)) for key in spread.keys("kinds")])
        return [
            spread.key(share, f"{part}:{kind}")
            for share, found in enumerate(kinds)
            for kind in sorted({name.decode() for name in found} | FOLLOWED)
            for part in ("record", "changes", "order", "removed")
        ]

    def _ask(self, bundle: str, shares: int) -> int:
        """Returns the number of shares of a bundle, 0 if it is unknown. Sets the number if `shares` is not 0."""
        home = Spread(bundle)
        keys = [home.key(0, name) for name in ("shares", "table", "dropping", "kinds")]
        (found,) = self._redis.run(_SHARES, [(keys, [shares])])
        return int(found)

    def _keep(self, bundle: str, shares: int) -> Spread:
        spread = Spread(bundle, shares)
        until = float("inf") if shares > 1 else time.monotonic() + _OLD_FOR_S
        self._known[bundle] = (spread, until)
        return spread
