"""The trainer: reads `items` and `events`, steps, and commits deltas, dead letters and positions as one.

Commit order of a micro-batch: (1) poll, (2) step in memory, (3) in one transaction append deltas and dead letters and
move both positions, (4) count. A crash before (3) leaves nothing behind; after it, nothing is missing. On start the
table is the bundle folded with its deltas, and histories and items come back from the inputs up to the committed
positions, sent through the same step without training.

One trainer owns a bundle's table: a second one takes over, and the first is fenced at its next commit.
"""

from dataclasses import dataclass

import numpy as np

from models import delta
from models.bundle import Bundle
from models.delta import SNAPSHOT_SEQ
from streaming.deadletter import encode_dead_letter
from streaming.log import EventLog, Message, Reader
from streaming.step import Step
from streaming.topic import Topics

_REPLAY = 1_024


@dataclass
class Totals:
    """Counts since the trainer started; messages = events + neutral + items + bad."""

    messages: int = 0
    events: int = 0
    neutral: int = 0
    items: int = 0
    bad: int = 0
    unknown_items: int = 0
    batches: int = 0


class Trainer:
    """Trains one bundle's table from the log.

    Args:
        log: the topics are created where absent.
        bundle: where the table starts.
        topics: their names.
        batch: messages a micro-batch takes at most from each topic.
        wait_s: how long a micro-batch waits to fill.
    """

    def __init__(
        self, log: EventLog, bundle: Bundle, *, topics: Topics, batch: int = 256, wait_s: float = 0.05
    ) -> None:
        self._log = log
        self._batch = batch
        self._wait_s = wait_s
        self.totals = Totals()
        self._topics = topics
        log.create_topics(topics.partitions())
        self.step = Step(bundle, topics)
        # Fencing the one before comes first: what is restored below is then final.
        self._transactor = log.transactor(f"trainer-{bundle.id}")
        self._readers: dict[str, Reader] = {}
        self._restore()
        for topic in (topics.items, topics.events):
            self._readers[topic] = log.reader([topic], group=_group(bundle, topic))

    def run_once(self, *, wait_s: float | None = None) -> int:
        """Does one micro-batch and returns how many messages it took; 0 when there were none in time.

        Raises:
            FencedError: another trainer has taken over this bundle's table.
            LogError: the log does not answer. State and log may differ now: start anew.
        """
        messages: list[Message] = []
        for topic, wait in (
            (self._topics.items, 0.0),
            (self._topics.events, self._wait_s if wait_s is None else wait_s),
        ):
            messages += self._readers[topic].poll(self._batch, wait)
        if not messages:
            return 0
        outcome = self.step.apply(messages)
        with self._transactor.begin() as transaction:
            for change in outcome.deltas:
                transaction.append(self._topics.deltas, delta.encode(change))
            for bad in outcome.bad:
                transaction.append(self._topics.dead_letters, encode_dead_letter(bad.message, bad.reason))
            for reader in self._readers.values():
                transaction.commit_offsets(reader)
        totals = self.totals
        totals.messages += len(messages)
        totals.events += outcome.events
        totals.neutral += outcome.neutral
        totals.items += outcome.items
        totals.bad += len(outcome.bad)
        totals.unknown_items += outcome.unknown_items
        totals.batches += 1
        return len(messages)

    def drained(self) -> bool:
        """Whether both topics are read to their ends."""
        return all(
            reader.position().get((topic, partition), 0) >= end
            for topic, reader in self._readers.items()
            for partition, end in self._log.end_offsets(topic).items()
        )

    def close(self) -> None:
        """Lets go of readers and transactor; what was committed stays."""
        for reader in self._readers.values():
            reader.close()
        self._transactor.close()

    def _restore(self) -> None:
        bundle, table = self.step.bundle, self.step.ranker.table
        seqs = np.full(bundle.schema.rows, SNAPSHOT_SEQ, dtype=np.int64)
        last, deltas = SNAPSHOT_SEQ, self._topics.deltas
        for message in self._log.read(deltas, 0, 0, self._log.end_offsets(deltas)[0]):
            change = delta.decode(message.value)
            if change.bundle == bundle.id:
                delta.fold(change, table.weight, table.accumulator, seqs)
                last = max(last, change.seq)
        for topic in (self._topics.items, self._topics.events):
            for (_, partition), stop in self._log.committed([topic], group=_group(bundle, topic)).items():
                pending: list[Message] = []
                for message in self._log.read(topic, partition, 0, stop):
                    pending.append(message)
                    if len(pending) == _REPLAY:
                        self.step.apply(pending, train=False)
                        pending = []
                self.step.apply(pending, train=False)
        self.step.seq = last


def _group(bundle: Bundle, topic: str) -> str:
    return f"trainer-{bundle.id}-{topic}"
