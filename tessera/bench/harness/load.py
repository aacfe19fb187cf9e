"""Load of requests that are due at fixed times, whether or not the server has answered the earlier ones.

A caller that waits for an answer before it sends its next request leaves out exactly the requests that a stall would
have delayed (Tene, "How NOT to measure latency", 2013: coordinated omission). Here a request's time runs from the
moment it was due, any free caller sends it, and a failed request counts as its time-out at least.
"""

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

TIMEOUT_S = 10.0
# A request is sent late if it waited longer than a sleeping thread takes to wake up on a busy machine.
_LATE_S = 0.02


class Asking(Protocol):
    """A connection that one thread asks through."""

    def body(self) -> bytes:
        """Returns a request."""

    def rank(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Returns status and answer; raises OSError or HTTPException when there is none."""

    def close(self) -> None:
        """Closes the connection."""


class Load:
    """Callers that send requests when they are due, or as fast as answers come.

    Args:
        connect: Opens the connection of caller number n.
        per_second: requests due per second, evenly spaced; None for a closed loop that finds the peak, whose times run
            from when a request was sent.
        callers: threads. With a rate there must be more of them than requests in flight in the worst stall.
        timeout_s: least time that a failed request counts as.
        note: called with request and answer of each answered request, by any thread.
    """

    def __init__(
        self,
        connect: Callable[[int], Asking],
        *,
        per_second: float | None,
        callers: int,
        timeout_s: float = TIMEOUT_S,
        note: Callable[[bytes, dict[str, Any]], None] = lambda body, answer: None,
    ) -> None:
        self.ms: list[float] = []
        """Milliseconds of each request, in no order."""
        self.failed: list[str] = []
        """Reason of each request without an answer of status 200."""
        self.stop = threading.Event()
        self._connect = connect
        self._per_second = per_second
        self._callers = callers
        self._timeout_s = timeout_s
        self._note = note
        self._late = 0
        self._seconds = 0.0

    def run(self, seconds: float | None) -> None:
        """Sends every request that is due within `seconds`, or until `stop` is set; may be called again."""
        start, numbers = time.monotonic(), itertools.count()
        end = start + seconds if seconds is not None else float("inf")
        threads = [
            threading.Thread(target=self._call, args=(number, numbers, start, end)) for number in range(self._callers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._seconds += seconds if seconds is not None else time.monotonic() - start

    @property
    def rate(self) -> float:
        """Requests per second of the runs so far."""
        return len(self.ms) / self._seconds if self._seconds else 0.0

    def row(self, part: str) -> dict[str, Any]:
        """Returns the figures of a result's row."""
        p50, p99 = np.percentile(self.ms, [50, 99])
        return {
            "part": part,
            "timed_from": "due" if self._per_second else "sent",
            "callers": self._callers,
            "requests": len(self.ms),
            "requests_per_s": self.rate,
            "failed": len(self.failed),
            "p50_ms": float(p50),
            "p99_ms": float(p99),
            "most_ms": max(self.ms),
            "sent_late_share": self._late / len(self.ms) if self._per_second else None,
        }

    def _call(self, caller: int, numbers: "itertools.count[int]", start: float, end: float) -> None:
        with contextlib.closing(self._connect(caller)) as asking:
            while not self.stop.is_set():
                body = asking.body()
                due = start + next(numbers) / self._per_second if self._per_second else time.monotonic()
                if due >= end or self.stop.wait(max(0.0, due - time.monotonic())):
                    return
                self._late += time.monotonic() - due > _LATE_S
                why = self._ask(asking, body, overdue=time.monotonic() > end + self._timeout_s)
                waited = time.monotonic() - due
                if why:
                    self.failed.append(why)
                    waited = max(waited, self._timeout_s)
                self.ms.append(1_000 * waited)

    def _ask(self, asking: Asking, body: bytes, *, overdue: bool) -> str:
        """Returns why a request has no good answer, or nothing."""
        if overdue:
            return "not sent: no caller was free until the load had ended"
        try:
            status, answer = asking.rank(body)
        except (OSError, http.client.HTTPException) as error:
            return repr(error)
        if status != 200:
            return f"{status}: {answer.get('detail', '')[:200]}"
        self._note(body, answer)
        return ""
