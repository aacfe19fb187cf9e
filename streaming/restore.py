"""How a step comes back after a restart: a snapshot, or the bundle, and what the log holds since.

The table is folded with the deltas; histories, items, admission and ids come back by sending the inputs, cut into the
batches that the deltas name, through the same step without training.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from features.error import LogError
from models import delta, record
from models.bundle import Bundle
from models.delta import Source
from streaming.log import EventLog, Message, Positions
from streaming.snapshot import Snapshot
from streaming.step import Step
from streaming.topic import Topics


def group_of(bundle: Bundle, topic: str) -> str:
    """The group in whose name a bundle's trainer reads a topic."""
    return f"trainer-{bundle.id}-{topic}"


def input_topics(topics: Topics) -> tuple[str, str]:
    """What a trainer reads, in the order in which a batch takes them."""
    return topics.items, topics.events


def restored(log: EventLog, topics: Topics, snapshot: Snapshot | None, step: Step) -> Step:
    """Brings a step from a snapshot, or from its bundle, to the last committed batch.

    Raises:
        LogError: the deltas do not account for all inputs before the committed positions, or are no longer kept.
    """
    bundle = step.bundle
    committed: Positions = {}
    for topic in input_topics(topics):
        committed |= log.committed([topic], group=group_of(bundle, topic))
    inputs = _Inputs(log, snapshot.inputs if snapshot is not None else {}, committed)
    start = snapshot.deltas if snapshot is not None else 0
    table, weight_seqs = step.ranker.table, step.seqs.copy()
    admitted: dict[int, NDArray[np.uint64]] = {}
    for message in log.read(topics.deltas, 0, start, log.end_offsets(topics.deltas)[0]):
        change = delta.decode(message.value)
        if change.bundle != bundle.id or change.seq <= (snapshot.seq if snapshot is not None else 0):
            continue
        delta.fold(change, table.weight, table.accumulator, weight_seqs)
        for found in change.records:
            # The log decides: an earlier release may have admitted by another count.
            if found.kind == record.ADMITTED:
                admitted[change.seq] = record.decode_admitted(found.payload)
        if change.sources:
            step.seq = change.seq - 1
            step.apply(
                [found for source in change.sources for found in inputs.take(source)],
                train=False,
                poison=frozenset(change.poison),
                admitted=admitted.pop(change.seq, np.zeros(0, dtype=np.uint64)),
            )
    step.seqs = weight_seqs
    inputs.check_end()
    return step


class _Inputs:
    """The inputs of past batches, read once from start to end."""

    def __init__(self, log: EventLog, start: Positions, committed: Positions) -> None:
        self._log = log
        self._at = {place: start.get(place, 0) for place in committed}
        self._committed = committed
        self._streams: dict[tuple[str, int], Iterator[Message]] = {}

    def take(self, source: Source) -> list[Message]:
        """The messages of one source, which must begin where the one before it ended."""
        place = (source.topic, source.partition)
        if source.last >= self._committed.get(place, 0):
            raise LogError(
                f"{source.topic} partition {source.partition}: the deltas are made of messages up to {source.last}, "
                f"but the group's position is {self._committed.get(place, 0)}; somebody has moved it: put it back"
            )
        if place not in self._streams:
            self._streams[place] = self._log.read(*place, self._at[place], self._committed[place])
        found = []
        for message in self._streams[place]:
            found.append(message)
            if message.offset >= source.last:
                break
        if not found or (found[0].offset, found[-1].offset) != (source.first, source.last):
            raise LogError(
                f"{source.topic} partition {source.partition}: expected messages {source.first} to {source.last} of a "
                f"batch, found {found[0].offset if found else 'none'} to {found[-1].offset if found else 'none'}; "
                "the log has lost some, or somebody has moved the group's position"
            )
        self._at[place] = source.last + 1
        return found

    def check_end(self) -> None:
        """Raises LogError when there are messages before the committed positions that no batch took."""
        for place, stop in self._committed.items():
            left = next(iter(self._log.read(*place, self._at[place], stop)), None) if self._at[place] < stop else None
            if left is not None:
                raise LogError(
                    f"{place[0]} partition {place[1]}: the group's position is {stop}, but no delta accounts for "
                    f"message {left.offset}; the deltas were lost, or somebody has moved the position"
                )
