"""The store writer: writes deltas of the log to the online store.

Several writers may run on any machines, and each may be killed at any point. The store keeps the highest sequence
number of each row and record, so writing a delta again changes nothing.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from features import tracing as trace
from models.bundle import aggregate_record, delta, record
from models.bundle.delta import Delta
from serving.store.admitted import Admitted
from serving.store.forget import forget_users
from serving.store.protocol import POSITION, OnlineStore
from streaming.log.protocol import EventLog, Follower, Message, Offsets, advanced
from streaming.log.topics import Topics

_OLD_FILLING = "1"


def filling_of(store: OnlineStore, bundle: str) -> str | None:
    """Returns the name of a bundle's filling in the store, or None if the bundle is not loaded.

    Each load of a bundle into an empty store gives the filling a new name.
    """
    (payload,) = store.read_records(bundle, record.LOADED, ["bundle"])
    return None if payload is None else payload.decode()


def position_of(store: OnlineStore, bundle: str, topic: str) -> Offsets | None:
    """Returns the first offset that is not in the store, by partition of the deltas' topic. None: no writer has run.

    A position is valid for the current filling of the store alone. A new filling has no position at first.
    """
    (payload,) = store.read_records(bundle, POSITION, [_position_id(topic, filling_of(store, bundle))])
    return None if payload is None else tuple(int(offset) for offset in payload.split(b","))


def note_position(store: OnlineStore, bundle: str, topic: str, filling: str | None, position: Offsets) -> None:
    """Records that all deltas before a position are in a filling of the store.

    Of the positions of several writers the one with the highest sum wins. In some partition it may be before another
    writer's position. A writer then writes the deltas in between again, which changes nothing.
    """
    payload = ",".join(map(str, position)).encode()
    store.write_records(bundle, POSITION, [_position_id(topic, filling)], [sum(position)], [payload])


def _position_id(topic: str, filling: str | None) -> str:
    return topic if filling in (None, _OLD_FILLING) else f"{topic} in {filling}"


class StoreWriter:
    """Writes the deltas of one bundle to a store.

    The writer keeps its position in the store, for the filling of the store, and writes the position after the rows.
    The next call detects two events:

    - The store was emptied, or filled again by a server. The writer then calls `refill`.
    - The store was restarted and may have lost its last writes. The writer then continues from the position that the
      store still has.

    Attributes:
        rows: Number of rows written so far.

    Args:
        log: Log of the deltas.
        bundle: Id of the bundle. Deltas of other bundles are skipped.
        store: Store that has the bundle.
        topics: Names of the topics.
        refill: Brings an emptied store to the state of the log. Default: does nothing, so that the writer writes all
            deltas from the first delta on.
        watch: Called with the ages, in milliseconds, of the messages whose deltas were written.
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
        # Messages that were read and are not yet before the recorded position.
        self._pending: list[Message] = []
        self._position: Offsets = ()
        self._life, self._reader = self._follow()

    def run_once(self, *, max_messages: int = 256, wait_s: float = 0.0) -> int:
        """Writes the next deltas, then records the position in the store.

        Args:
            max_messages: Largest number of messages to read.
            wait_s: Longest wait for messages, seconds.

        Returns:
            Number of messages.

        Raises:
            StoreError: The store does not answer. The next call continues after the last recorded position.
            LogError: The log does not answer.
        """
        if (life := self._alive()) != self._life:
            if life[1] != self._life[1]:
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
                # The store may have lost these writes, so the next call follows the store's position again.
                return len(messages)
            self._position = advanced(self._position, messages)
            note_position(self._store, self._bundle, self._topic, self._life[1], self._position)
            now = time.time() * 1_000
            self._watch([now - appended for change in own for appended in change.times_ms])
        self._pending = []
        return len(messages)

    def close(self) -> None:
        """Closes the reader of the log."""
        self._reader.close()

    def _alive(self) -> tuple[str, str | None]:
        """Returns the id of the store's start and the name of its filling."""
        return self._store.incarnation(), filling_of(self._store, self._bundle)

    def _follow(self) -> tuple[tuple[str, str | None], Follower]:
        """Returns the start and filling of the store, and a reader of the deltas from the store's position."""
        life = self._alive()
        self._position = position_of(self._store, self._bundle, self._topic) or ()
        self._admitted = Admitted(self._store, self._bundle)
        return life, self._log.follow(self._topic, self._position)

    def _span(self, changes: Sequence[Delta]) -> trace.Span:
        """Opens a span in the trace of each micro-batch whose deltas are written."""
        if not trace.is_on():
            return trace.OFF
        batches = {change.seq: {"rows": 0, "records": 0} for change in changes}
        for change in changes:
            batches[change.seq]["rows"] += len(change.rows) // 4
            batches[change.seq]["records"] += len(change.records)
        return trace.in_batches("store", self._bundle, self._topic, batches)

    def _write(self, changes: Sequence[Delta]) -> None:
        """Writes the changes of several deltas together. Of each row and record only the newest is written."""
        with_rows = [change for change in changes if change.rows]
        if with_rows:
            rows = np.concatenate([change.row_numbers for change in with_rows])
            seqs = np.concatenate([np.full(len(c.accumulators) // 4, c.seq, dtype=np.int64) for c in with_rows])
            vectors = np.concatenate([change.vectors for change in with_rows])
            self.rows += self._store.write_rows(self._bundle, rows, seqs, vectors)
        records = [(change.seq, changed) for change in changes for changed in aggregate_record.expanded(change.records)]
        forget_users(self._store, self._bundle, [one for one in records if one[1].kind == record.FORGOTTEN])
        written = (changed.kind for _, changed in records)
        for kind in dict.fromkeys(kind for kind in written if kind not in (record.CHANGED, record.FORGOTTEN)):
            chosen = [(seq, changed) for seq, changed in records if changed.kind == kind]
            self._store.write_records(
                self._bundle,
                kind,
                [changed.id for _, changed in chosen],
                [seq for seq, _ in chosen],
                [changed.payload for _, changed in chosen],
            )
            if kind == record.ADMITTED:
                self._admitted.wrote([changed.id for _, changed in chosen])
