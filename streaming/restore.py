"""Restores a step after a restart: from a snapshot, or the bundle, and the log since.

The table is folded with the deltas; histories, items, admission and ids come back by sending the inputs, cut into the
batches that the deltas name, through the same step without training.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import LogError
from models.bundle import delta, record
from models.bundle.bundle import Bundle
from models.bundle.delta import Source
from streaming.fresh_events import LATENESS_S
from streaming.log.protocol import EventLog, Message, Positions
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot
from streaming.step import Step

# Of `start_of`; not the stream's own bound, which may be another one at the next start.
_MARGIN_MS = LATENESS_S * 1_000
_LOGGER = logging.getLogger(__name__)


def group_of(bundle: Bundle, topic: str) -> str:
    """The group in whose name a bundle's trainer reads a topic."""
    return f"trainer-{bundle.id}-{topic}"


def input_topics(topics: Topics) -> tuple[str, str]:
    """Returns the input topics of a trainer, in the order in which a batch reads them."""
    return topics.items, topics.events


@dataclass(frozen=True)
class Start:
    """Start of a bundle's stream.

    Attributes:
        positions: in every partition of the inputs, the first message that is applied.
        trained_until: see `Step`; None where the positions alone say what the bundle has seen.
    """

    positions: Positions
    trained_until: int | None


def start_of(log: EventLog, bundle: Bundle, topics: Topics) -> Start:
    """Finds the first messages that a bundle was not trained on.

    The bundle names positions, which count on the very topics they were taken from. Else the time of its newest
    training event decides for events: what was appended more than an hour before that time was in the files, and an
    hour is left for clocks that differ. Without either, and for items, the stream begins at the oldest message.
    """
    positions: Positions = {}
    until = bundle.manifest.trained_until
    for topic in input_topics(topics):
        kept = log.offsets_at(topic, 0)
        named = [place for place in bundle.manifest.positions if place.topic == topic]
        identity = log.identity(topic) if named else ""
        own = [place for place in named if place.identity == identity]
        if named and not own:
            _LOGGER.warning(
                "%s: another topic than the one from which the bundle's positions were taken; they are not used", topic
            )
        begins = {place.partition: place.offset for place in own}
        if topic == topics.events and own:
            until = None
        elif topic == topics.events and until is not None:
            begins = log.offsets_at(topic, until // 1_000 - _MARGIN_MS)
        positions |= {(topic, part): max(begins.get(part, 0), first) for part, first in kept.items()}
    return Start(positions, until)


def restored(
    log: EventLog, topics: Topics, snapshot: Snapshot | None, step: Step, start: Positions
) -> tuple[Step, Positions]:
    """Brings a step from a snapshot, or from its bundle, to the last committed batch.

    Positions in snapshot and deltas are the truth: they were committed with what follows from the messages before
    them. The group's positions can only confirm them, since a log forgets a group that is quiet for long.

    Returns:
        The step, and the position behind the last message that it has seen in every partition of the inputs.

    Raises:
        LogError: the deltas do not account for all inputs before the group's positions, or for more than those, or
            are no longer kept; or a topic is another one than before.
    """
    bundle = step.bundle
    inputs = _Inputs(log, topics, start | (snapshot.inputs if snapshot is not None else {}))
    begin = snapshot.deltas if snapshot is not None else 0
    end = log.end_offsets(topics.deltas)[0]
    if end < begin:
        raise _shrunk(topics.deltas, 0, end, begin)
    table, weight_seqs = step.ranker.table, step.seqs.copy()
    admitted: dict[int, list[NDArray[np.uint64]]] = {}
    for message in log.read(topics.deltas, 0, begin, end):
        change = delta.decode(message.value)
        if change.bundle != bundle.id or change.seq <= (snapshot.seq if snapshot is not None else 0):
            continue
        delta.fold(change, table.weight, table.accumulator, weight_seqs)
        for found in change.records:
            # The log decides: an earlier release may have admitted by another count.
            if found.kind == record.ADMITTED:
                admitted.setdefault(change.seq, []).append(record.decode_admitted(found.payload))
        if change.sources:
            step.seq = change.seq - 1
            step.apply(
                [found for source in change.sources for found in inputs.take(source)],
                train=False,
                poison=frozenset(change.poison),
                admitted=np.concatenate([np.zeros(0, dtype=np.uint64), *admitted.pop(change.seq, [])]),
            )
    step.seqs = weight_seqs
    for topic in input_topics(topics):
        inputs.compare(log.committed([topic], group=group_of(bundle, topic)))
    return step, inputs.positions


class _Inputs:
    """The inputs of past batches, read once from start to end."""

    def __init__(self, log: EventLog, topics: Topics, start: Positions) -> None:
        self._log = log
        self.positions = dict(start)
        self._ends = {(topic, part): end for topic in input_topics(topics) for part, end in _ends(log, topic)}
        self._streams: dict[tuple[str, int], Iterator[Message]] = {}
        for place, at in start.items():
            if self._ends.get(place, 0) < at:
                raise _shrunk(*place, self._ends.get(place, 0), at)

    def take(self, source: Source) -> list[Message]:
        """The messages of one source, which must begin where the one before it ended."""
        place = (source.topic, source.partition)
        if source.last >= self._ends.get(place, 0):
            raise _shrunk(*place, self._ends.get(place, 0), source.last + 1)
        if place not in self._streams:
            self._streams[place] = self._log.read(*place, self.positions[place], self._ends[place])
        found = []
        for message in self._streams[place]:
            found.append(message)
            if message.offset >= source.last:
                break
        if not found or (found[0].offset, found[-1].offset) != (source.first, source.last):
            raise LogError(
                f"{source.topic} partition {source.partition}: expected messages {source.first} to {source.last} of a "
                f"batch, found {found[0].offset if found else 'none'} to {found[-1].offset if found else 'none'}; "
                "the log has lost some, or somebody has deleted deltas"
            )
        self.positions[place] = source.last + 1
        return found

    def compare(self, committed: Positions) -> None:
        """Raises LogError when messages lie between the positions of the deltas and those of the group."""
        for place, stop in committed.items():
            at = self.positions[place]
            left = self._between(place, min(at, stop), max(at, stop))
            if left is not None and stop > at:
                raise LogError(
                    f"{place[0]} partition {place[1]}: the group's position is {stop}, but no delta accounts for "
                    f"message {left.offset}; the deltas were lost, or somebody has moved the position"
                )
            if left is not None:
                raise LogError(
                    f"{place[0]} partition {place[1]}: the group's position is {stop}, but the deltas account for "
                    f"messages up to {at - 1}; somebody has moved the position: put it back to {at}, or delete it"
                )

    def _between(self, place: tuple[str, int], start: int, stop: int) -> Message | None:
        """The first kept message of a range; marks of transactions take offsets too, and are no messages."""
        start = max(start, self._log.offsets_at(place[0], 0)[place[1]]) if start < stop else stop
        return next(iter(self._log.read(*place, start, stop)), None) if start < stop else None


def _ends(log: EventLog, topic: str) -> Iterable[tuple[int, int]]:
    return log.end_offsets(topic).items()


def _shrunk(topic: str, partition: int, end: int, expected: int) -> LogError:
    return LogError(
        f"{topic} partition {partition}: ends at {end}, but snapshot and deltas know of messages up to {expected - 1}; "
        "the topic was deleted, or is another one"
    )
