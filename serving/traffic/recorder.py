"""Appends impressions to the log in the background, in batches, so that answers do not wait for the log.

A request queues its impression and continues. A thread appends the queued impressions. While the log is unavailable,
the thread waits and the queue grows to a limit. Impressions beyond the limit are dropped and counted, since answers are
more important than their records.
"""

import contextlib
import queue

from features.errors import TesseraError
from features.shown.message import Impression, Shadowed, encode
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.sink import Sink

_MOST, _BATCH, _WAIT_S, _PAUSE_S = 20_000, 500, 0.2, 0.5


class Recorder:
    """Appends impressions to the log in the background.

    Args:
        sink: Appends to the log.
        metrics: Counts appended and dropped impressions.
    """

    def __init__(self, sink: Sink, metrics: Metrics) -> None:
        self._sink = sink
        self._metrics = metrics
        self._queue: queue.Queue[Impression | Shadowed] = queue.Queue(_MOST)
        # Messages that left the queue and are not appended yet.
        self._batch: list[Impression | Shadowed] = []
        rounds = Rounds("impressions", "impressions wait", metrics)
        self._worker = Background(
            "impressions", lambda stop: self._append(), rounds, every_s=0.0, after_failure_s=_PAUSE_S, at_once=True
        )

    def put(self, message: Impression | Shadowed) -> None:
        """Queues a message and returns at once."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._metrics.impressions.labels("dropped").inc()

    def close(self) -> None:
        """Appends the queued messages and ends the thread. If the log is unavailable, they are dropped and counted."""
        if not self._worker.close(10):
            return
        rounds = self._worker.rounds
        while self._batch or not self._queue.empty():
            with rounds.round():
                self._append()
            if isinstance(rounds.error, TesseraError):
                break
        if left := len(self._batch) + self._queue.qsize():
            self._metrics.impressions.labels("dropped").inc(left)

    def _append(self) -> None:
        """Appends the next batch.

        Raises:
            TesseraError: The log is unavailable. The batch is kept for the next call.
            Exception: The batch cannot be appended at all. It is dropped and counted.
        """
        self._batch = self._batch or self._next_batch()
        if not self._batch:
            return
        outcome = "dropped"
        try:
            self._sink.append("impressions", [(message.id.encode(), encode(message)) for message in self._batch])
            outcome = "appended"
        except TesseraError:
            outcome = ""
            raise
        finally:
            if outcome:
                self._metrics.impressions.labels(outcome).inc(len(self._batch))
                self._batch = []

    def _next_batch(self) -> list[Impression | Shadowed]:
        batch: list[Impression | Shadowed] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_WAIT_S))
            while len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
        return batch
