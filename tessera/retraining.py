"""Retraining: the offline job on the newest data, from the champion's run, once for each state of the data.

A directory of runs holds one run for each state of data and choices, named by its key. A retraining that was killed
goes on in the same directory from the same warm start, so it ends as one that was not killed.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.durable import write_file
from features.errors import BundleError, DatasetError
from features.jobs.engine import Engine
from features.lock import locked
from features.training_events import TRAINED, read_trained
from models.registry.registry import Registry
from tessera.code_version import code_version
from tessera.pipeline.job import Engines, Job
from tessera.pipeline.made_of import key_of
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import RunResult, run
from tessera.pipeline.warm_start import Previous

_STATE = "retrain.json"
_KEY_LETTERS = 12


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of a run's state file.

    Attributes:
        warm_start: Run that the retraining began from, relative to the directory of runs; "" without one.
        bundle: Bundle of the run once it was published and judged; "" before.
        version: Version of the bundle in the registry.
        answer: Answer of the gates; "" for a first bundle.
    """

    warm_start: str = ""
    bundle: str = ""
    version: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Retrained:
    """Result of a retraining.

    Attributes:
        directory: Directory of the run.
        warm_start: Run that it began from; None if it began from new values.
        result: Result of the run; None if there was nothing new.
        bundle, version, answer: As the state file has them.
        events: Events of the training part.
        new_events: Those that the warm start and its own warm starts were not trained on.
        removed: Older runs that were removed.
    """

    directory: Path
    warm_start: Path | None
    result: RunResult | None
    bundle: str
    version: str
    answer: str
    events: int = 0
    new_events: int = 0
    removed: tuple[Path, ...] = ()


def retrain(
    dataset: Dataset,
    runs: Path,
    options: RunOptions,
    *,
    console: Console,
    registry: Registry,
    keep: int = 3,
    engines: Engines = Engine,
) -> Retrained:
    """Trains on the dataset unless a run of the same data and choices was published, and publishes through the gates.

    Args:
        dataset: Dataset as it is now.
        runs: Directory of runs.
        options: Choices of the run. A warm start in them is the first run's; later runs begin from the champion's run.
        console: Prints progress.
        registry: Receives the bundle.
        keep: Finished runs that stay beside those of bundles with an alias.
        engines: Makes the engine of the batch jobs.

    Raises:
        TesseraError: Another retraining uses `runs`, or a stage cannot run.
    """
    runs = runs.absolute()
    with locked(runs / "retrain", wait_s=0):
        cold = replace(options, warm_start=None)
        job = Job(dataset, runs, cold, console, code_version(__name__), engines)
        directory = runs / key_of(job.data_key, job.split.model_dump(mode="json"), cold.choices())[:_KEY_LETTERS]
        state = _read(directory) or _State(warm_start=_warm_start(runs, options.warm_start, dataset, registry))
        before = runs / state.warm_start if state.warm_start else None
        if state.bundle:
            return Retrained(directory, before, None, state.bundle, state.version, state.answer)
        directory.mkdir(parents=True, exist_ok=True)
        write_file(directory / _STATE, msgspec.json.encode(state))
        result = run(
            dataset, directory, replace(options, warm_start=before), console=console, registry=registry,
            until="publish", engines=engines,
        )  # fmt: skip
        assert result.bundle is not None
        assert result.release is not None
        trained = read_trained(directory / "publish" / TRAINED)
        known = Previous(before).trained() if before else np.zeros(0, dtype=np.uint32)
        done = _State(
            state.warm_start, result.bundle.id, result.release.version, result.verdict.answer if result.verdict else ""
        )
        write_file(directory / _STATE, msgspec.json.encode(done))
        return Retrained(
            directory, before, result, done.bundle, done.version, done.answer,
            events=len(trained), new_events=len(np.setdiff1d(trained, known)),
            removed=_clean(runs, directory, keep, registry, result.release.model),
        )  # fmt: skip


def _warm_start(runs: Path, first: Path | None, dataset: Dataset, registry: Registry) -> str:
    """Returns the run of the champion in `runs`, else the newest published run, else the given one."""
    finished = _finished(runs)
    try:
        champion = registry.resolve(dataset.name).bundle
    except BundleError:
        champion = ""
    for directory, state in finished:
        if state.bundle == champion:
            return directory.name
    if finished:
        return finished[0][0].name
    return str(first.absolute()) if first is not None else ""


def _finished(runs: Path) -> list[tuple[Path, _State]]:
    """Returns the published runs with their states, newest first."""
    states = [(path.parent, _read(path.parent)) for path in runs.glob(f"*/{_STATE}")]
    found = [(directory, state) for directory, state in states if state is not None and state.bundle]
    return sorted(found, key=lambda one: -(one[0] / _STATE).stat().st_mtime_ns)


def _read(directory: Path) -> _State | None:
    path = directory / _STATE
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=_State)
    except msgspec.DecodeError as error:
        raise DatasetError(f"{path}: is no state of a retraining ({error}); remove {directory}") from error


def _clean(runs: Path, own: Path, keep: int, registry: Registry, model: str) -> tuple[Path, ...]:
    """Removes published runs beyond the newest `keep`, and those that were begun on older data and did not end.

    A run stays if its bundle has an alias, or if one of the newest began from it.
    """
    named = {release.bundle for release in registry.releases(model) if release.aliases}
    finished = _finished(runs)
    stay = {own, *(directory for directory, _ in finished[:keep])}
    stay |= {runs / state.warm_start for _, state in finished[:keep]}
    stay |= {directory for directory, state in finished if state.bundle in named}
    removed = sorted({path.parent for path in runs.glob(f"*/{_STATE}")} - stay)
    for directory in removed:
        shutil.rmtree(directory)
    return tuple(removed)
