"""Trains a ranker in several processes of this machine, started and watched by the layer of torchrun that holds them.

torchrun's own meeting listens at every address of the machine. The processes here meet in a file, and talk over the
loopback interface alone.

If one process dies, the others are ended and the training stops with an error that names the process. The same
command goes on from the last checkpoint, to the bits of a training that was not stopped.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std, start_processes
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from features import errors
from features.device import DeviceError
from features.durable import write_directory
from features.errors import DatasetError, TesseraError, TrainingError
from features.frame import stored_frame
from models.ranker import checkpoint
from models.ranker.loading import sighted
from models.ranker.network import Ranker
from models.ranker.stored import save_ranker, save_sketch
from models.ranker.train import TRAIN, VALIDATION, Checkpointing, TrainConfig, Trained, positives_of
from models.sharded.loopback import INTERFACE, loopback
from models.sharded.messages import ERROR, PROGRESS, SPEC, RankError, RankSpec
from models.table.admission import Sketch
from models.table.engine import fused
from models.table.row_files import row_ranges
from models.table.schema import Schema

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_POLL_S = 0.5
_END_S = 5


@dataclass(frozen=True)
class Launch:
    """Places of a training in several processes.

    Attributes:
        frame: Directory of the stored frame.
        model: Directory to make for the trained ranker; see `models.ranker.stored.load_ranker`.
        checkpointing: Directory and interval of checkpoints. Files of the processes are beside it.
        watch: True writes the loss of every step; see `RankSpec`.
    """

    frame: Path
    model: Path
    checkpointing: Checkpointing
    watch: bool = False

    @property
    def work(self) -> Path:
        """Directory of the processes' files: description, progress, errors, logs."""
        return self.checkpointing.path.with_name(f".{self.checkpointing.path.name}.processes")


def train_in_processes(
    schema: Schema,
    config: TrainConfig,
    launch: Launch,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    start: Ranker | None = None,
) -> None:
    """Trains in `config.processes` processes, on the batches of one process, and writes the ranker.

    Continues from an existing checkpoint, to the bits of a training that was not stopped.

    Args:
        schema: Schema of the ranker's input.
        config: Configuration of the training.
        launch: Places of the training.
        progress: Called with (examples done, most examples in all epochs).
        start: Ranker of the same schema to start from instead of a fresh one.

    Raises:
        DatasetError: A part is empty, a label is neither 0 nor 1, or a block has fewer examples than processes.
        TrainingError: A process died, the loss is no longer a number, or the checkpoint is of another number of
            processes.
        DeviceError: The configuration asks for a GPU.
    """
    checkpoint.check_processes(launch.checkpointing.path, config.processes)
    config = _checked(schema, config, launch)
    work = launch.work
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    frame = stored_frame(launch.frame)
    positives = {
        part: positives_of(part, frame.blocks(part), tuple(config.network.tasks)) for part in (TRAIN, VALIDATION)
    }
    save_sketch(work, sighted(schema, frame, frame.blocks(TRAIN)).admission.published)
    del frame
    begin = work / "start"
    if start is not None:
        begin.mkdir()
        save_ranker(begin, schema, Trained(start, Sketch.sized(0), ()), ranges=config.processes)

    def fill(model: Path) -> None:
        spec = RankSpec(
            frame=str(launch.frame.absolute()),
            model=str(model.absolute()),
            schema=schema.to_json(),
            config=config,
            positives=positives[TRAIN],
            start="" if start is None else str(begin.absolute()),
            checkpoint=str(launch.checkpointing.path.absolute()),
            seconds=launch.checkpointing.seconds,
            watch=launch.watch,
        )
        (work / SPEC).write_bytes(msgspec.json.encode(spec))
        with _shown(work / PROGRESS, progress):
            _run(config.processes, work)

    write_directory(launch.model, fill)
    shutil.rmtree(launch.checkpointing.path, ignore_errors=True)
    if not launch.watch:
        shutil.rmtree(work)


