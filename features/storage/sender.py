"""Sends in a thread, so that a slow store does not delay the work that asks for it."""

import logging
import threading
from collections.abc import Callable

from features.errors import TesseraError

_LOGGER = logging.getLogger(__name__)


class BackgroundSender:
    """Does the newest asked work of each subject in a thread. A waiting request is replaced by a newer one.

    Args:
        work: Sends a request of a subject. A TesseraError is logged as a warning and kept for `wait`.
    """

    def __init__(self, work: Callable[[str, str], None]) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._waiting: dict[str, str] = {}
        self._errors: dict[str, TesseraError | None] = {}
        self._current: str | None = None
        self._runs = False

    def ask(self, subject: str, request: str) -> None:
        """Asks for work and returns at once."""
        with self._changed:
            self._waiting[subject] = request
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="sender", daemon=True).start()

    def wait(self, subject: str) -> TesseraError | None:
        """Waits until no work of a subject is left. Returns the error of its last work, or None."""
        with self._changed:
            self._changed.wait_for(lambda: not self._runs or subject not in (self._current, *self._waiting))
            return self._errors.get(subject)

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException:
            with self._changed:
                self._runs, self._current = False, None
                self._changed.notify_all()
            raise

    def _next(self) -> bool:
        """Does the work that waits longest. Returns False if none waits; then `ask` starts another thread."""
        with self._changed:
            if not self._waiting:
                self._runs = False
                self._changed.notify_all()
                return False
            subject = self._current = next(iter(self._waiting))
            request = self._waiting.pop(subject)
        error = None
        try:
            self._work(subject, request)
        except TesseraError as raised:
            error = raised
            _LOGGER.warning("%s", raised)
        with self._changed:
            self._errors[subject], self._current = error, None
            self._changed.notify_all()
        return True
