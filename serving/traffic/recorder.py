"""Impressions on their way to the log: behind the answers, in batches, and never in their way.

A request hands its impression over and goes on. A thread appends what has come; while the log is away it waits with
what it holds, and what no longer fits is counted as dropped, since answers matter more than their record.
"""

import contextlib
import queue

from features.errors import TesseraError
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.rollout.impression import Impression, Shadowed, encode
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
        # Taken from the queue, and not appended yet.
        self._batch: list[Impression | Shadowed] = []
        rounds = Rounds("impressions", "impressions wait", metrics)
        self._worker = Background(
            "impressions", lambda stop: self._append(), rounds, every_s=0.0, after_failure_s=_PAUSE_S, at_once=True
        )

    def put(self, message: Impression | Shadowed) -> None:
        """Queues a message; returns at once."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._metrics.impressions.labels("dropped").inc()

    def close(self) -> None:
        """Appends the queued messages, and ends. If the log is unavailable, they are dropped and counted."""
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
        self._batch = self._batch or self._taken()
        if not self._batch:
            return
        outcome = "dropped"
        try:
            self._sink.append("impressions", [(one.id.encode(), encode(one)) for one in self._batch])
            outcome = "appended"
        except TesseraError:
            outcome = ""
            raise
        finally:
            if outcome:
                self._metrics.impressions.labels(outcome).inc(len(self._batch))
                self._batch = []

    def _taken(self) -> list[Impression | Shadowed]:
        batch: list[Impression | Shadowed] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_WAIT_S))
            while len(batch) < _BATCH:
                batch.append(self._queue.get_nowait())
        return batch
