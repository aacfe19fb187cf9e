"""Impressions on their way to the log: behind the answers, in batches, and never in their way.

A request hands its impression over and goes on. A thread appends what has come; while the log is away it waits with
what it holds, and what no longer fits is counted as dropped, since answers matter more than their record.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence

from features.errors import TesseraError
from serving.metrics import Metrics
from serving.rollout.impression import Impression, Shadowed, encode
from serving.sink import Sink

_LOGGER = logging.getLogger(__name__)
_MOST, _BATCH, _WAIT_S, _PAUSE_S = 20_000, 500, 0.2, 0.5


class Recorder:
    """Takes impressions and appends them.

    Args:
        sink: the log.
        metrics: counts what was appended and dropped.
    """

    def __init__(self, sink: Sink, metrics: Metrics) -> None:
        self._sink = sink
        self._metrics = metrics
        self._queue: queue.Queue[Impression | Shadowed] = queue.Queue(_MOST)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
        self._thread.start()

    def put(self, message: Impression | Shadowed) -> None:
        """Hands a message over; returns at once."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._metrics.impressions.labels("dropped").inc()

    def close(self) -> None:
        """Appends what it holds, where the log takes it, and ends."""
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not (self._stop.is_set() and self._queue.empty()):
            batch = self._taken()
            while batch and not self._appended(batch):
                if self._stop.wait(_PAUSE_S):
                    # The log is away at the end: what it did not take is lost, and counted.
                    self._metrics.impressions.labels("dropped").inc(len(batch) + self._queue.qsize())
                    return

    def _taken(self) -> list[Impression | Shadowed]:
        batch: list[Impression | Shadowed] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_WAIT_S))
            while len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _appended(self, batch: Sequence[Impression | Shadowed]) -> bool:
        try:
            self._sink.append("impressions", [(one.id.encode(), encode(one)) for one in batch])
        except TesseraError as error:
            _LOGGER.warning("impressions wait: %s", error)
            return False
        except Exception:
            # The edge of a thread: it must outlast a batch that nothing can be done with, which is lost and counted.
            _LOGGER.exception("%d impressions are lost", len(batch))
            self._metrics.impressions.labels("dropped").inc(len(batch))
            return True
        self._metrics.impressions.labels("appended").inc(len(batch))
        return True
