"""Row numbers of users and items: the rows of their table, then the ids that only events have, by first appearance.

Ids are dealt to partitions by the high bits of their fingerprint. A partition finds the distinct ids of the table and
of the events, and refuses an id that the table has twice. Numbers are then found by fingerprint, in arrays that all
workers of a machine share through the page cache. No two ids of a dataset share a fingerprint, or the job says so.

Shape letters: N distinct ids, D partitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.durable import write_file
from features.errors import DatasetError
from features.hashing import fingerprint
from features.jobs.shard import write_parquet
from features.jobs.shuffle import gather, partition_of, write_scattered
from features.jobs.worklist import RowCounts
from features.storage.file import Stamp, stamp

_SCHEMA = {"id": pl.String, "fingerprint": pl.UInt64, "at": pl.UInt32}


@dataclass(frozen=True)
class ListedIds:
    """Task that scatters the ids of a table's shard, each with its row; an id that comes twice is kept twice.

    Args:
        column: Name of the id column.
        starts: Rows before each shard.
        count: D, a power of two.
        out: Directory of the scattered files.
    """

    column: str
    starts: tuple[int, ...]
    count: int
    out: Path

    def __call__(self, shard: Path) -> RowCounts:
        path = self.out / f"{shard.stem}.arrow"
        ids = pl.read_parquet(shard, columns=[self.column]).select(id=self.column)
        if not path.exists():
            start = self.starts[partition_of(shard)]
            rows = pl.int_range(start, start + ids.height, dtype=pl.UInt32, eager=True)
            scatter_ids(ids.with_columns(at=rows), self.count, path)
        return RowCounts(ids.height, ids.height, 0)


def scatter_ids(ids: pl.DataFrame, count: int, path: Path) -> pl.DataFrame:
    """Scatters ids by fingerprint; returns `id` and `fingerprint`.

    Args:
        ids: `id`, and `at`, the row or event of each.
        count: D, a power of two.
        path: Path of the scattered file.
    """
    keys = fingerprint(ids["id"].to_list())
    found = ids.select("id", pl.Series("fingerprint", keys, dtype=pl.UInt64), "at")
    write_scattered(found, _partition(keys, count), count, path)
    return found.select("id", "fingerprint")


def _partition(keys: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    bits = count.bit_length() - 1
    return (keys >> np.uint64(64 - bits)).astype(np.int64) if bits else np.zeros(len(keys), dtype=np.int64)


@dataclass(frozen=True)
class DistinctIds:
    """Task that joins the ids of a partition: of the table with their row, of the events with their first event.

    Args:
        listed: Scattered ids of the table's shards, with their rows.
        seen: Scattered ids of the events' shards, with their first events in the shard.
        starts: Events before each shard.
    """

    listed: tuple[Path, ...]
    seen: tuple[Path, ...]
    starts: tuple[int, ...]

    def __call__(self, path: Path) -> RowCounts:
        if not path.exists():
            listed = self._ids(self.listed, [0] * len(self.listed), partition_of(path))
            seen = self._ids(self.seen, self.starts, partition_of(path))
            twice = listed.filter(~pl.col("id").is_first_distinct())
            if twice.height:
                again = twice.row(0, named=True)
                first = listed.filter(pl.col("id") == again["id"])["at"][0]
                rows = f"{first + 1:,} and {again['at'] + 1:,}"
                raise DatasetError(f"id '{again['id']}' is in the rows {rows} of its table; keep one of them")
            seen = seen.group_by("id", "fingerprint").agg(pl.col("at").min())
            both = listed.rename({"at": "row"}).join(
                seen.rename({"at": "event"}), on=["id", "fingerprint"], how="full", coalesce=True
            )
            both = both.sort("fingerprint", "id")
            if both["fingerprint"].is_duplicated().any():
                pair = both.filter(pl.col("fingerprint").is_duplicated())["id"].to_list()[:2]
                raise DatasetError(f"ids '{pair[0]}' and '{pair[1]}' share a fingerprint; rename one of them")
            write_parquet(both, path, brief=True)
        height = pl.scan_parquet(path).select(pl.len()).collect().item()
        return RowCounts(height, height, 0)

    @staticmethod
    def _ids(paths: Sequence[Path], starts: Sequence[int], partition: int) -> pl.DataFrame:
        shards = [
            gather([path], partition).with_columns((pl.col("at").cast(pl.Int64) + start).cast(pl.UInt32))
            for path, start in zip(paths, starts, strict=True)
        ]
        return pl.concat([pl.DataFrame(schema=_SCHEMA), *shards])


@dataclass(frozen=True)
class Numbers:
    """Row numbers of ids, in files of a directory.

    Args:
        directory: Directory that `number_ids` filled.
    """

    directory: Path

    def of(self, keys: pl.Series) -> pl.Series:
        """Returns the row (E,) UInt32 of each id, given its fingerprint (E,) UInt64."""
        known, rows = self._arrays()
        wanted = keys.to_numpy()
        # Sorted, so that the search walks through the array instead of jumping.
        order = np.argsort(wanted)
        found = np.empty(len(wanted), dtype=np.uint32)
        found[order] = rows[np.searchsorted(known, wanted[order])]
        return pl.Series(found)

    @property
    def fingerprints(self) -> NDArray[np.uint64]:
        """(N,) fingerprint of the id of each row."""
        keys, rows = self._arrays()
        found = np.empty(len(keys), dtype=np.uint64)
        found[rows] = keys
        return found

    @property
    def unknown(self) -> pl.Series:
        """Ids that only events have, in the order of their rows."""
        return pl.read_parquet(self.directory / "unknown.parquet")["id"]

    @property
    def size(self) -> int:
        """N, the number of rows."""
        return len(self._arrays()[0])

    def _arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        # Not kept in this object, which travels to the workers.
        return _mapped(self.directory, stamp(self.directory / "rows"))


@lru_cache(maxsize=2)
def _mapped(directory: Path, at: Stamp) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    if not (directory / "rows").stat().st_size:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint32)
    return np.memmap(directory / "keys", np.uint64, "r"), np.memmap(directory / "rows", np.uint32, "r")


def number_ids(partitions: Sequence[Path], listed: int, directory: Path) -> int:
    """Writes the arrays of `Numbers`; returns the number of ids that events have.

    Args:
        partitions: Files of `DistinctIds`, in order.
        listed: Rows of the table.
        directory: Existing or new directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    unknown = pl.concat([_unknown(path) for path in partitions]).with_row_index("place").sort("event")
    numbers = np.empty(unknown.height, dtype=np.uint32)
    numbers[unknown["place"].to_numpy()] = np.arange(listed, listed + unknown.height, dtype=np.uint32)
    write_parquet(unknown.select("id"), directory / "unknown.parquet")
    del unknown
    keys, rows, used, events = [], [], 0, 0
    for path in partitions:
        own = pl.read_parquet(path, columns=["fingerprint", "row", "event"])
        row, new = own["row"].fill_null(0).to_numpy().copy(), own["row"].is_null().to_numpy()
        row[new] = numbers[used : used + int(new.sum())]
        used, events = used + int(new.sum()), events + own["event"].count()
        keys.append(own["fingerprint"].to_numpy())
        rows.append(row.astype(np.uint32))
    for name, arrays in (("keys", keys), ("rows", rows)):
        write_file(directory / name, np.concatenate(arrays).tofile)
    return events


def _unknown(path: Path) -> pl.DataFrame:
    return pl.scan_parquet(path).filter(pl.col("row").is_null()).select("id", "event").collect()
