"""Moves rows between shards: to P partitions by a number of each row, in a stable order, on any engine.

A shuffle has two steps, which share nothing but files. Each shard is scattered into one Arrow file with P batches, the
rows of partition p in batch p. A partition then gathers its batch of every file, in the order of the shards. P is fixed
by the data and never by the workers, so the rows of a partition and their order are the same on any engine. Memory of a
worker is bounded by a shard or a partition.

Shape letters: E rows, P partitions.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from features.durable import write_file
from features.jobs.engine import Engine
from features.jobs.shard import write_parquet
from features.jobs.worklist import JobReport, RowCounts

PartitionFunction = Callable[[pl.DataFrame], NDArray[np.int64]]
"""Returns the partition (E,) of each row, 0 to P - 1."""
_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_scattered(frame: pl.DataFrame, partition: NDArray[np.int64], count: int, path: Path) -> None:
    """Writes rows as one Arrow file with a batch for each partition; rows of a partition keep their order.

    Args:
        frame: E rows.
        partition: (E,) partition of each row, 0 to P - 1.
        count: P.
        path: File in an existing directory; appears whole.
    """
    table = frame[np.argsort(partition, kind="stable")].to_arrow() if count > 1 else frame.to_arrow()
    bounds = np.concatenate([[0], np.cumsum(np.bincount(partition, minlength=count))])

    def fill(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, table.schema, options=_OPTIONS) as writer:
            for start, stop in pairwise(bounds.tolist()):
                writer.write_batch(_one_batch(table.slice(start, stop - start)))

    write_file(path, fill)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    found = table.combine_chunks().to_batches()
    return found[0] if found else pa.RecordBatch.from_pylist([], schema=table.schema)


def gather(paths: Sequence[Path], partition: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Reads the rows of a partition from the files of `write_scattered`, in the order of the paths.

    Args:
        paths: Files of one shuffle, at least one.
        partition: Number of the partition.
        columns: Columns to return; None for all.
    """
    frames = []
    for path in paths:
        with pa.OSFile(str(path), "rb") as file:
            batch = pa.ipc.open_file(file).get_batch(partition)
            frames.append(pl.DataFrame(batch if columns is None else batch.select(list(columns))))
    return pl.concat(frames, rechunk=True)


@dataclass(frozen=True)
class _Scatter:
    """Task that scatters a shard."""

    function: PartitionFunction
    count: int
    out: Path

    def __call__(self, shard: Path) -> RowCounts:
        path = self.out / f"{shard.stem}.arrow"
        frame = pl.read_parquet(shard)
        if not path.exists():
            write_scattered(frame, self.function(frame), self.count, path)
        return RowCounts(frame.height, frame.height, 0)


@dataclass(frozen=True)
class _Gather:
    """Task that gathers a partition."""

    scattered: tuple[Path, ...]

    def __call__(self, path: Path) -> RowCounts:
        if not path.exists():
            write_parquet(gather(self.scattered, partition_of(path)), path)
        height = pl.scan_parquet(path).select(pl.len()).collect().item()
        return RowCounts(height, height, 0)


def partition_path(directory: Path, partition: int) -> Path:
    """Returns the path of a partition, `part-00000.parquet` and so on."""
    return directory / f"part-{partition:05d}.parquet"


def partition_of(path: Path) -> int:
    """Returns the number of the partition that a path of `partition_path` names."""
    return int(path.stem.removeprefix("part-"))


def shuffle_shards(
    function: PartitionFunction,
    shards: Sequence[Path],
    out: Path,
    *,
    partitions: int,
    label: str,
    engine: Engine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> JobReport:
    """Moves the rows of shards to partitions, `part-00000.parquet` and so on in `out`.

    The rows of a partition are in the order of the shards, and of a shard's rows.

    Args:
        function: Picklable; returns the partition of each row.
        shards: Parquet files of one schema with distinct names, at least one.
        out: Existing or new directory; partitions that exist are kept.
        partitions: P.
        label: Name of the step in the engine's views.
        engine: Engine of the job; by default this process.
        progress: Called with (tasks done, tasks) from time to time.

    Returns:
        The counts of the second step.

    Raises:
        TesseraError: As `features.jobs.beam.map_shards` says.
        RuntimeError: As `features.jobs.beam.map_shards` says.
    """
    from features.jobs.beam import run_tasks

    out = Path(os.path.abspath(out))
    aside = out / ".scattered"
    aside.mkdir(parents=True, exist_ok=True)
    total = len(shards) + partitions
    scatter = _Scatter(function, partitions, aside)
    run_tasks(
        scatter, shards, aside, label=f"{label}: scatter", engine=engine, progress=partial(_part, progress, 0, total)
    )
    gathered = _Gather(tuple(aside / f"{shard.stem}.arrow" for shard in shards))
    paths = [partition_path(out, number) for number in range(partitions)]
    return run_tasks(
        gathered,
        paths,
        out,
        label=f"{label}: gather",
        engine=engine,
        progress=partial(_part, progress, len(shards), total),
    )


def _part(progress: Callable[[int, int], None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)
