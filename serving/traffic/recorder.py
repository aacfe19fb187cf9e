"""Appends messages to the log in the background, in batches, so that answers do not wait for the log.

A request queues its message and continues. A thread appends the queued messages. While the log is unavailable, the
thread waits and the queue grows to a limit. Messages beyond the limit are dropped and counted, since answers are more
important than their records.
"""

import contextlib
import queue
from collections.abc import Callable
from typing import Generic, TypeVar

from prometheus_client import Counter

from features.errors import TesseraError
from features.shown.message import Impression, Shadowed, encode
from serving.background import Background, Rounds
from serving.metrics import Metrics
from serving.sink import Kind, Sink

_MOST, _BATCH, _WAIT_S, _PAUSE_S = 20_000, 500, 0.2, 0.5
Queued = TypeVar("Queued")


class Appender(Generic[Queued]):
    """Appends queued messages of one kind to the log in the background.

    Args:
        sink: Appends to the log.
        kind: Kind of the messages.
        message: Returns key and payload of a queued message. Called in the thread.
        metrics: Counts failed rounds.
        counter: Counts messages by the labels `appended` and `dropped`.
        most: Largest number of queued messages.
        batch: Largest number of messages that are appended together.
    """

    def __init__(
        self,
        sink: Sink,
        kind: Kind,
        message: Callable[[Queued], tuple[bytes, bytes]],
        metrics: Metrics,
        *,
        counter: Counter,
        most: int = _MOST,
        batch: int = _BATCH,
    ) -> None:
        self._sink = sink
        self._kind: Kind = kind
        self._message = message
        self._counter = counter
        self._most_at_once = batch
        self._queue: queue.Queue[Queued] = queue.Queue(most)
        # Messages that left the queue and are not appended yet.
        self._batch: list[Queued] = []
        rounds = Rounds(kind, f"{kind} wait", metrics)
        self._worker = Background(
            kind, lambda stop: self._append(), rounds, every_s=0.0, after_failure_s=_PAUSE_S, at_once=True
        )

    @property
    def waiting(self) -> int:
        """Number of messages in the queue."""
        return self._queue.qsize()

    def put(self, message: Queued) -> None:
        """Queues a message and returns at once."""
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._counter.labels("dropped").inc()

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
            self._counter.labels("dropped").inc(left)

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
            self._sink.append(self._kind, [self._message(message) for message in self._batch])
            outcome = "appended"
        except TesseraError:
            outcome = ""
            raise
        finally:
            if outcome:
                self._counter.labels(outcome).inc(len(self._batch))
                self._batch = []

    def _next_batch(self) -> list[Queued]:
        batch: list[Queued] = []
        with contextlib.suppress(queue.Empty):
            batch.append(self._queue.get(timeout=_WAIT_S))
            while len(batch) < self._most_at_once:
                batch.append(self._queue.get_nowait())
        return batch


class Recorder(Appender[Impression | Shadowed]):
    """Appends impressions to the log in the background.

    Args:
        sink: Appends to the log.
        metrics: Counts appended and dropped impressions.
    """

    def __init__(self, sink: Sink, metrics: Metrics) -> None:
        super().__init__(
            sink,
            "impressions",
            lambda message: (message.id.encode(), encode(message)),
            metrics,
            counter=metrics.impressions,
        )
