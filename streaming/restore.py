"""Restores a step after a restart from a snapshot or the bundle, and from the log after it.

The table is folded with the deltas. Histories, items, admission and ids are computed again from the inputs: the same
step applies them without training, in the batches that the deltas name.
"""

import heapq
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import LogError
from models.bundle import delta, record
from models.bundle.bundle import Bundle
from models.bundle.delta import Delta, Source
from streaming.fold import CLOCKS_MS, first_deltas
from streaming.log.protocol import EventLog, Message, Offsets, Positions, ends_of, offset_in
from streaming.log.topics import Topics
from streaming.ranks.pins import Marks, await_step
from streaming.snapshot import Snapshot
from streaming.step import Step

_LOGGER = logging.getLogger(__name__)


def group_of(bundle: Bundle, topic: str) -> str:
    """Returns the name of the consumer group with which a bundle's trainer reads a topic."""
    return f"trainer-{bundle.id}-{topic}"


def input_topics(topics: Topics) -> tuple[str, str]:
    """Returns the input topics of a trainer, in the order in which a batch reads them."""
    return topics.items, topics.events


@dataclass(frozen=True)
class Start:
    """Start of a bundle's stream.

    Attributes:
        positions: Offset of the first message to apply, for every partition of the inputs.
        trained_until: Event time up to which the bundle was trained, as in `Step`. None if the positions alone separate
            new events from events of training.
    """

    positions: Positions
    trained_until: int | None


