"""Stops calls to a system that has just failed, so that callers do not wait for it one after the other."""

import threading
import time


class Breaker:
    """Circuit breaker of one outside system.

    The breaker is closed at first, and all callers may call. A failure opens the breaker for some seconds, in which
    nobody may call. Then one caller in each such interval may call, until a call succeeds and closes the breaker.

    Args:
        open_s: Seconds without calls after a failure.
    """

    def __init__(self, open_s: float) -> None:
        self._open_s = open_s
        self._lock = threading.Lock()
        # Monotonic time until which nobody may call. None: the breaker is closed.
        self._until: float | None = None

    @property
    def open(self) -> bool:
        """True if a call failed less than `open_s` seconds ago, or a caller has been trying since."""
        until = self._until
        return until is not None and time.monotonic() < until

    def allows(self) -> bool:
        """Returns True if the caller may call. The caller must then report by `failed` or `succeeded`."""
        with self._lock:
            if self._until is None:
                return True
            now = time.monotonic()
            if now < self._until:
                return False
            self._until = now + self._open_s
            return True

    def failed(self) -> None:
        """Opens the breaker after a failed call."""
        self._until = time.monotonic() + self._open_s

    def succeeded(self) -> None:
        """Closes the breaker after a call that succeeded."""
        self._until = None
