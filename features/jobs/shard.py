"""Shards of a frame: parquet files of bounded size, written whole or not at all.

A shard is the unit of work and of resumption of a batch job; see `features.jobs.beam`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from features.durable import write_file

FileStamp = tuple[int, int]

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
    frame: pl.DataFrame, directory: Path, *, rows: int = SHARD_ROWS, size_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Cuts a frame, in its order, into `part-00000.parquet`, …; an empty frame is one empty shard.

    If an earlier call with the same frame has written all its shards, they stay unchanged.

    Args:
        frame: Frame, cut after `rows` rows or about `size_bytes` bytes of values; a longer row is a shard alone.
        directory: Existing or new directory that holds only the shards of this frame.
    """
    directory.mkdir(parents=True, exist_ok=True)
    starts = _cuts(_row_bytes(frame), rows, size_bytes)
    paths = [directory / f"part-{number:05d}.parquet" for number in range(len(starts))]
    if (directory / _CUT).exists():
        return paths
    for path, start, stop in zip(paths, starts, [*starts[1:], frame.height], strict=True):
        write_parquet(frame.slice(start, stop - start), path)
    write_file(directory / _CUT, lambda aside: aside.touch())
    return paths


def _row_bytes(frame: pl.DataFrame) -> list[int]:
    """Returns the approximate bytes of each row's values: texts by their length, any other value as eight."""
    sizes = [pl.repeat(8 * frame.width, frame.height, dtype=pl.Int64)]
    for name, dtype in frame.schema.items():
        if dtype == pl.String:
            sizes.append(pl.col(name).str.len_bytes().fill_null(0).cast(pl.Int64))
        elif dtype == pl.List(pl.String):
            sizes.append(pl.col(name).list.eval(pl.element().str.len_bytes()).list.sum().fill_null(0).cast(pl.Int64))
    found: list[int] = frame.select(pl.sum_horizontal(sizes).alias("size"))["size"].to_list()
    return found


def _cuts(sizes: Sequence[int], rows: int, size_bytes: int) -> list[int]:
    starts, held = [0], 0
    for row, size in enumerate(sizes):
        if row > starts[-1] and (row - starts[-1] == rows or held + size > size_bytes):
            starts.append(row)
            held = 0
        held += size
    return starts


def read_shards(directory: Path) -> pl.DataFrame:
    """Reads all shards of a directory in their order."""
    return pl.concat([pl.read_parquet(path) for path in sorted(directory.glob("part-*.parquet"))])


def write_parquet(frame: pl.DataFrame, path: Path) -> None:
    """Writes a frame durably: the path holds a whole file or none."""

    def fill(aside: Path) -> None:
        with aside.open("wb") as file:
            frame.write_parquet(file, compression="zstd", statistics=False)

    write_file(path, fill)


def file_stamp(path: Path) -> FileStamp:
    """Returns a stamp that differs if another file replaced this one, for a worker's cache of loaded files."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
