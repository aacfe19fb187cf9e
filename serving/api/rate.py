"""Rates: buckets of tokens by caller."""

import threading
import time

_MOST_KEYS = 10_000


class Buckets:
    """Buckets of tokens, one for each caller, filled at the rate up to the burst."""

    def __init__(self, per_second: float, burst_s: float) -> None:
        self._rate = per_second
        self._depth = max(1.0, per_second * burst_s)
        self._lock = threading.Lock()
        self._held: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> float:
        """Takes a token; returns the seconds to wait if there is none, else 0."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        with self._lock:
            tokens, then = self._held.pop(caller, (self._depth, now))
            tokens = min(self._depth, tokens + (now - then) * self._rate)
            enough = tokens >= 1
            if len(self._held) >= _MOST_KEYS:
                self._held.pop(next(iter(self._held)))
            self._held[caller] = (tokens - 1 if enough else tokens, now)
            return 0.0 if enough else (1 - tokens) / self._rate
