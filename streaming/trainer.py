"""The trainer: reads `items` and `events`, steps, and commits deltas, dead letters and positions as one.

Commit order of a micro-batch: (1) poll, (2) step in memory, (3) in one transaction append deltas and dead letters and
move both positions, (4) count. A crash before (3) leaves nothing behind; after it, nothing is missing. On start the
table is the bundle folded with its deltas, and histories and items come back from the inputs up to the committed
positions, sent through the same step without training.

One trainer owns a bundle's table: a second one takes over, and the first is fenced at its next commit.
"""

import base64
from dataclasses import dataclass

import msgspec
import numpy as np

from features.error import EventError
from models import delta
from models.bundle import Bundle
from models.delta import SNAPSHOT_SEQ
from streaming.log import EventLog, Message, Reader
from streaming.step import Bad, Step

ITEMS, EVENTS, DELTAS, DEAD_LETTERS = "items", "events", "deltas", "deadletters"
_REPLAY = 1_024


def topics(partitions: int = 1) -> dict[str, int]:
    """The topics of the platform; deltas stay in one partition, since their order is the table's history."""
    return {ITEMS: partitions, EVENTS: partitions, DELTAS: 1, DEAD_LETTERS: 1}


class DeadLetter(msgspec.Struct, frozen=True):
    """What the topic `deadletters` holds, as JSON: where a message stood, why it was set aside, and its bytes."""

    topic: str
    partition: int
    offset: int
    reason: str
    value_base64: str

    @property
    def value(self) -> bytes:
        """The original message."""
        return base64.b64decode(self.value_base64)


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
        log: with the platform's topics; they are created where absent.
        bundle: where the table starts.
        batch: messages a micro-batch takes at most from each topic.
        wait_s: how long a micro-batch waits to fill.
    """

    def __init__(self, log: EventLog, bundle: Bundle, *, batch: int = 256, wait_s: float = 0.05) -> None:
        self._log = log
        self._batch = batch
        self._wait_s = wait_s
        self.totals = Totals()
        log.create_topics(topics())
        self.step = Step(bundle)
        # Fencing the one before comes first: what is restored below is then final.
        self._transactor = log.transactor(f"trainer-{bundle.id}")
        self._readers: dict[str, Reader] = {}
        self._restore()
        for topic in (ITEMS, EVENTS):
            self._readers[topic] = log.reader([topic], group=_group(bundle, topic))

    def run_once(self, *, wait_s: float | None = None) -> int:
        """Does one micro-batch and returns how many messages it took; 0 when there were none in time.

        Raises:
            FencedError: another trainer has taken over this bundle's table.
            LogError: the log does not answer. State and log may differ now: start anew.
        """
        messages: list[Message] = []
        for topic, wait in ((ITEMS, 0.0), (EVENTS, self._wait_s if wait_s is None else wait_s)):
            messages += self._readers[topic].poll(self._batch, wait)
        if not messages:
            return 0
        outcome = self.step.apply(messages)
        with self._transactor.begin() as transaction:
            for change in outcome.deltas:
                transaction.append(DELTAS, delta.encode(change))
            for bad in outcome.bad:
                transaction.append(DEAD_LETTERS, _dead_letter(bad))
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
        last = SNAPSHOT_SEQ
        for message in self._log.read(DELTAS, 0, 0, self._log.end_offsets(DELTAS)[0]):
            change = delta.decode(message.value)
            if change.bundle == bundle.id:
                delta.fold(change, table.weight, table.accumulator, seqs)
                last = max(last, change.seq)
        for topic in (ITEMS, EVENTS):
            for (_, partition), stop in self._log.committed([topic], group=_group(bundle, topic)).items():
                pending: list[Message] = []
                for message in self._log.read(topic, partition, 0, stop):
                    pending.append(message)
                    if len(pending) == _REPLAY:
                        self.step.apply(pending, train=False)
                        pending = []
                self.step.apply(pending, train=False)
        self.step.seq = last


def read_dead_letters(log: EventLog) -> list[DeadLetter]:
    """All dead letters, oldest first.

    Raises:
        EventError: the topic holds something else.
    """
    found = []
    for message in log.read(DEAD_LETTERS, 0, 0, log.end_offsets(DEAD_LETTERS)[0]):
        try:
            found.append(msgspec.json.decode(message.value, type=DeadLetter))
        except msgspec.DecodeError as error:
            raise EventError(f"{DEAD_LETTERS} offset {message.offset}: {error}") from error
    return found


def _group(bundle: Bundle, topic: str) -> str:
    return f"trainer-{bundle.id}-{topic}"


def _dead_letter(bad: Bad) -> bytes:
    message = bad.message
    value = base64.b64encode(message.value).decode()
    return msgspec.json.encode(DeadLetter(message.topic, message.partition, message.offset, bad.reason, value))
