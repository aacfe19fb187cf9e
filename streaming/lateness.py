"""Lateness and duplicates: the stream's memory of recent event times and ids.

Partitions are read at different speeds, so each partition has its own event time. An event is late if it is older than
the newest event of the same partition by more than the bound. The clock of the log limits how far a single event
advances this time.

An id is remembered as long as an event of the same time would not be late. A repeat within the bound is therefore
recognised in every partition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

TopicPartition = tuple[str, int]
"""Topic and partition."""

_BUCKETS = 16
UNTIMED = 1_000_000
"""Number of newest ids that are remembered of each partition if events have no clock."""


def id_key(event_id: str | int) -> int:
    """Hashes an event's id to 64 bits. The string "7" and the number 7 are the same id."""
    return xxh3_64_intdigest(str(event_id).encode(errors="surrogatepass"))


@dataclass
class _Partition:
    newest: int | None = None
    buckets: dict[int, list[int]] = field(default_factory=dict)


class EventWindow:
    """Finds late and repeated events, batch after batch.

    Args:
        bound: Largest age of an event before the newest event of its partition, in the unit of the event times, ≥ 1.
        timed: True if event times come from a clock. If False, no event is late.
    """

    def __init__(self, bound: int, *, timed: bool) -> None:
        if bound < 1:
            raise ValueError(f"bound: expected at least 1, got {bound}")
        self._bound = bound if timed else UNTIMED
        self._timed = timed
        self._width = max(1, self._bound // _BUCKETS)
        self._seen: set[int] = set()
        self._partitions: dict[TopicPartition, _Partition] = {}

    def late(
        self, key: TopicPartition, times: NDArray[np.int64], *, at_most: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """Marks the late events of a partition. All events advance the partition's time.

        Args:
            key: Topic and partition.
            times: (E,) event times in order of arrival, in the unit of the bound.
            at_most: (E,) latest time to which each event may advance the partition's time. The limit keeps a clock that
                is ahead from making all other events late. Default: `times`.

        Returns:
            (E,) True for each late event.
        """
        partition = self._partitions.setdefault(key, _Partition())
        if not len(times):
            return np.zeros(0, dtype=np.bool_)
        advances = times if at_most is None else np.minimum(times, at_most)
        start = advances[0] if partition.newest is None else partition.newest
        running = np.maximum.accumulate(np.concatenate([[start], advances]))
        # A late event lies before the newest event, so it cannot have advanced the time for the events after it.
        late: NDArray[np.bool_] = times < running[:-1] - self._bound
        partition.newest = int(running[-1])
        return late & self._timed

    def repeated(self, key: TopicPartition, ids: Sequence[int | None], times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks the events of a partition that repeat an id, and remembers the ids of all other events.

        Args:
            key: Topic and partition.
            ids: E ids as `id_key` returns them. An event with None never counts as a repeat.
            times: (E,) event times, in the unit of the bound.

        Returns:
            (E,) True for each event whose id was seen before, in any partition.
        """
        repeated = np.zeros(len(ids), dtype=np.bool_)
        partition = self._partitions.setdefault(key, _Partition())
        for position, (event_id, time) in enumerate(zip(ids, times.tolist(), strict=True)):
            if event_id is None:
                continue
            if event_id in self._seen:
                repeated[position] = True
            else:
                self._seen.add(event_id)
                partition.buckets.setdefault(time // self._width, []).append(event_id)
        self._forget(partition)
        return repeated

    def __len__(self) -> int:
        return len(self._seen)

    def state(self) -> dict[str, Any]:
        """Returns the whole memory as plain values, for `restore`."""
        return {
            "partitions": [
                [*key, partition.newest, [[bucket, ids] for bucket, ids in partition.buckets.items()]]
                for key, partition in self._partitions.items()
            ]
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces the memory by a result of `state`."""
        self._partitions = {
            (topic, number): _Partition(newest, {bucket: list(ids) for bucket, ids in buckets})
            for topic, number, newest, buckets in state["partitions"]
        }
        partitions = self._partitions.values()
        self._seen = {event_id for part in partitions for ids in part.buckets.values() for event_id in ids}

    def _forget(self, partition: _Partition) -> None:
        if partition.newest is None:
            return
        oldest = (partition.newest - self._bound) // self._width
        for bucket in [bucket for bucket in partition.buckets if bucket < oldest]:
            self._seen.difference_update(partition.buckets.pop(bucket))
