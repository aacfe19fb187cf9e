"""The two steps that a program calls as functions: `tessera.check` and `tessera.run`."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.profile import Profile, profile
from tessera.pipeline.run import RunOptions, RunResult
from tessera.pipeline.run import run as run_stages
from tessera.settings import Settings

if TYPE_CHECKING:
    from models.registry.registry import Registry


def check(dataset: Dataset | str | Path) -> Profile:
    """Reads a dataset whole and returns what it holds, as `tessera check` prints it.

    Args:
        dataset: a loaded dataset, or the path of its descriptor.

    Returns:
        Rows, nulls, cardinalities, labels, the split's sizes and warnings.

    Raises:
        DatasetError: the dataset cannot be used. The message names file, table, column and remedy.

    Example:
        >>> profile = check("data/dataset.toml")
        >>> profile.name, profile.labels.positives > 0
        ('synthetic', True)
    """
    return profile(_loaded(dataset))


def run(
    dataset: Dataset | str | Path,
    out: str | Path = "out",
    options: RunOptions | None = None,
    *,
    until: str = "publish",
    registry: "Registry | None" = None,
    console: Console | None = None,
) -> RunResult:
    """Runs the stages encode, assign, frame, train, evaluate and publish; finished stages are kept.

    Args:
        dataset: a loaded dataset, or the path of its descriptor.
        out: gets one directory per stage; a later run continues there.
        options: choices of the run; None for those of the descriptor's `[run]` table.
        until: last stage to run.
        registry: gets the bundle as a new version; None leaves the bundle in `out` alone.
        console: gets progress bars and warnings; None prints nothing.

    Returns:
        The bundle, its metrics and the seconds of each stage that was run. `bundle` is None before `publish`.

    Raises:
        DatasetError: the dataset, or an option, cannot be used.
        TesseraError: another run uses `out`, or a stage failed for a reason that the message names.

    Example:
        >>> result = run("data/dataset.toml", "out/trial", until="encode")
        >>> list(result.executed)
        ['encode']
    """
    quiet = Console(quiet=True) if console is None else console
    engines = Settings.from_environment().engine
    loaded = _loaded(dataset)
    return run_stages(loaded, Path(out), options, console=quiet, registry=registry, until=until, engines=engines)


def _loaded(dataset: Dataset | str | Path) -> Dataset:
    return dataset if isinstance(dataset, Dataset) else load_dataset(Path(dataset))
