"""Calls on a few threads of their own, so that a challenger that hangs holds up nobody but itself."""

import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from features.errors import AnswerError

_THREADS, _TURN_S = 8, 0.25
T = TypeVar("T")


class Bulkhead:
    """Runs calls at most so many at a time, and waits for each no longer than it is good for.

    A thread cannot be ended from outside. One whose call hangs is lost until the call returns; when all are, further
    calls are shed at once. The threads end with the process, whatever they do.

    Args:
        name: whose calls these are, for messages.
        answer_s: seconds until a call counts as hanging.
    """

    def __init__(self, name: str, *, answer_s: float, threads: int = _THREADS) -> None:
        self._name = name
        self._answer_s = answer_s
        self._most = threads
        self._free = threading.Semaphore(threads)
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def run(self, call: Callable[[], T]) -> T:
        """Returns what a call returns, or raises what it raises.

        Raises:
            AnswerError: no thread was free, or the call did not return in time.
        """
        if not self._free.acquire(timeout=_TURN_S):
            raise AnswerError(f"{self._name}: {self._most} rankings are in hand and none ends; try again later")
        made = _Call(contextvars.copy_context(), call)
        with self._lock:
            if self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._calls.put(made)
        if not made.done.wait(self._answer_s):
            raise AnswerError(f"{self._name}: no ranking within {self._answer_s:g} s; try again later")
        if made.error is not None:
            raise made.error
        found: T = made.found
        return found

    def close(self) -> None:
        """Ends the threads that are free; the others end with their call."""
        for _ in range(self._started):
            self._calls.put(None)

    def _work(self) -> None:
        while (made := self._calls.get()) is not None:
            try:
                made.found = made.context.run(made.call)
            except BaseException as error:
                made.error = error
            finally:
                made.done.set()
                self._free.release()


class _Call:
    def __init__(self, context: contextvars.Context, call: Callable[[], Any]) -> None:
        self.context = context
        self.call = call
        self.done = threading.Event()
        self.found: Any = None
        self.error: BaseException | None = None
