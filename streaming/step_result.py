"""Result of a step on a batch: the deltas it caused, and the fate of each message."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from models.bundle.delta import Delta
from streaming.log.protocol import Message

POISON = "poison"
"""The cause of a message at which the step raises."""

Address = tuple[str, int, int]
"""Topic, partition and offset of a message."""


def address(message: Message) -> Address:
    """Address of a message."""
    return message.topic, message.partition, message.offset


@dataclass(frozen=True)
class Rejected:
    """Quarantined message: the kind of fault in one word, and its description."""

    message: Message
    cause: str
    reason: str


@dataclass
class StepResult:
    """Result of one step. messages = events + neutral + duplicates + items + deleted + stale + bad.

    Attributes:
        deltas: in order; at least one.
        payloads: the deltas as bytes for the log; none where nothing was trained.
        bad: messages for the dead letters.
        events: applied; neutral: valid, but neither positive nor negative by the dataset's rules.
        duplicates: events whose id was seen before.
        items: applied; deleted: tombstones applied; stale: item messages with a version that is not the newest.
        unknown_items: applied events whose item was not in the catalogue.
        labels, logits: (n,) of the examples trained on, as predicted before the update.
        transaction_s: how long the transaction took that committed this.
    """

    deltas: list[Delta] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    bad: list[Rejected] = field(default_factory=list)
    events: int = 0
    neutral: int = 0
    duplicates: int = 0
    items: int = 0
    deleted: int = 0
    stale: int = 0
    unknown_items: int = 0
    transaction_s: float = 0.0
    labels: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    logits: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
