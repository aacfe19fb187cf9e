"""Result of a step on a batch: the deltas, and the number of messages by outcome."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.bundle.delta import Delta
from streaming.forget.removal import Removed
from streaming.log.protocol import Message

POISON = "poison"
"""Cause of a rejected message at which the step raises."""

Address = tuple[str, int, int]
"""Topic, partition and offset of a message."""


def address(message: Message) -> Address:
    """Returns the topic, the partition and the offset of a message."""
    return message.topic, message.partition, message.offset


@dataclass(frozen=True)
class Rejected:
    """Quarantined message.

    Attributes:
        message: The message as it is in the log. Of an Arrow batch, a message with the rejected rows alone.
        cause: Kind of the fault, in one word.
        reason: Description of the fault.
        rows: Number of rejected rows, 1 if the message cannot be read.
    """

    message: Message
    cause: str
    reason: str
    rows: int = 1


@dataclass
class StepResult:
    """Result of one step. rows = events + neutral + duplicates + items + deleted + stale + forgotten + rejected.

    A message of the log is one row. An Arrow batch has as many rows as it holds.

    Attributes:
        deltas: Deltas of the batch, in order. A step that trains writes at least one delta.
        payloads: Deltas as bytes for the log. Empty if the step did not train.
        ranges: Number of the row range of each delta.
        bad: Rejected messages, which the trainer appends to the dead letters. `rejected` counts their rows.
        events: Number of applied events.
        neutral: Number of valid events that are neither positive nor negative by the dataset's label rule.
        duplicates: Number of events whose id was seen before, or that the bundle was trained on.
        items: Number of applied item messages.
        deleted: Number of applied tombstones.
        stale: Number of item messages whose version is not newer than the applied version.
        forgotten: Number of tombstones of users, of blank messages, and of events of forgotten users.
        removed: Users that the batch removed.
        unknown_items: Number of applied events whose item was not in the catalogue.
        transaction_s: Duration of the transaction that committed the batch, seconds.
        labels: (n,) labels of the examples that the step trained on; of several tasks the judged task's, NaN where
            unknown.
        logits: (n,) logits of these examples before the update.
    """

    deltas: list[Delta] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    ranges: list[int] = field(default_factory=list)
    bad: list[Rejected] = field(default_factory=list)
    events: int = 0
    neutral: int = 0
    duplicates: int = 0
    items: int = 0
    deleted: int = 0
    stale: int = 0
    forgotten: int = 0
    removed: list[Removed] = field(default_factory=list)
    unknown_items: int = 0
    transaction_s: float = 0.0
    labels: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    logits: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))

    @property
    def rejected(self) -> int:
        """Number of rejected rows."""
        return sum(rejected.rows for rejected in self.bad)

    @property
    def rows(self) -> int:
        """Number of rows of the batch."""
        counted = (self.events, self.neutral, self.duplicates, self.items, self.deleted, self.stale, self.forgotten)
        return sum(counted) + self.rejected
