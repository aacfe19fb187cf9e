"""Runs tasks as a Beam job, on any engine, with the same bytes; maps a function over parquet shards.

The pipeline starts from blocks of the list of tasks (Create, reshuffle, then ParDo), which every engine supports.
Without the reshuffle an engine fuses both steps, and one worker does all blocks. A task is the unit of resumption: its
output is written to a temporary name and renamed, and a task whose output exists is not done again. Since a task sees
whole shards, its output cannot depend on the number of workers.

Import this module where a job runs: Beam takes most of a second to load.
"""

import io
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam.options.pipeline_options import PipelineOptions

from features.errors import TesseraError, is_fault
from features.jobs.dask_cluster import check_workers, dask_cluster
from features.jobs.engine import BEAM_NAMES, Engine
from features.jobs.exchange import is_finished, lent
from features.jobs.shard import Sifted, read_shard, write_parquet
from features.jobs.worklist import Block, BlockCount, Failure, JobReport, RowCounts, Worklist, report
from features.storage.file import make_directory
from features.storage.location import Location, absolute, locate

Progress = Callable[[int, int], None]

_RECOVERS_S = 60.0
_TRIES = 3
_PAUSE_S = 0.5
_WORK, _REJECTED = ".job", "rejected"


ShardFunction = Callable[..., pl.DataFrame | Sifted]
Task = Callable[[Any], RowCounts]
"""Does the work that a path names, unless its output is in place, and counts its rows."""


class _DoBlock(beam.DoFn):
    """Does the tasks of a block of the work list."""

    def __init__(self, task: Task, out: str) -> None:
        self._task = task
        self._out = out

    def process(self, element: tuple[int, int, int]) -> Iterator[int]:
        block, work = Block(*element), Worklist(locate(self._out) / _WORK)
        work.begin()
        shards = work.shards(block)
        total = RowCounts(0, 0, 0)
        for shard in shards:
            try:
                rows = self._task(shard)
            except BaseException as error:
                if is_fault(error):
                    fixable = isinstance(error, TesseraError)
                    said = str(error) if fixable else f"{type(error).__name__}: {error}"
                    work.fail(Failure(shard.name, said, fixable))
                raise
            total = RowCounts(*(sum(pair) for pair in zip(total, rows, strict=True)))
        work.finish(block, BlockCount(len(shards), *total, f"{socket.gethostname()}:{os.getpid()}"))
        yield block.number


class _MapShard:
    """Task that reads a shard, applies a function, and writes an output shard of the same name."""

    def __init__(self, function: ShardFunction, out: Location, *, keeps_rows: bool) -> None:
        self._function = function
        self._out = out
        self._keeps_rows = keeps_rows

    def __call__(self, shard: Location) -> RowCounts:
        path = self._out / shard.name
        aside = path.parent / _REJECTED / path.name
        if path.exists():
            return RowCounts(_height(shard), _height(path), _height(aside) if aside.exists() else 0)
        frame = again(lambda: read_shard(shard))
        found = self._function(frame)
        sifted = found if isinstance(found, Sifted) else Sifted(found, pl.DataFrame())
        kept, rejected = sifted.kept, sifted.rejected
        if (found is sifted or self._keeps_rows) and frame.height != kept.height + rejected.height:
            raise ValueError(f"{frame.height} rows became {kept.height} and {rejected.height} that were rejected")
        if rejected.height:
            make_directory(aside.parent)
            again(lambda: write_parquet(rejected, aside))
        # Written last: a shard whose output exists is whole.
        again(lambda: write_parquet(kept, path))
        return RowCounts(frame.height, kept.height, rejected.height)