def start_of(log: EventLog, bundle: Bundle, topics: Topics) -> Start:
    """Finds the first messages that a bundle was not trained on.

    The start in each partition is the first of these that exists:

    1. The position that the bundle names, if the topic is the same topic from which the position was taken.
    2. For events, the first message that was appended less than an hour before the bundle's newest training event.
       The hour allows for clocks that differ.
    3. The oldest kept message.
    """
    positions: Positions = {}
    until = bundle.manifest.trained_until
    for topic in input_topics(topics):
        kept = log.offsets_at(topic, 0)
        named = [position for position in bundle.manifest.positions if position.topic == topic]
        identity = log.identity(topic) if named else ""
        valid = [position for position in named if position.identity == identity]
        if named and not valid:
            _LOGGER.warning(
                "%s: not the topic from which the bundle's positions were taken; the positions are not used", topic
            )
        begins = {position.partition: position.offset for position in valid}
        if topic == topics.events and valid and bundle.dataset.events.origin == "files":
            until = None
        elif topic == topics.events and until is not None:
            begins = log.offsets_at(topic, until // 1_000 - CLOCKS_MS)
        positions |= {(topic, number): max(begins.get(number, 0), oldest) for number, oldest in kept.items()}
    return Start(positions, until)


def restored(
    log: EventLog,
    topics: Topics,
    snapshot: Snapshot | None,
    step: Step,
    start: Positions,
    marks: Marks | None = None,
) -> tuple[Step, Positions]:
    """Advances a step from a snapshot, or from its bundle, to the last committed batch.

    Rows come from the partitions of the step's own row ranges. Inputs and records come from partition 0.

    The positions in the snapshot and the deltas decide, since each was committed together with its results. The
    positions of the consumer group only confirm these positions, since a log forgets a group that is idle for long.

    Args:
        log: Log of the inputs and the deltas.
        topics: Names of the topics.
        snapshot: Snapshot whose state the step has. None if the step has the state of its bundle.
        step: The step, which is changed.
        start: Offset of the first message to apply without a snapshot, for every partition of the inputs.
        marks: Last step that every row range has. None: the step has all row ranges.

    Returns:
        The step, and the offset after the last applied message of every partition of the inputs.

    Raises:
        LogError: Inputs before the group's positions have no delta, the deltas name inputs after these positions,
            deltas are no longer kept, or a topic was replaced.
    """
    bundle, read = step.bundle, input_topics(topics)
    with ThreadPoolExecutor(len(read), thread_name_prefix="committed") as pool:
        # The groups' positions are final, since the writer before is fenced. Each costs a connection of its own.
        committed = [pool.submit(log.committed, [topic], group=group_of(bundle, topic)) for topic in read]
        inputs = _advanced(log, topics, snapshot, step, start, marks)
    # If partition 0 has a step that some range lacks, the group's positions are after that step.
    if marks is None or marks.done[0] == marks.seq:
        for positions in committed:
            inputs.compare(positions.result())
    return step, inputs.positions


def _advanced(
    log: EventLog, topics: Topics, snapshot: Snapshot | None, step: Step, start: Positions, marks: Marks | None
) -> "_Inputs":
    """Advances a step to the last committed batch, as `restored`. Returns the inputs behind it."""
    bundle = step.bundle
    inputs = _Inputs(log, topics, start | (snapshot.inputs if snapshot is not None else {}))
    begin = snapshot.deltas if snapshot is not None else first_deltas(log, bundle, topics)
    own = step.seat.deal.own
    if marks is not None and (snapshot is None or snapshot.seq < marks.seq):
        await_step(log, topics.deltas, bundle.id, sorted({0, *own}), marks.seq)
    table, weight_seqs = step.ranker.table, step.seqs.copy()
    admitted: dict[int, list[NDArray[np.uint64]]] = {}
    for number, change in _changes(log, topics.deltas, begin, sorted({0, *own}), bundle.id):
        if change.seq <= (snapshot.seq if snapshot is not None else 0):
            continue
        if marks is not None and change.seq > marks.seq:
            break
        if number in own:
            delta.fold(change, table.weight, table.accumulator, weight_seqs, low=step.rows.low)
        if number > 0:
            continue
        for changed in change.records:
            # The log decides, since an earlier release may have admitted values by a different count.
            if changed.kind == record.ADMITTED:
                admitted.setdefault(change.seq, []).append(record.decode_admitted(changed.payload))
        if change.sources:
            step.seq = change.seq - 1
            step.apply(
                [message for source in change.sources for message in inputs.take(source)],
                train=False,
                poison=frozenset(change.poison),
                admitted=np.concatenate([np.zeros(0, dtype=np.uint64), *admitted.pop(change.seq, [])]),
            )
    step.seqs = weight_seqs
    return inputs


def _changes(
    log: EventLog, topic: str, begin: Offsets, partitions: list[int], bundle: str
) -> Iterator[tuple[int, Delta]]:
    """Yields the deltas of a bundle in some partitions, each with its partition, in the order of the steps."""

    def changes(partition: int, start: int, end: int) -> Iterator[tuple[int, Delta]]:
        for message in log.read(topic, partition, start, end):
            change = delta.decode(message.value)
            if change.bundle == bundle:
                yield partition, change

    ends = ends_of(log, topic)
    for number in partitions:
        if ends[number] < offset_in(begin, number):
            raise _shrunk(topic, number, ends[number], begin[number])
    streams = [changes(number, offset_in(begin, number), ends[number]) for number in partitions]
    yield from heapq.merge(*streams, key=lambda found: (found[1].seq, found[0]))


class _Inputs:
    """Inputs of past batches. Each partition is read once from start to end."""

    def __init__(self, log: EventLog, topics: Topics, start: Positions) -> None:
        self._log = log
        self.positions = dict(start)
        self._ends = {(topic, number): end for topic in input_topics(topics) for number, end in _ends(log, topic)}
        self._streams: dict[tuple[str, int], Iterator[Message]] = {}
        for partition, position in start.items():
            if self._ends.get(partition, 0) < position:
                raise _shrunk(*partition, self._ends.get(partition, 0), position)

    def take(self, source: Source) -> list[Message]:
        """Returns the messages of a source, which must begin after the previous source of the partition.

        Raises:
            LogError: The log does not have exactly these messages.
        """
        partition = (source.topic, source.partition)
        if source.last >= self._ends.get(partition, 0):
            raise _shrunk(*partition, self._ends.get(partition, 0), source.last + 1)
        if partition not in self._streams:
            self._streams[partition] = self._log.read(*partition, self.positions[partition], self._ends[partition])
        messages = []
        for message in self._streams[partition]:
            messages.append(message)
            if message.offset >= source.last:
                break
        if not messages or (messages[0].offset, messages[-1].offset) != (source.first, source.last):
            kept = f"{messages[0].offset} to {messages[-1].offset}" if messages else "none"
            raise LogError(
                f"{source.topic} partition {source.partition}: expected messages {source.first} to {source.last} of a "
                f"batch, found {kept}; the log has lost messages, or deltas were deleted"
            )
        self.positions[partition] = source.last + 1
        return messages

    def compare(self, committed: Positions) -> None:
        """Raises LogError if a message lies between the positions of the deltas and the positions of the group."""
        for (topic, number), stop in committed.items():
            position = self.positions[topic, number]
            left = self._between(topic, number, min(position, stop), max(position, stop))
            if left is not None and stop > position:
                raise LogError(
                    f"{topic} partition {number}: the group's position is {stop}, but no delta accounts for "
                    f"message {left.offset}; deltas were lost, or the group's position was moved"
                )
            if left is not None:
                raise LogError(
                    f"{topic} partition {number}: the group's position is {stop}, but the deltas account for messages "
                    f"up to {position - 1}; the group's position was moved: set it to {position}, or delete it"
                )

    def _between(self, topic: str, partition: int, start: int, stop: int) -> Message | None:
        """Returns the first kept message of a range. Marks of transactions have offsets too, and are no messages."""
        start = max(start, self._log.offsets_at(topic, 0)[partition]) if start < stop else stop
        return next(iter(self._log.read(topic, partition, start, stop)), None) if start < stop else None


def _ends(log: EventLog, topic: str) -> Iterable[tuple[int, int]]:
    return log.end_offsets(topic).items()


def _shrunk(topic: str, partition: int, end: int, expected: int) -> LogError:
    return LogError(
        f"{topic} partition {partition}: ends at {end}, but the snapshot or the deltas name messages up to "
        f"{expected - 1}; the topic was deleted or replaced"
    )
