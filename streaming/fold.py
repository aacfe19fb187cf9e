"""The fold of the log: the table and the records at an offset, the same in every process.

    table at offset n = snapshot ⊕ deltas[..n]

`tessera verify` holds a store against it; `tessera replay` fills a store from it.
"""

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.errors import LogError
from models.bundle import delta, record
from models.bundle.bundle import Bundle
from models.bundle.delta import SNAPSHOT_SEQ, Delta
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot


class Fold:
    """One bundle's rows and records, folded from its deltas.

    Attributes:
        weight: (R, D) float32; seqs: (R,) int64.
        records: by kind and id, the sequence number and the payload of the newest.
        position: next offset of the deltas' topic.
        behind: the offset behind the last delta; `position` may lie further, as marks of transactions take offsets too.
        seq: of the last micro-batch.

    Args:
        log: where the trainer writes.
        bundle: where the fold begins, when there is no snapshot.
        topics: their names.
        snapshot: where it begins otherwise.
    """

    def __init__(self, log: EventLog, bundle: Bundle, topics: Topics, snapshot: Snapshot | None = None) -> None:
        self._log = log
        self._bundle = bundle.id
        self._topic = topics.deltas
        self._weight = torch.from_numpy(bundle.rows().copy())
        self._accumulator = torch.zeros(len(self._weight))
        self.seqs: NDArray[np.int64] = np.full(len(self._weight), SNAPSHOT_SEQ, dtype=np.int64)
        self.records: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.position, self.behind, self.seq = 0, 0, SNAPSHOT_SEQ
        visits = bundle.history.group_by("user_id", maintain_order=True).agg(pl.col("item_id"), pl.col("time"))
        for user, items, times in visits.iter_rows():
            payload = record.encode(record.HistoryRecord(items, times))
            self.records[record.HISTORY, user] = (SNAPSHOT_SEQ, payload)
        if snapshot is not None:
            self._weight = torch.from_numpy(snapshot.arrays["weight"].copy())
            self.seqs = snapshot.arrays["seqs"].copy()
            self.records |= {(one.kind, one.id): (snapshot.seq, one.payload) for one in snapshot.records(bundle)}
            self.position, self.seq = snapshot.deltas, snapshot.seq

    @property
    def weight(self) -> NDArray[np.float32]:
        """(R, D) float32."""
        return self._weight.numpy()

    def advance(self) -> int:
        """Folds what the log holds by now; returns how many deltas.

        Raises:
            LogError: deltas from `position` on are no longer kept.
        """
        count, stop = 0, self._log.end_offsets(self._topic)[0]
        for change in self._deltas(stop):
            delta.fold(change, self._weight, self._accumulator, self.seqs)
            for found in change.records:
                if found.kind == record.CHANGED:
                    continue
                if change.seq >= self.records.get((found.kind, found.id), (SNAPSHOT_SEQ, b""))[0]:
                    self.records[found.kind, found.id] = (change.seq, found.payload)
            self.seq = max(self.seq, change.seq)
            count += 1
        self.position = max(self.position, stop)
        return count

    def _deltas(self, stop: int) -> Iterator[Delta]:
        if stop < self.position:
            raise LogError(
                f"{self._topic}: ends at {stop}, before {self.position} where the snapshot was taken; "
                "the topic was deleted or is another one"
            )
        for message in self._log.read(self._topic, 0, self.position, stop):
            change = delta.decode(message.value)
            if change.bundle == self._bundle:
                self.behind = message.offset + 1
                yield change
