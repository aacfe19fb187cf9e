"""The fold of the log: computes the table and the records at an offset. All processes get the same result.

    table at offset n = snapshot ⊕ deltas[..n]

Each row range has a partition of the deltas, and n is one offset for each partition. Rows of different ranges are
different rows, so the order between partitions changes nothing.

`tessera verify` compares a store with the fold. `tessera replay` fills a store from the fold.
"""

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import LogError
from features.shown.consumed import HEAD
from features.value.forgotten import hashed
from models.bundle import aggregate_record, delta, record
from models.bundle.bundle import Bundle
from models.bundle.delta import SNAPSHOT_SEQ, Delta, Record
from streaming.fresh_events import LATENESS_S
from streaming.log.protocol import EventLog, Message, Offsets, ends_of, offset_in
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot

CLOCKS_MS = LATENESS_S * 1_000
"""Margin for clocks that differ, milliseconds. The margin is constant, since the stream's lateness may differ at the
next start."""


def first_deltas(log: EventLog, bundle: Bundle, topics: Topics) -> Offsets:
    """Returns an offset in each partition of the deltas' topic before which no delta of the bundle lies.

    A bundle has no delta before it exists. The offset is the first of these that is known:

    1. The position that the bundle names, if the topic is the same topic from which the position was taken.
    2. The first message that was appended less than an hour before the bundle's newest training event. The hour allows
       for clocks that differ.
    3. The start of the topic.
    """
    topic, until = topics.deltas, bundle.manifest.trained_until
    named = [position for position in bundle.manifest.positions if position.topic == topic]
    if named and named[0].identity == log.identity(topic):
        found = {position.partition: position.offset for position in named}
    elif until is not None:
        kept = log.offsets_at(topic, 0)
        # If the oldest kept delta is new enough, older deltas of the bundle may have been deleted: a reader that starts
        # at 0 is told so.
        later = log.offsets_at(topic, max(1, until // 1_000 - CLOCKS_MS))
        found = {number: offset for number, offset in later.items() if offset > kept[number]}
    else:
        found = {}
    return tuple(found.get(number, 0) for number in range(max(found, default=-1) + 1))


class Fold:
    """Rows and records of one bundle, folded from the bundle's deltas.

    Attributes:
        seqs: (R,) int64 sequence numbers of the rows.
        records: Sequence number and payload of the newest record, by kind and id. Without the records of forgotten
            users, but with one record of each forgotten user.
        removed: Sequence number of the last removal of a record, by kind and id.
        position: Offset of the next message to read in each partition of the deltas' topic.
        behind: Offset after the bundle's last delta in each partition. `position` may be larger, since marks of
            transactions have offsets too.
        seq: Sequence number of the last micro-batch.

    Args:
        log: Log to which the trainer writes.
        bundle: Bundle whose published state the fold starts with.
        topics: Names of the topics.
        snapshot: Snapshot of the bundle. If given, the fold starts with the snapshot's state.
    """

    def __init__(self, log: EventLog, bundle: Bundle, topics: Topics, snapshot: Snapshot | None = None) -> None:
        self._log = log
        self._bundle = bundle.id
        self._topic = topics.deltas
        self._weight = torch.from_numpy(bundle.rows().copy())
        self._accumulator = torch.zeros(len(self._weight))
        self.seqs: NDArray[np.int64] = np.full(len(self._weight), SNAPSHOT_SEQ, dtype=np.int64)
        self.records: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.removed: dict[tuple[str, str], int] = {}
        self.position = first_deltas(log, bundle, topics) if snapshot is None else snapshot.deltas
        self.behind: Offsets = ()
        self.seq = SNAPSHOT_SEQ
        for name, history in record.published_histories(bundle):
            self.records[record.HISTORY, name] = (SNAPSHOT_SEQ, record.encode(history))
        consumed, users = record.published_consumed(bundle)
        for kind, name, payload in consumed.all_records(users):
            self.records[kind, name] = (SNAPSHOT_SEQ, payload)
        for published in aggregate_record.state_records(bundle.aggregates()):
            self.records[published.kind, published.id] = (SNAPSHOT_SEQ, published.payload)
        if snapshot is not None:
            self._weight = torch.from_numpy(snapshot.arrays["weight"].copy())
            self.seqs = snapshot.arrays["seqs"].copy()
            for removed, seq in snapshot.memory.removed.items():
                self._remove(aggregate_record.AGGREGATE, removed, seq)
            for user in snapshot.memory.forgotten:
                forgotten = record.ForgottenRecord(user.request.salt, user.request.at_us)
                self._forget(Record(record.FORGOTTEN, user.request.user, record.encode(forgotten)), user.seq)
            for newest in snapshot.records(bundle):
                self.records[newest.kind, newest.id] = (snapshot.seq, newest.payload)
            self.seq = snapshot.seq

    @property
    def weight(self) -> NDArray[np.float32]:
        """Rows of the table, (R, D) float32."""
        return self._weight.numpy()

    def advance(self) -> int:
        """Folds all deltas that the log has now. Returns the number of folded deltas.

        Raises:
            LogError: Deltas after `position` are no longer kept, or the topic was replaced.
        """
        return sum(1 for _ in self.steps())

    def steps(self) -> Iterator[tuple[Message, Delta]]:
        """Yields each delta that the log has now, with its message, and folds the delta when the caller continues.

        While the caller has a delta, the state is that before the delta.

        Raises:
            LogError: As in `advance`.
        """
        stop = ends_of(self._log, self._topic)
        for message, change in self._deltas(stop):
            yield message, change
            delta.fold(change, self._weight, self._accumulator, self.seqs)
            for changed in aggregate_record.expanded(change.records):
                if changed.kind == record.CHANGED:
                    continue
                if changed.kind == record.FORGOTTEN:
                    self._forget(changed, change.seq)
                elif change.seq >= self.records.get((changed.kind, changed.id), (SNAPSHOT_SEQ, b""))[0]:
                    self.records[changed.kind, changed.id] = (change.seq, changed.payload)
            self.seq = max(self.seq, change.seq)
        self.position = stop

    def forgotten(self) -> dict[tuple[str, str], int]:
        """Returns the sequence number of each user's removal, by hash and salt of the user's id."""
        found = {}
        for (kind, name), (seq, payload) in self.records.items():
            if kind == record.FORGOTTEN:
                found[name, record.decode_forgotten_record(payload).salt] = seq
        return found

    def _forget(self, changed: Record, seq: int) -> None:
        forgotten = record.decode_forgotten_record(changed.payload)
        users = [forgotten.user] if forgotten.user else []
        if not users:
            users = [name for name in self._users() if hashed(name, forgotten.salt) == changed.id]
            for kind, name in [key for key in self.records if record.consumed_user(*key) in users]:
                self._remove(kind, name, seq)
        for user in users:
            self._remove(record.HISTORY, user, seq)
            for kind, names in forgotten.consumed(user).items():
                for name in names:
                    self._remove(kind, name, seq)
        for name in forgotten.aggregates:
            self._remove(aggregate_record.AGGREGATE, name, seq)
        if seq >= self.records.get((record.FORGOTTEN, changed.id), (SNAPSHOT_SEQ, b""))[0]:
            self.records[record.FORGOTTEN, changed.id] = (seq, forgotten.anonymous())

    def _users(self) -> set[str]:
        """Returns the users that records name."""
        return {name for kind, name in self.records if kind in (record.HISTORY, HEAD)}

    def _remove(self, kind: str, name: str, seq: int) -> None:
        """Removes a record that is older than a sequence number."""
        self.removed[kind, name] = max(seq, self.removed.get((kind, name), seq))
        if self.records.get((kind, name), (seq, b""))[0] < seq:
            del self.records[kind, name]

    def _deltas(self, stop: Offsets) -> Iterator[tuple[Message, Delta]]:
        """Yields the bundle's deltas up to offsets, in the order of their micro-batches."""
        for number, end in enumerate(stop):
            if end < offset_in(self.position, number):
                raise LogError(
                    f"{self._topic} partition {number}: ends at {end}, before the snapshot's position "
                    f"{self.position[number]}; the topic was deleted or replaced"
                )
        partitions = [self._partition(number, offset_in(self.position, number), end) for number, end in enumerate(stop)]
        behind = {number: offset_in(self.behind, number) for number in range(len(stop))}
        for message, change in heapq.merge(*partitions, key=lambda found: found[1].seq):
            behind[message.partition] = message.offset + 1
            self.behind = tuple(behind.values())
            yield message, change

    def _partition(self, number: int, start: int, stop: int) -> Iterator[tuple[Message, Delta]]:
        for message in self._log.read(self._topic, number, start, stop):
            change = delta.decode(message.value)
            if change.bundle == self._bundle:
                yield message, change
