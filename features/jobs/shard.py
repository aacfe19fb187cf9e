"""Shards of a frame: parquet files of bounded size, written whole or not at all.

A shard is the unit of work and of resumption of a batch job; see `features.jobs.beam`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.durable import write_file
from features.storage.file import names, write
from features.storage.location import Location

SHARD_ROWS = 1_024
SHARD_BYTES = 8 << 20
"""Approximate size of the largest shard, in bytes of its values; a worker holds a whole shard."""
_CUT = "cut"


@dataclass(frozen=True)
class Sifted:
    """Output of a function that rejects rows: each row of the shard is either kept or rejected.

    Attributes:
        kept: Output rows.
        rejected: Rejected rows, with a column `reason`; written to `rejected/` below the output.
    """

    kept: pl.DataFrame
    rejected: pl.DataFrame


def write_shards(
    frames: pl.DataFrame | Iterable[pl.DataFrame],
    directory: Path,
    *,
    rows: int = SHARD_ROWS,
    size_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Cuts frames, in their order, into `part-00000.parquet`, …; an empty frame is one empty shard.

    If an earlier call with the same frames has written all shards, they stay unchanged and no frame is read. A shard is
    written from a slice of a frame, so no second copy of it is made.

    Args:
        frames: One frame or several, each cut after `rows` rows or about `size_bytes` bytes of values. A longer row is
            a shard alone.
        directory: Existing or new directory that holds only the shards of these frames.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / _CUT).exists():
        number = 0
        for frame in [frames] if isinstance(frames, pl.DataFrame) else frames:
            starts = _cuts(_row_bytes(frame), rows, size_bytes)
            for start, stop in zip(starts, [*starts[1:], frame.height], strict=True):
                write_parquet(frame.slice(start, stop - start), directory / f"part-{number:05d}.parquet")
                number += 1
        write_file(directory / _CUT, lambda aside: aside.touch())
    return [path for path in shard_paths(directory) if isinstance(path, Path)]


def _row_bytes(frame: pl.DataFrame) -> NDArray[np.int64]:
    """Returns the approximate bytes of each row's values: texts by their length, any other value as eight."""
    sizes = [pl.repeat(8 * frame.width, frame.height, dtype=pl.Int64)]
    for name, dtype in frame.schema.items():
        if dtype == pl.String:
            sizes.append(pl.col(name).str.len_bytes().fill_null(0).cast(pl.Int64))
        elif dtype == pl.List(pl.String):
            sizes.append(pl.col(name).list.eval(pl.element().str.len_bytes()).list.sum().fill_null(0).cast(pl.Int64))
    return frame.select(pl.sum_horizontal(sizes).alias("size"))["size"].to_numpy()


def _cuts(sizes: NDArray[np.int64], rows: int, size_bytes: int) -> list[int]:
    """Returns the first row of each shard: the longest shards that hold to both bounds, of one row at least."""
    ends, starts, held = np.cumsum(sizes), [0], 0
    while True:
        fits = int(np.searchsorted(ends, held + size_bytes, side="right"))
        stop = min(starts[-1] + rows, max(fits, starts[-1] + 1))
        if stop >= len(sizes):
            return starts
        starts.append(stop)
        held = int(ends[stop - 1])


def shard_paths(directory: Location) -> list[Location]:
    """Returns the shards of a directory in their order."""
    found = (name for name in names(directory) if name.startswith("part-") and name.endswith(".parquet"))
    # Part 100000 comes after part 99999.
    return [directory / name for name in sorted(found, key=lambda name: (len(name), name))]


def each_shard(directory: Location, columns: Sequence[str] | None = None) -> Iterator[pl.DataFrame]:
    """Yields the shards of a directory in their order, with all columns or the given ones."""
    return (read_shard(path, columns) for path in shard_paths(directory))


def read_shard(path: Location, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Reads one shard, with all columns or the given ones."""
    chosen = None if columns is None else list(columns)
    return pl.read_parquet(path if isinstance(path, Path) else path.read_bytes(), columns=chosen)


def read_shards(directory: Location, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Reads all shards of a directory in their order, with all columns or the given ones."""
    return pl.concat(each_shard(directory, columns))


def write_parquet(frame: pl.DataFrame, path: Location, *, brief: bool = False) -> None:
    """Writes a frame durably: the path holds a whole file or none.

    Args:
        frame: Rows of the file.
        path: File in an existing directory.
        brief: True for a file that only the next job reads: it is written faster and is larger.
    """

    def fill(aside: Path) -> None:
        with aside.open("wb") as file:
            frame.write_parquet(file, compression="lz4" if brief else "zstd", statistics=False)

    write(path, fill)
