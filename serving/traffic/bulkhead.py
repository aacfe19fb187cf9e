"""Runs the calls of a challenger on separate threads, so that a challenger that hangs delays no other bundle."""

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from features.errors import AnswerError

_THREADS, _TURN_S = 8, 0.25
# Longest wait for threads that end, seconds. A call that hangs holds its thread longer.
_END_S = 1.0
T = TypeVar("T")


class Bulkhead:
    """Limits the number of calls at a time and the wait for each call.

    A thread cannot be ended from outside. If a call hangs, its thread is not free until the call returns. If no thread
    is free, further calls are shed after a short wait. The threads end with the process.

    Args:
        name: Owner of the calls, for messages.
        answer_s: Time after which a call counts as hanging, seconds.
        threads: Largest number of calls at a time.
    """

    def __init__(self, name: str, *, answer_s: float, threads: int = _THREADS) -> None:
        self._name = name
        self._answer_s = answer_s
        self._most = threads
        self._free = threading.Semaphore(threads)
        self._calls: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def run(self, call: Callable[[], T]) -> T:
        """Runs a call on a thread. Returns its result, or raises its exception.

        Raises:
            AnswerError: No thread was free, or the call did not return in time.
        """
        if not self._free.acquire(timeout=_TURN_S):
            raise AnswerError(f"{self._name}: {self._most} rankings are running and no thread is free; try again later")
        job = _Job(contextvars.copy_context(), call)
        with self._lock:
            if len(self._threads) < self._most:
                self._threads.append(threading.Thread(target=self._work, name=self._name, daemon=True))
                self._threads[-1].start()
        self._calls.put(job)
        if not job.done.wait(self._answer_s):
            raise AnswerError(f"{self._name}: no ranking within {self._answer_s:g} s; try again later")
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def close(self) -> None:
        """Ends the free threads, and waits for them. All other threads end after their call."""
        for _ in self._threads:
            self._calls.put(None)
        # A thread that ends while the interpreter does so may abort the process: libraries have state in each thread.
        give_up = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, give_up - time.monotonic()))

    def _work(self) -> None:
        while (job := self._calls.get()) is not None:
            try:
                job.result = job.context.run(job.call)
            except BaseException as error:
                job.error = error
            finally:
                job.done.set()
                self._free.release()


class _Job:
    def __init__(self, context: contextvars.Context, call: Callable[[], Any]) -> None:
        self.context = context
        self.call = call
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None
