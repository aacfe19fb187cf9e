"""The one Beam job: maps a function over parquet shards, on any runner, with the same bytes.

The pipeline starts from the list of shards (Create, then ParDo), which every runner supports. The list is reshuffled in
between, since all shards would otherwise be one element of one worker. A shard is the unit of work and of resumption:
its output is written to a temporary name and renamed, and a shard whose output exists is not run again. Since the
function sees whole shards, its output cannot depend on the number of workers.

Import this module where a job runs: Beam takes most of a second to load.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions

from features.errors import TesseraError
from features.jobs.shard import write_parquet

ShardFunction = Callable[[pl.DataFrame], pl.DataFrame]
Progress = Callable[[int, int], None]

RUNNERS = ("DirectRunner", "DaskRunner", "PrismRunner", "FlinkRunner", "SparkRunner", "PortableRunner")
_POLL_S = 0.2


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