def map_shards(
    function: ShardFunction,
    shards: Sequence[Location],
    out: Location,
    *,
    label: str,
    engine: Engine | None = None,
    keeps_rows: bool = False,
    reads: Mapping[str, Location] | None = None,
    progress: Progress = lambda done, total: None,
) -> JobReport:
    """Runs `function` over every shard and writes one output shard each to `out`.

    Reading and writing is tried three times. `run_tasks` says how a job goes on after a failure. If the engine has an
    exchange, files on disk go through it, see `features.jobs.exchange`.

    Args:
        function: Picklable; shard in, shard out; must depend on nothing but the shard and what it reads.
        shards: Parquet files with distinct names, on a file system that all workers see or at an object store.
        out: Existing or new directory, on disk or at a store; output shards that exist are kept.
        label: Name of the step in the engine's views.
        engine: Engine of the job; by default this process.
        keeps_rows: True if a shard that loses or gains rows is an error.
        reads: Directories that the function reads. It gets the location of each as text, by the name of its argument.
        progress: Called with (shards done, shards) from time to time.

    Returns:
        The counts of the job.

    Raises:
        TesseraError: The engine cannot run the job, no worker begins within a minute, or the function raised such an
            error; names the shard or the engine.
        RuntimeError: The function failed, or the engine did; names the shard if there is one.
    """
    engine, out, given = engine or Engine(), absolute(out), reads or {}
    run = partial(_map, function, keeps_rows=keeps_rows, label=label, engine=engine, progress=progress)
    if not engine.exchange or not isinstance(out, Path) or is_finished(shards, out):
        return run(shards, out, given)
    make_directory(out)
    with lent(engine.exchange, shards, out, given) as seen:
        return run(*seen)


def _map(
    function: ShardFunction,
    shards: Sequence[Location],
    out: Location,
    reads: Mapping[str, Location],
    *,
    keeps_rows: bool,
    **job: Any,
) -> JobReport:
    bound = partial(function, **{name: str(absolute(directory)) for name, directory in reads.items()})
    return run_tasks(_MapShard(bound, out, keeps_rows=keeps_rows), shards, out, **job)


def run_tasks(
    task: Task,
    paths: Sequence[Location],
    out: Location,
    *,
    label: str,
    engine: Engine | None = None,
    progress: Progress = lambda done, total: None,
) -> JobReport:
    """Does a task for every path.

    If the engine fails, for example because a worker was killed, the job is submitted again with the missing blocks, as
    long as each submission finishes some. If the engine's workers share no disk with this machine, tasks on this disk
    are done in this process.

    Args:
        task: Picklable. A task may be done twice, at the same time too: it writes each file whole, its last file marks
            it as done, and its output depends on the path alone.
        paths: Paths that name the tasks.
        out: Existing or new directory that all workers see, on disk or at a store; holds the work list while the job
            runs.
        label: Name of the step in the engine's views.
        engine: Engine of the job; by default this process.
        progress: Called with (tasks done, tasks) from time to time.

    Returns:
        The counts of the job.

    Raises:
        TesseraError: As `map_shards` says.
        RuntimeError: As `map_shards` says.
    """
    out = absolute(out)
    if engine is None or (engine.exchange and isinstance(out, Path)):
        engine = Engine()
    options = _checked(engine)
    make_directory(out)
    work = Worklist(out / _WORK)
    blocks = work.create(paths)
    done = _DoBlock(task, str(out))
    try:
        while missing := [block for block in blocks if block.number not in work.finished()]:
            before = len(work.finished())
            if before:
                options = _recovered(engine)
            work.wait()
            name = f"tessera-{label}-{secrets.token_hex(4)}"
            watch = _Watch(work, len(paths), progress, engine, name)
            error: Exception = RuntimeError(f"{label}: runner {engine.name} ended early")
            try:
                with watch:
                    _submit(done, missing, label, engine, [f"--job_name={name}", *options], watch)
            except Exception as failed:
                error = failed
            watch.explain(label, error)
            if len(work.finished()) == before:
                raise error
        found = report(list(work.finished().values()))
    finally:
        work.remove()
    progress(found.shards, len(paths))
    return found


def _submit(
    mapped: beam.DoFn, blocks: Sequence[Block], label: str, engine: Engine, options: list[str], watch: "_Watch"
) -> None:
    """Runs the pipeline over blocks until it has ended."""
    with dask_cluster(engine) as added:
        pipeline = beam.Pipeline(runner=_runner(engine), options=PipelineOptions([*options, *added]))
        (
            pipeline
            | f"{label}: shards" >> beam.Create([tuple(block) for block in blocks], reshuffle=True)
            | f"{label}: map" >> beam.ParDo(mapped)
        )
        result = pipeline.run()
        watch.submitted(result)
        try:
            result.wait_until_finish()
        finally:
            # Dask's runner leaves its client open.
            if client := getattr(result, "client", None):
                client.close()


