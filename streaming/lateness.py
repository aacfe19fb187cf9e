"""Lateness and duplicates: the stream's memory of recent times and ids.

Event time runs on its own in every partition, since partitions are read at different speeds: an event is late when it
is older than the newest one of ITS partition by more than the bound. The log's own clock limits how far one event moves
that time. An id is remembered as long as an event beside it
would not be late, so a repeat within the bound is told from a new event wherever it arrives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

Place = tuple[str, int]
"""Topic and partition."""

_BUCKETS = 16
# Without a clock there is no bound in time; then the newest so many ids of a partition are remembered.
UNTIMED = 1_000_000


def id_key(event_id: str | int) -> int:
    """64 bits for an event's id; the string "7" and the number 7 are one id."""
    return xxh3_64_intdigest(str(event_id).encode(errors="surrogatepass"))


@dataclass
class _Partition:
    newest: int | None = None
    buckets: dict[int, list[int]] = field(default_factory=dict)


class EventWindow:
    """Judges events of one batch after the other.

    Args:
        bound: how much older than the newest event of its partition an event may be, in the unit of `time`.
        timed: True if `time` is a clock; if not, no event is late.
    """

    def __init__(self, bound: int, *, timed: bool) -> None:
        if bound < 1:
            raise ValueError(f"bound: expected at least 1, got {bound}")
        self._bound = bound if timed else UNTIMED
        self._timed = timed
        self._width = max(1, self._bound // _BUCKETS)
        self._seen: set[int] = set()
        self._partitions: dict[Place, _Partition] = {}

    def late(
        self, place: Place, times: NDArray[np.int64], *, at_most: NDArray[np.int64] | None = None
    ) -> NDArray[np.bool_]:
        """Returns which events (E,) of a partition, in order of arrival, come too late; the others move its time on.

        Args:
            place: the partition.
            times: (E,) event times, in the unit of the bound.
            at_most: (E,) how far each event may move the partition's time, so that a clock that runs ahead does not
                make all others late; by default to its own time.
        """
        partition = self._partitions.setdefault(place, _Partition())
        if not len(times):
            return np.zeros(0, dtype=np.bool_)
        moves = times if at_most is None else np.minimum(times, at_most)
        start = moves[0] if partition.newest is None else partition.newest
        running = np.maximum.accumulate(np.concatenate([[start], moves]))
        # Oldest first: what was late for its predecessor cannot have moved the time on, as it lies behind it.
        late: NDArray[np.bool_] = times < running[:-1] - self._bound
        partition.newest = int(running[-1])
        return late & self._timed

    def repeated(self, place: Place, keys: Sequence[int | None], times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns which events (E,) of a partition repeat an id, and remembers the ids of the others."""
        repeated = np.zeros(len(keys), dtype=np.bool_)
        partition = self._partitions.setdefault(place, _Partition())
        for position, (key, time) in enumerate(zip(keys, times.tolist(), strict=True)):
            if key is None:
                continue
            if key in self._seen:
                repeated[position] = True
            else:
                self._seen.add(key)
                partition.buckets.setdefault(time // self._width, []).append(key)
        self._forget(partition)
        return repeated

    def __len__(self) -> int:
        return len(self._seen)

    def state(self) -> dict[str, Any]:
        """Returns the whole memory, as plain values."""
        return {
            "partitions": [
                [*place, partition.newest, [[bucket, keys] for bucket, keys in partition.buckets.items()]]
                for place, partition in self._partitions.items()
            ]
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `state` was taken."""
        self._partitions = {
            (topic, number): _Partition(newest, {bucket: list(keys) for bucket, keys in buckets})
            for topic, number, newest, buckets in state["partitions"]
        }
        parts = self._partitions.values()
        self._seen = {key for partition in parts for keys in partition.buckets.values() for key in keys}

    def _forget(self, partition: _Partition) -> None:
        if partition.newest is None:
            return
        oldest = (partition.newest - self._bound) // self._width
        for bucket in [bucket for bucket in partition.buckets if bucket < oldest]:
            self._seen.difference_update(partition.buckets.pop(bucket))
