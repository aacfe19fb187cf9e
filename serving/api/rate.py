"""Rates: buckets of tokens by caller."""

import fcntl
import hashlib
import mmap
import struct
import tempfile
import threading
import time
from typing import Protocol

_MOST_KEYS = 10_000
_SLOT = struct.Struct("<Qdd")
# Slots in which a caller may lie.
_TRIED = 8


class Rates(Protocol):
    """Rates of callers."""

    def take(self, caller: str) -> float:
        """Takes a token; returns the seconds to wait if there is none, else 0."""


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


class SharedBuckets:
    """Buckets of tokens that forked processes share, one for each caller.

    A caller has a slot by the hash of its name. A record lock of the system guards the slots. The system frees the lock
    of a process that dies.

    Args:
        per_second: Tokens a second.
        burst_s: Seconds' worth of tokens that a bucket holds.
        slots: Callers that are known at a time. A new caller takes the slot that was longest unused of its few.
    """

    def __init__(self, per_second: float, burst_s: float, *, slots: int = _MOST_KEYS) -> None:
        self._rate = per_second
        self._depth = max(1.0, per_second * burst_s)
        self._slots = slots
        self._guard = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._within = threading.Lock()
        self._memory = mmap.mmap(-1, slots * _SLOT.size)

    def close(self) -> None:
        """Frees the memory and the lock of this process."""
        self._memory.close()
        self._guard.close()

    def take(self, caller: str) -> float:
        """Takes a token; returns the seconds to wait if there is none, else 0."""
        if not self._rate:
            return 0.0
        name = int.from_bytes(hashlib.blake2b(caller.encode(), digest_size=8).digest(), "little") | 1
        with self._within:
            fcntl.lockf(self._guard, fcntl.LOCK_EX)
            try:
                return self._taken(name, time.monotonic())
            finally:
                fcntl.lockf(self._guard, fcntl.LOCK_UN)

    def _taken(self, name: int, now: float) -> float:
        place, tokens, then = self._found(name, now)
        tokens = min(self._depth, tokens + (now - then) * self._rate)
        enough = tokens >= 1
        _SLOT.pack_into(self._memory, place * _SLOT.size, name, tokens - 1 if enough else tokens, now)
        return 0.0 if enough else (1 - tokens) / self._rate

    def _found(self, name: int, now: float) -> tuple[int, float, float]:
        """Returns the caller's slot, its tokens and their time; a full bucket for a new caller."""
        oldest, used = 0, now
        for step in range(min(_TRIED, self._slots)):
            place = (name + step) % self._slots
            owner, tokens, then = _SLOT.unpack_from(self._memory, place * _SLOT.size)
            if owner == name:
                return place, tokens, then
            if then < used or not step:
                oldest, used = place, then
        return oldest, self._depth, now
