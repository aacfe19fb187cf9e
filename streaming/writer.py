"""The store writer: deltas from the log into the online store, newest wins.

It may run anywhere, many times over, and be killed at any point: the store keeps the highest sequence number of each
row and record, so doing a delta again changes nothing.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from models import delta
from models.delta import Delta
from streaming.log import EventLog
from streaming.topic import Topics

_POSITION = "position"


class RowSink(Protocol):
    """What the writer needs of an online store."""

    def write_rows(
        self, bundle: str, rows: NDArray[np.int64], seqs: NDArray[np.int64], vectors: NDArray[np.float32]
    ) -> int: ...

    def write_records(
        self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes]
    ) -> int: ...

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]: ...


class StoreWriter:
    """Follows the deltas of one bundle into a store.

    How far it came is kept in the store itself, written after the rows: a store that was emptied, or filled again by
    a server, has no such record and gets all deltas from the first one on.

    Args:
        log: where the trainer writes.
        bundle: its id; deltas of others are passed over.
        store: already loaded with the bundle.
        topics: their names.
        name: of the store; two stores are followed by two names.
    """

    def __init__(self, log: EventLog, bundle: str, store: RowSink, *, topics: Topics, name: str) -> None:
        self._bundle = bundle
        self._store = store
        self.rows = 0
        self.freshness_ms: list[float] = []
        self._topic = topics.deltas
        (position,) = store.read_records(bundle, _POSITION, [self._topic])
        start, stop = int(position or 0), log.end_offsets(self._topic)[0]
        for message in log.read(self._topic, 0, start, stop):
            self._write(delta.decode(message.value))
        self._advance(stop)
        self._reader = log.reader([topics.deltas], group=f"writer-{name}-{bundle}")

    def run_once(self, *, max_messages: int = 256, wait_s: float = 0.0) -> int:
        """Writes the deltas that are there and returns how many; then commits how far it came."""
        messages = self._reader.poll(max_messages, wait_s)
        for message in messages:
            change = delta.decode(message.value)
            self._write(change)
            now = time.time() * 1_000
            self.freshness_ms += [now - appended for appended in change.times_ms if change.bundle == self._bundle]
        if messages:
            self._advance(messages[-1].offset + 1)
            self._reader.commit()
        return len(messages)

    def close(self) -> None:
        """Leaves the log."""
        self._reader.close()

    def _advance(self, position: int) -> None:
        """Records the next offset to read; the highest one stays."""
        self._store.write_records(self._bundle, _POSITION, [self._topic], [position], [str(position).encode()])

    def _write(self, change: Delta) -> None:
        if change.bundle != self._bundle:
            return
        rows = change.row_numbers
        if len(rows):
            seqs = np.full(len(rows), change.seq, dtype=np.int64)
            self.rows += self._store.write_rows(self._bundle, rows, seqs, change.vectors)
        for kind in dict.fromkeys(record.kind for record in change.records):
            chosen = [record for record in change.records if record.kind == kind]
            self._store.write_records(
                self._bundle,
                kind,
                [record.id for record in chosen],
                [change.seq] * len(chosen),
                [record.payload for record in chosen],
            )
