"""Sends in a thread, so that a slow store does not delay the work that asks for it."""

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from features.errors import TesseraError

_LOGGER = logging.getLogger(__name__)
T = TypeVar("T")


class BackgroundSender(Generic[T]):
    """Does the newest asked work in a thread. A request that waits is replaced by a newer request.

    Args:
        work: Sends what was asked. A TesseraError is logged as a warning and kept for `wait`.
    """

    def __init__(self, work: Callable[[T], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._waiting: list[T] = []
        self._runs = False
        self._error: TesseraError | None = None

    def ask(self, request: T) -> None:
        """Asks for work and returns at once."""
        with self._changed:
            self._waiting = [request]
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="sender", daemon=True).start()

    def wait(self) -> TesseraError | None:
        """Waits until no work is left. Returns the error of the last work, or None."""
        with self._changed:
            self._changed.wait_for(lambda: not self._runs)
            return self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._runs = False
                    self._changed.notify_all()
                    return
                request = self._waiting.pop()
            error = None
            try:
                self._work(request)
            except TesseraError as raised:
                error = raised
                _LOGGER.warning("%s", raised)
            with self._changed:
                self._error = error
