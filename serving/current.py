"""The bundle that answers: every request is pinned to one from its first lookup to its last, and a swap waits for none.

A swap is one assignment. Requests that began on the old bundle end on it; what it holds is let go of when the last of
them has ended.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

from serving.rank import RankService


class Current:
    """Holds the service that new requests get.

    Args:
        service: the first.
        close: lets go of what the first holds beside itself, such as a mirror.
    """

    def __init__(self, service: RankService, *, close: Callable[[], None] = lambda: None) -> None:
        self._lock = threading.Lock()
        self._held = _Held(service, close)
        self._watchers: list[Callable[[RankService], None]] = []

    @property
    def service(self) -> RankService:
        """What a request that starts now would get."""
        return self._held.service

    @contextlib.contextmanager
    def pinned(self) -> Iterator[RankService]:
        """One service for a whole request, whatever is swapped meanwhile."""
        with self._lock:
            held = self._held
            held.users += 1
        try:
            yield held.service
        finally:
            self._leave(held)

    def swap(self, service: RankService, *, close: Callable[[], None] = lambda: None) -> RankService:
        """Gives new requests another service; returns the one before."""
        with self._lock:
            before, self._held = self._held, _Held(service, close)
            before.users += 1
        for watcher in self._watchers:
            watcher(service)
        before.retired = True
        self._leave(before)
        return before.service

    def watch(self, watcher: Callable[[RankService], None]) -> None:
        """Calls `watcher` with the service, now and after each swap."""
        self._watchers.append(watcher)
        watcher(self.service)

    def close(self) -> None:
        """Lets go of what the service holds; no request may follow."""
        self._held.close()

    def _leave(self, held: "_Held") -> None:
        with self._lock:
            held.users -= 1
            last = held.retired and not held.users
        if last:
            held.close()


class _Held:
    def __init__(self, service: RankService, close: Callable[[], None]) -> None:
        self.service = service
        self.close = close
        self.users = 0
        self.retired = False
