"""Repeated work of a server's thread: it survives every error, and reports when it fails."""

import contextlib
import logging
import threading
from collections.abc import Iterator

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