def _checked(schema: Schema, config: TrainConfig, launch: Launch) -> TrainConfig:
    """Returns the configuration as the processes use it. Raises if several processes cannot train by it."""
    count = config.processes
    problem = f"training.processes = {count}"
    if fused("models.table.unified") is None:
        raise TesseraError(f"{problem}: several processes need TorchRec; install it, or set training.processes to 1")
    if config.device == "cuda":
        raise DeviceError(f'{problem}: several processes train on processors; use device = "cpu", or 1 process')
    if config.precision == "bfloat16":
        raise TrainingError(f'{problem}: several processes multiply in float32; set training.precision to "float32"')
    frame = stored_frame(launch.frame)
    for part in (TRAIN, VALIDATION):
        smallest = min(frame.blocks(part).heights)
        if 0 < smallest < count:
            raise DatasetError(
                f"{problem}: more than the {smallest:,} examples of the smallest block of the part {part!r}, so a "
                f"process would have none; use at most {smallest:,}"
            )
    empty = [number for number, own in enumerate(row_ranges(schema.rows, count)) if not len(own)]
    if empty:
        raise TrainingError(f"{problem}: the table's {schema.rows:,} rows leave process {empty[0]} without a row")
    return replace(config, device="cpu", precision="float32")


def _run(count: int, work: Path) -> None:
    """Runs the processes to their end. Raises TrainingError, or the error of a process."""
    with _quiet(), _handlers_kept():
        try:
            failures = _failures(count, work)
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from stopped
            raise SystemExit(128 + int(stopped.sigval)) from stopped
        finally:
            # The launcher leaves the logs of ended processes open.
            gc.collect()
    if failures:
        raise _named(failures, count, work)


def _failures(count: int, work: Path) -> dict[int, ProcessFailure]:
    """Returns how the processes failed that did, by their number, after all have ended."""
    command = ("-m", "models.sharded.rank", str(work / SPEC), str(os.getpid()))
    processes = start_processes(
        "training",
        sys.executable,
        args={rank: (*command, str(rank), str(count)) for rank in range(count)},
        envs={rank: {INTERFACE: loopback()} for rank in range(count)},
        logs_specs=DefaultLogsSpecs(log_dir=str(work / "logs"), redirects=Std.ALL),
    )
    try:
        ended = processes.wait(period=_POLL_S)
    finally:
        processes.close(timeout=_END_S)
    return dict(ended.failures) if ended else {}


def _named(failures: Mapping[int, ProcessFailure], count: int, work: Path) -> TesseraError:
    """Returns the error of the process that failed first, in its own words if it wrote them."""
    for number in range(count):
        path = work / ERROR.format(number)
        if path.is_file():
            told = msgspec.json.decode(path.read_bytes(), type=RankError)
            kind = getattr(errors, told.kind, TrainingError)
            return kind(told.message)
    # A process that loses its peer fails as well, so a process that was killed comes first.
    number, failure = min(failures.items(), key=lambda one: (one[1].exitcode > 0, one[1].timestamp))
    logs = sorted((work / "logs").rglob(f"{number}/stderr.log"))
    log = logs[-1] if logs else work / "logs"
    return TrainingError(
        f"process {number} of {count} (pid {failure.pid}) {_end_of(failure)}; its log is {log}. The same command goes "
        "on from the last checkpoint"
    )


def _end_of(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"failed with exit code {failure.exitcode}"


@contextmanager
def _shown(path: Path, progress: Callable[[int, int], None]) -> Iterator[None]:
    """Shows the processes' progress while the body runs."""
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(_POLL_S):
            with suppress(FileNotFoundError):
                progress(*msgspec.json.decode(path.read_bytes(), type=tuple[int, int]))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    progress(*msgspec.json.decode(path.read_bytes(), type=tuple[int, int]))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the launcher's own log lines and warnings from the terminal: errors are raised by name."""
    logger = logging.getLogger("torch.distributed")
    handler, before = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restores the handlers of signals that the launcher replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
