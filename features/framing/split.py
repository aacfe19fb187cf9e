"""Part of each event for a split of events that are never held at once.

Shape letters: E events of a shard, K thresholds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.split import Split
from features.durable import write_file
from features.hashing import splitmix64

_BUCKETS = 1 << 20
# Largest number of events whose random split is a permutation, which is exact and takes eight bytes an event.
_MOST_PERMUTED = 1 << 24
_EXACT = 1 << 53


@dataclass(frozen=True)
class SplitRule:
    """Rule that gives each event its part: 0 train, 1 validation, 2 test.

    Attributes:
        by: Method of the split; for leave-one-out each event is in part 0 here, since its part follows from its user.
        seed: Seed of a random split.
        first_later: First place, or for a split by time the first time, of the validation and of the test part; None
            for a part without events. For a random split of many events, shares of them.
        places: File of the place of each event in a random order; None for other splits.
    """

    by: str
    seed: int
    first_later: tuple[float | None, float | None]
    places: Path | None = None

    def parts(self, events: pl.DataFrame, place: int) -> NDArray[np.uint8]:
        """Returns the part (E,) of events.

        Args:
            events: Events with `event` and `time`.
            place: Number of labelled events before them.
        """
        if self.by == "leave-one-out":
            return np.zeros(events.height, dtype=np.uint8)
        if self.by == "time":
            value = events["time"].to_numpy()
        elif self.by == "random" and self.places is not None:
            value = np.memmap(self.places, np.int64, "r")[place : place + events.height]
        elif self.by == "random":
            value = random_shares(self.seed, events["event"].to_numpy())
        else:
            value = np.arange(place, place + events.height)
        later = [value >= first for first in self.first_later if first is not None]
        return np.sum(later, axis=0, dtype=np.uint8) if later else np.zeros(events.height, dtype=np.uint8)


def random_shares(seed: int, events: NDArray[np.generic]) -> NDArray[np.float64]:
    """Returns a number (E,) in [0, 1) of each event, by a hash of the seed and the event."""
    with np.errstate(over="ignore"):
        start = splitmix64(np.array([seed], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        mixed = splitmix64(events.astype(np.uint64) + start)
    return (mixed >> np.uint64(11)).astype(np.float64) / _EXACT


def split_rule(split: Split, size: int, times: "Times", place: Path) -> SplitRule:
    """Returns the rule of a split of `size` events.

    Args:
        split: Method and fractions.
        size: Labelled events.
        times: Times of the events.
        place: File for the order of a random split.
    """
    first = [round(size * split.train), round(size * (split.train + split.validation))]
    if split.by == "time":
        found = times.at([min(rank, size - 1) for rank in first])
        values = [value if rank < size else None for value, rank in zip(found, first, strict=True)]
        return SplitRule("time", split.seed, (values[0], values[1]))
    if split.by == "random" and size > _MOST_PERMUTED:
        return SplitRule("random", split.seed, (split.train, split.train + split.validation))
    if split.by == "random" and not place.exists():
        places = np.empty(size, dtype=np.int64)
        places[np.random.default_rng(split.seed).permutation(size)] = np.arange(size)
        write_file(place, places.tofile)
    return SplitRule(split.by, split.seed, (first[0], first[1]), place if split.by == "random" else None)


@dataclass(frozen=True)
class Times:
    """Times of events in shards.

    Args:
        shards: Shards with a column `time`.
        first, last: Smallest and largest time.
    """

    shards: Sequence[Path]
    first: int
    last: int

    def at(self, ranks: Sequence[int]) -> list[int]:
        """Returns the times at ranks of the ascending order, exactly, without sorting all times.

        A histogram finds the bucket of each rank. Then the distinct times of these buckets alone are counted.
        """
        width = (self.last - self.first) // _BUCKETS + 1
        counts = np.zeros(_BUCKETS, dtype=np.int64)
        for times in self._each():
            counts += np.bincount((times - self.first) // width, minlength=_BUCKETS)
        ends = np.cumsum(counts)
        buckets = np.searchsorted(ends, np.asarray(ranks, dtype=np.int64), side="right")
        chosen = np.unique(buckets)
        distinct, number = self._counted(lambda times: np.isin((times - self.first) // width, chosen))
        before = np.concatenate([[0], ends])[buckets]
        bucket_of = (distinct - self.first) // width
        found = []
        for rank, bucket, start in zip(ranks, buckets, before, strict=True):
            own = bucket_of == bucket
            place = np.searchsorted(np.cumsum(number[own]), rank - start, side="right")
            found.append(int(distinct[own][place]))
        return found

    def _counted(
        self, keep: Callable[[NDArray[np.int64]], NDArray[np.bool_]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the distinct times that are kept, ascending, and the number of events at each."""
        frame = pl.DataFrame(schema={"time": pl.Int64, "count": pl.Int64})
        for times in self._each():
            values, number = np.unique(times[keep(times)], return_counts=True)
            more = pl.DataFrame({"time": values, "count": number.astype(np.int64)})
            frame = pl.concat([frame, more]).group_by("time").agg(pl.col("count").sum())
        frame = frame.sort("time")
        return frame["time"].to_numpy(), frame["count"].to_numpy()

    def _each(self) -> Iterator[NDArray[np.int64]]:
        for shard in self.shards:
            yield pl.read_parquet(shard, columns=["time"])["time"].to_numpy()
