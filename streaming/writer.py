"""The store writer: deltas from the log into the online store, newest wins.

It may run anywhere, many times over, and be killed at any point: the store keeps the highest sequence number of each
row and record, so doing a delta again changes nothing.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from features import trace
from models import delta
from models.delta import Delta
from streaming.log import EventLog, Follower, Message
from streaming.topic import Topics

POSITION = "position"
"""Kind of the record that says how far a writer came."""


class RowSink(Protocol):
    """What the writer needs of an online store."""

    def write_rows(
        self, bundle: str, rows: NDArray[np.int64], seqs: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> int: ...

    def write_records(
        self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes]
    ) -> int: ...

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]: ...

    def incarnation(self) -> str: ...


class StoreWriter:
    """Follows the deltas of one bundle into a store.

    How far it came is kept in the store itself, written after the rows: a store that was emptied, or filled again by
    a server, has no such record and gets all deltas from the first one on. A store that started again meanwhile may
    have lost the last of what it took; it is followed anew from the position that it still has.

    Args:
        log: where the trainer writes.
        bundle: its id; deltas of others are passed over.
        store: already loaded with the bundle.
        topics: their names.
        watch: called with the age in milliseconds of each message that has just become visible.
    """

    def __init__(
        self,
        log: EventLog,
        bundle: str,
        store: RowSink,
        *,
        topics: Topics,
        watch: Callable[[list[float]], None] = lambda ages_ms: None,
    ) -> None:
        self._bundle = bundle
        self._log = log
        self._store = store
        self._watch = watch
        self.rows = 0
        self._topic = topics.deltas
        # Read and not yet noted in the store.
        self._pending: list[Message] = []
        self._incarnation, self._reader = self._follow()

    def run_once(self, *, max_messages: int = 256, wait_s: float = 0.0) -> int:
        """Writes the deltas that are there and returns how many; then notes in the store how far it came.

        Raises:
            StoreError: the store does not answer; the same call again goes on where this one stopped.
            LogError: the log does not answer.
        """
        if self._store.incarnation() != self._incarnation:
            self._reader.close()
            self._pending = []
            self._incarnation, self._reader = self._follow()
        messages = self._pending or self._reader.poll(max_messages, wait_s)
        self._pending = messages
        if messages:
            changes = [delta.decode(message.value) for message in messages]
            own = [change for change in changes if change.bundle == self._bundle]
            with self._span(own):
                self._write(own)
            if self._store.incarnation() != self._incarnation:
                # It may have lost what was just written: the next call follows it anew.
                return len(messages)
            self._advance(messages[-1].offset + 1)
            now = time.time() * 1_000
            self._watch([now - appended for change in own for appended in change.times_ms])
        self._pending = []
        return len(messages)

    def close(self) -> None:
        """Leaves the log."""
        self._reader.close()

    def _follow(self) -> tuple[str, Follower]:
        """Which store answers, and the log from the position on that it has."""
        incarnation = self._store.incarnation()
        (position,) = self._store.read_records(self._bundle, POSITION, [self._topic])
        return incarnation, self._log.follow(self._topic, int(position or 0))

    def _advance(self, position: int) -> None:
        """Records the next offset to read; the highest one stays."""
        self._store.write_records(self._bundle, POSITION, [self._topic], [position], [str(position).encode()])

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
        for kind in dict.fromkeys(found.kind for _, found in records):
            chosen = [(seq, found) for seq, found in records if found.kind == kind]
            self._store.write_records(
                self._bundle,
                kind,
                [found.id for _, found in chosen],
                [seq for seq, _ in chosen],
                [found.payload for _, found in chosen],
            )
