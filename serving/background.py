"""Repeats work in a thread while a server runs. The work outlasts every error, and the record says when it fails."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from features.errors import TesseraError
from serving.metrics import Metrics

_LOGGER = logging.getLogger(__name__)
MOST_MISSES = 8
"""Failures in a row after which the work counts as broken."""


class Rounds:
    """Record of the rounds of one part of a server.

    Args:
        part: Label of the part in the metrics.
        what: Beginning of its lines in the log, such as "new items could not be read".
        metrics: Counts failures.
    """

    def __init__(self, part: str, what: str, metrics: Metrics) -> None:
        self._part = part
        self._what = what
        self._metrics = metrics
        self._lock = threading.Lock()
        self._misses = 0
        self.error: Exception | None = None

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Runs one round: an error of the body is counted and logged, and is not raised."""
        try:
            yield
        except Exception as error:
            # The edge of a thread: an error that left it would end the work silently.
            self._missed(error)
        else:
            self.well()

    def well(self) -> None:
        """Records a round without an error."""
        with self._lock:
            misses, self._misses, self.error = self._misses, 0, None
        if misses:
            _LOGGER.info("%s: well again after %d failures", self._part, misses)

    @property
    def broken(self) -> bool:
        """True if the last `MOST_MISSES` rounds failed, every one."""
        return self._misses >= MOST_MISSES

    def _missed(self, error: Exception) -> None:
        with self._lock:
            self._misses, self.error = self._misses + 1, error
            first = self._misses == 1
        self._metrics.background_failures.labels(self._part).inc()
        if not first:
            return
        if isinstance(error, TesseraError):
            _LOGGER.warning("%s: %s", self._what, error)
        else:
            _LOGGER.error("%s: %s: %s", self._what, type(error).__name__, error, exc_info=error)


class Background:
    """Repeats a piece of work in a thread until it is closed.

    If a round raises, the record counts and logs the failure, and the next round follows.

    Attributes:
        rounds: Record of the rounds.

    Args:
        name: Name of the thread.
        work: Does one round. A long round must end soon after the event that it is given is set.
        rounds: Record of the rounds.
        every_s: Seconds between a round and the next.
        after_failure_s: Seconds between a round that failed and the next. None: `every_s`.
        at_once: True if the first round starts now, False if it starts after `every_s`.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[threading.Event], object],
        rounds: Rounds,
        *,
        every_s: float,
        after_failure_s: float | None = None,
        at_once: bool = False,
    ) -> None:
        self.rounds = rounds
        self._work = work
        self._every_s = every_s
        self._after_failure_s = every_s if after_failure_s is None else after_failure_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(at_once,), name=name, daemon=True)
        self._thread.start()

    def close(self, wait_s: float | None = None) -> bool:
        """Ends after the current round; returns True if the thread has ended.

        Args:
            wait_s: Longest wait for the current round, in seconds. None: no limit.
        """
        self._stop.set()
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self, at_once: bool) -> None:
        if not at_once:
            self._stop.wait(self._every_s)
        while not self._stop.is_set():
            with self.rounds.round():
                self._work(self._stop)
            self._stop.wait(self._every_s if self.rounds.error is None else self._after_failure_s)