class _Watch:
    """Watcher of a submitted job: reports progress, and cancels a job that no worker begins or that a shard failed.

    An engine waits for ever for a worker that cannot start, and repeats a shard that cannot be done.
    """

    def __init__(self, work: Worklist, total: int, progress: Progress, engine: Engine, job: str) -> None:
        self._work, self._total, self._progress, self._engine, self._job = work, total, progress, engine, job
        self._result: Any = None
        self._deployed_at: float | None = None
        self._idle = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def submitted(self, result: Any) -> None:
        """Takes the result of the submission, by which the job is cancelled."""
        self._result = result

    def explain(self, label: str, error: Exception) -> None:
        """Raises the reason of a failure, where one is known, in place of the engine's own words."""
        if (failure := self._work.failure) is not None:
            kind = TesseraError if failure.fixable else RuntimeError
            raise kind(f"{label}: {failure.shard}: {failure.error}") from error
        if self._idle:
            raise TesseraError(
                f"runner {self._engine.name}: no worker began within {self._engine.starts_s:.0f} seconds; see that the "
                "cluster has free workers and that the `python` of the worker pool is that of this installation; on a "
                "slow machine raise TESSERA_WORKER_START_S"
            ) from error

    def _run(self) -> None:
        while not self._stop.wait(self._work.poll_s):
            self._progress(sum(count.shards for count in self._work.finished().values()), self._total)
            if self._result is None:
                continue
            self._idle = self._work.failure is None and self._waits_in_vain()
            if self._idle or self._work.failure is not None:
                # A cluster that no longer answers has no job to cancel.
                with suppress(TesseraError):
                    self._engine.cancel(self._job)
                self._result.cancel()
                return

    def _waits_in_vain(self) -> bool:
        """Returns True if the job has been deployed for too long without a worker; a slow submission does not count."""
        if self._work.begun or not self._engine.waits:
            return False
        if self._deployed_at is not None:
            return time.monotonic() - self._deployed_at > self._engine.starts_s
        with suppress(TesseraError):
            if self._engine.deployed(self._job):
                self._deployed_at = time.monotonic()
        return False


def again(work: Callable[[], Any]) -> Any:
    """Tries an operation on a file up to three times, since a shared file system may fail for a moment."""
    for number in range(1, _TRIES):
        try:
            return work()
        except OSError:
            time.sleep(number * _PAUSE_S)
    return work()


def _height(path: Location) -> int:
    """Returns a parquet file's number of rows, from its footer."""
    source = path if isinstance(path, Path) else io.BytesIO(path.read_bytes())
    found: int = pl.scan_parquet(source).select(pl.len()).collect().item()
    return found


def _runner(engine: Engine) -> Any:
    if engine.name == "direct":
        # DirectRunner by name first searches for a Prism binary to download; this is the in-process runner itself.
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner

        return FnApiRunner()
    if engine.name == "dask":
        from apache_beam.runners.dask.dask_runner import DaskRunner

        return DaskRunner()
    if engine.name == "flink":
        return _flink(engine)
    if engine.name == "prism" and engine.endpoint is not None:
        return BEAM_NAMES["portable"]
    return BEAM_NAMES[engine.name]


@lru_cache(maxsize=1)
def _flink(engine: Engine) -> Any:
    """Returns Beam's runner for Flink, with one job server for all jobs of this process.

    Beam would start a Java process for each job, and end them when this process ends.
    """
    from apache_beam.runners.portability.flink_runner import FlinkRunner

    class Runner(FlinkRunner):
        server: Any = None

        def default_job_server(self, options: Any) -> Any:
            self.server = self.server or super().default_job_server(options)
            return self.server

    return Runner()


def _checked(engine: Engine) -> list[str]:
    """Returns the Beam options of a job once the engine can run it, see `Engine.check`."""
    options = engine.check()
    if engine.name == "dask" and engine.endpoint is not None:
        check_workers(engine.endpoint)
    return options


def _recovered(engine: Engine) -> list[str]:
    """Returns the options for the rest of a job, once the engine has noticed which of its processes are lost."""
    give_up = time.monotonic() + _RECOVERS_S
    while True:
        try:
            return _checked(engine)
        except TesseraError:
            if time.monotonic() > give_up:
                raise
            time.sleep(_PAUSE_S)
