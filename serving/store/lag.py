"""Measures lag: input messages the trainer has not read, and deltas the store does not have."""

from collections.abc import Iterator
from itertools import chain

from models.bundle.bundle import Bundle
from serving.store.protocol import OnlineStore
from serving.store.writer import position_of
from streaming.log.protocol import EventLog, Message
from streaming.log.topics import Topics
from streaming.restore import group_of

# So near to the end messages are counted: marks of transactions take offsets too, and are no messages.
_MARKS = 64


def inputs_behind(log: EventLog, bundle: Bundle, topics: Topics) -> dict[str, int | None]:
    """Messages that the trainer has not taken in, by topic; None where no trainer of the bundle has run."""
    inputs = (topics.items, topics.events)
    read = {topic: log.committed([topic], group=group_of(bundle, topic)) for topic in inputs}
    if not any(at for positions in read.values() for at in positions.values()):
        return dict.fromkeys(inputs)
    return {
        topic: sum(
            _behind(log, topic, at.get((topic, part), 0), end, part) for part, end in log.end_offsets(topic).items()
        )
        for topic, at in read.items()
    }


def deltas_behind(
    log: EventLog, store: OnlineStore, bundle: Bundle, topics: Topics
) -> tuple[int | None, Message | None]:
    """Changes that are not in the store, and the oldest of them; None where no writer has run."""
    start = position_of(store, bundle.id, topics.deltas)
    if start is None:
        return None, None
    end = log.end_offsets(topics.deltas)[0]
    missing: Iterator[Message] = iter(log.read(topics.deltas, 0, start, end)) if end > start else iter(())
    oldest = next(missing, None)
    if oldest is None:
        return 0, None
    return (end - start if end - start > _MARKS else sum(1 for _ in chain([oldest], missing))), oldest


def _behind(log: EventLog, topic: str, position: int, end: int, partition: int = 0) -> int:
    """Messages from a position on."""
    if end - position > _MARKS or end <= position:
        return max(end - position, 0)
    return sum(1 for _ in log.read(topic, partition, position, end))
