"""Measures lag: input messages that the trainer has not read, and deltas that the store does not have."""

from collections.abc import Iterator
from itertools import chain

from models.bundle.bundle import Bundle
from serving.store.protocol import OnlineStore
from serving.store.writer import position_of
from streaming.log.protocol import EventLog, Message, Offsets, offset_in
from streaming.log.topics import Topics
from streaming.restore import group_of

# Up to this many offsets before the end, messages are counted one by one, since marks of transactions have offsets too.
_MARKS = 64


def inputs_behind(log: EventLog, bundle: Bundle, topics: Topics) -> dict[str, int | None]:
    """Returns the number of messages that the trainer has not read, by topic.

    The number is None if no trainer of the bundle has run.
    """
    inputs = (topics.items, topics.events)
    read = {topic: log.committed([topic], group=group_of(bundle, topic)) for topic in inputs}
    if not any(offset for positions in read.values() for offset in positions.values()):
        return dict.fromkeys(inputs)
    return {
        topic: sum(
            _behind(log, topic, positions.get((topic, number), 0), end, number)
            for number, end in log.end_offsets(topic).items()
        )
        for topic, positions in read.items()
    }


def deltas_behind(
    log: EventLog, store: OnlineStore, bundle: Bundle, topics: Topics
) -> tuple[int | None, Message | None]:
    """Returns the number of deltas that are not in the store, and the oldest of these deltas.

    The number is None if no writer has run.
    """
    start = position_of(store, bundle.id, topics.deltas)
    if start is None:
        return None, None
    found = ranges_behind(log, start, topics)
    oldest = min((first for _, first in found if first is not None), key=lambda one: one.timestamp_ms, default=None)
    return sum(count for count, _ in found), oldest


def ranges_behind(log: EventLog, start: Offsets, topics: Topics) -> list[tuple[int, Message | None]]:
    """Returns the number of deltas of each row range that a reader lacks, and the oldest of these deltas.

    Args:
        log: Log with the deltas.
        start: Position of the reader, as `position_of` gives that of a store.
        topics: Names of the topics.
    """
    return [
        _missing(log, topics.deltas, number, offset_in(start, number), end)
        for number, end in log.end_offsets(topics.deltas).items()
    ]


def _missing(log: EventLog, topic: str, partition: int, start: int, end: int) -> tuple[int, Message | None]:
    """Returns the number of messages from a position to the end of a partition, and the first of these messages."""
    missing: Iterator[Message] = iter(log.read(topic, partition, start, end)) if end > start else iter(())
    oldest = next(missing, None)
    if oldest is None:
        return 0, None
    return (end - start if end - start > _MARKS else sum(1 for _ in chain([oldest], missing))), oldest


def _behind(log: EventLog, topic: str, position: int, end: int, partition: int = 0) -> int:
    """Returns the number of messages from a position to the end of a partition."""
    if end - position > _MARKS or end <= position:
        return max(end - position, 0)
    return sum(1 for _ in log.read(topic, partition, position, end))
