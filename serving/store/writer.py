"""The store writer: deltas from the log into the online store, newest wins.

It may run anywhere, many times over, and be killed at any point: the store keeps the highest sequence number of each
row and record, so doing a delta again changes nothing.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from features import tracing as trace
from models.bundle import delta, record
from models.bundle.delta import Delta
from serving.store.admitted import Admitted
from serving.store.protocol import OnlineStore
from streaming.log.protocol import EventLog, Follower, Message
from streaming.log.topics import Topics

POSITION = "position"
"""Kind of the record that says how far a writer came."""
_OLD_FILLING = "1"


def filling_of(store: OnlineStore, bundle: str) -> str | None:
    """Returns the name of the filling of a store that answers, or None where the bundle is not in it.

    Each load of a bundle into an empty store gives the filling a new name.
    """
    (found,) = store.read_records(bundle, record.LOADED, ["bundle"])
    return None if found is None else found.decode()


def position_of(store: OnlineStore, bundle: str, topic: str) -> int | None:
    """Returns the next offset of the deltas' topic that no writer has written, or None where no writer has run.

    A position holds for the filling of the store in which it was noted: of what a store has lost it says nothing.
    """
    (found,) = store.read_records(bundle, POSITION, [_position_id(topic, filling_of(store, bundle))])
    return None if found is None else int(found)


def note_position(store: OnlineStore, bundle: str, topic: str, filling: str | None, position: int) -> None:
    """Notes that all deltas before a position are in this filling of the store; the highest position stays."""
    payload = str(position).encode()
    store.write_records(bundle, POSITION, [_position_id(topic, filling)], [position], [payload])


def _position_id(topic: str, filling: str | None) -> str:
    return topic if filling in (None, _OLD_FILLING) else f"{topic} in {filling}"


class StoreWriter:
    """Follows the deltas of one bundle into a store.

    How far it came is kept in the store itself, written after the rows, for the filling of the store that it saw: a
    store that was emptied, while it ran or not, or was filled again by a server, is noticed at the next call and filled
    by `refill`. A store that started again meanwhile may have lost the last of what it took; it is followed again from
    the position that it still has.

    Args:
        log: where the trainer writes.
        bundle: its id; deltas of others are skipped.
        store: already loaded with the bundle.
        topics: their names.
        refill: brings an emptied store to the state of the log; without, all deltas are written from the first one on.
        watch: called with the age in milliseconds of each message that has just become visible.
    """

    def __init__(
        self,
        log: EventLog,
        bundle: str,
        store: OnlineStore,
        *,
        topics: Topics,
        refill: Callable[[], None] = lambda: None,
        watch: Callable[[list[float]], None] = lambda ages_ms: None,
    ) -> None:
        self._bundle = bundle
        self._log = log
        self._store = store
        self._watch = watch
        self._refill = refill
        self._admitted = Admitted(store, bundle)
        self.rows = 0
        self._topic = topics.deltas
        # Read and not yet noted in the store.
        self._pending: list[Message] = []
        self._life, self._reader = self._follow()

    def run_once(self, *, max_messages: int = 256, wait_s: float = 0.0) -> int:
        """Writes the deltas that are there and returns how many; then notes in the store how far it came.

        Raises:
            StoreError: the store does not answer; the same call again goes on where this one stopped.
            LogError: the log does not answer.
        """
        if (found := self._alive()) != self._life:
            if found[1] != self._life[1]:
                self._refill()
            self._reader.close()
            self._pending = []
            self._life, self._reader = self._follow()
        messages = self._pending or self._reader.poll(max_messages, wait_s)
        self._pending = messages
        if messages:
            changes = [delta.decode(message.value) for message in messages]
            own = [change for change in changes if change.bundle == self._bundle]
            with self._span(own):
                self._write(own)
            if self._alive() != self._life:
                # It may have lost what was just written: the next call follows it again.
                return len(messages)
            self._advance(messages[-1].offset + 1)
            now = time.time() * 1_000
            self._watch([now - appended for change in own for appended in change.times_ms])
        self._pending = []
        return len(messages)

    def close(self) -> None:
        """Leaves the log."""
        self._reader.close()

    def _alive(self) -> tuple[str, str | None]:
        """Returns the store's start and filling that answer."""
        return self._store.incarnation(), filling_of(self._store, self._bundle)

    def _follow(self) -> tuple[tuple[str, str | None], Follower]:
        """Returns the store that answers, and the log from the store's position on."""
        life = self._alive()
        position = position_of(self._store, self._bundle, self._topic)
        self._admitted = Admitted(self._store, self._bundle)
        return life, self._log.follow(self._topic, position or 0)

    def _advance(self, position: int) -> None:
        """Records the next offset to read."""
        note_position(self._store, self._bundle, self._topic, self._life[1], position)

    def _span(self, changes: Sequence[Delta]) -> trace.Span:
        """A span in the trace of each micro-batch of which something is written."""
        if not trace.is_on():
            return trace.OFF
        batches = {change.seq: {"rows": 0, "records": 0} for change in changes}
        for change in changes:
            batches[change.seq]["rows"] += len(change.rows) // 4
            batches[change.seq]["records"] += len(change.records)
        return trace.in_batches("store", self._bundle, self._topic, batches)

    def _write(self, changes: Sequence[Delta]) -> None:
        """Writes what many deltas changed, together: of each row and record the newest."""
        with_rows = [change for change in changes if change.rows]
        if with_rows:
            rows = np.concatenate([change.row_numbers for change in with_rows])
            seqs = np.concatenate([np.full(len(c.accumulators) // 4, c.seq, dtype=np.int64) for c in with_rows])
            vectors = np.concatenate([change.vectors for change in with_rows])
            self.rows += self._store.write_rows(self._bundle, rows, seqs, vectors)
        records = [(change.seq, found) for change in changes for found in change.records]
        for kind in dict.fromkeys(found.kind for _, found in records if found.kind != record.CHANGED):
            chosen = [(seq, found) for seq, found in records if found.kind == kind]
            self._store.write_records(
                self._bundle,
                kind,
                [found.id for _, found in chosen],
                [seq for seq, _ in chosen],
                [found.payload for _, found in chosen],
            )
            if kind == record.ADMITTED:
                self._admitted.wrote([found.id for _, found in chosen])
