"""The one Beam job: maps a function over parquet shards, on any runner, with the same bytes.

The pipeline starts from the list of shards (Create, then ParDo), which every runner supports. The list is reshuffled in
between, since all shards would otherwise be one element of one worker. A shard is the unit of work and of resumption:
its output is written to a temporary name and renamed, and a shard whose output exists is not run again. Since the
function sees whole shards, its output cannot depend on the number of workers.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions

from features.durable import write_file
from features.errors import TesseraError

ShardFunction = Callable[[pl.DataFrame], pl.DataFrame]
Progress = Callable[[int, int], None]
FileStamp = tuple[int, int]

SHARD_ROWS = 1_024
SHARD_BYTES = 8 << 20
"""Approximate size of the largest shard, in bytes of its values; a worker holds a whole shard."""
_CUT = "cut"
RUNNERS = ("DirectRunner", "DaskRunner", "PrismRunner", "FlinkRunner", "SparkRunner", "PortableRunner")
_POLL_S = 0.2


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


class _MapShard(beam.DoFn):
    """Reads one shard, applies the function, writes the output shard of the same name."""

    def __init__(self, function: ShardFunction, out: str) -> None:
        self._function = function
        self._out = out

    def process(self, shard: str) -> Iterator[str]:
        path = Path(self._out) / Path(shard).name
        if not path.exists():
            write_parquet(self._function(pl.read_parquet(shard)), path)
        yield path.name


def map_shards(
    function: ShardFunction,
    shards: Sequence[Path],
    out: Path,
    *,
    label: str,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
) -> None:
    """Runs `function` over every shard and writes one output shard each to `out`.

    Args:
        function: Picklable; shard in, shard out; must depend on nothing but the shard.
        shards: Parquet files with distinct names, on a file system that all workers see.
        out: Existing or new directory; output shards that exist are kept.
        label: Name of the step in the runner's views.
        runner: One of `RUNNERS`, or `PrismRunner` if its binary can be found.
        options: Further Beam options, e.g. `--direct_num_workers=2`.
        progress: Called with (shards done, shards) from time to time.

    Raises:
        TesseraError: The runner is unknown.
    """
    if runner not in RUNNERS:
        raise TesseraError(f"runner {runner!r} is unknown; choose one of: {', '.join(RUNNERS)}")
    out.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(out, len(shards), progress, stop), daemon=True)
    watcher.start()
    try:
        pipeline = beam.Pipeline(runner=_runner(runner), options=PipelineOptions(_spread(runner, options)))
        (
            pipeline
            | f"{label}: shards" >> beam.Create([str(path) for path in shards], reshuffle=True)
            | f"{label}: map" >> beam.ParDo(_MapShard(function, str(out)))
        )
        result = pipeline.run()
        try:
            result.wait_until_finish()
        finally:
            # Dask's runner leaves its client open, and the cluster that the client started.
            if client := getattr(result, "client", None):
                client.close()
    finally:
        stop.set()
        watcher.join()
    progress(len(shards), len(shards))


def _spread(runner: str, options: Sequence[str]) -> list[str]:
    """Returns the options, plus an option that runs each shard alone: Dask puts 128 of them into one task."""
    if runner == "DaskRunner" and not any("partition" in option for option in options):
        return [*options, "--dask_partition_size=1"]
    return [*options]


def _runner(name: str) -> Any:
    if name == "DirectRunner":
        # DirectRunner by name first searches for a Prism binary to download; this is the in-process runner itself.
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        return FnApiRunner()
    if name == "DaskRunner":
        from apache_beam.runners.dask.dask_runner import DaskRunner

        return DaskRunner()
    return name


def _watch(out: Path, total: int, progress: Progress, stop: threading.Event) -> None:
    while not stop.wait(_POLL_S):
        progress(sum(1 for _ in out.glob("part-*.parquet")), total)
