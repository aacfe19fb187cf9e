"""`tessera encoder tune`: fits a view of a run's vectors by pairs of items that belong together.

    OUT/views/NAME/            the view, see `features.content.chain.View`
    OUT/views/NAME/tune.json   its pairs, choices and recalls
    OUT/views/.NAME.state      the state of a fit that was stopped

The run's stages are only read. A view appears whole or not at all, and the earlier view of that name stays until then.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from features.content.chain import BASE, View, load_view
from features.durable import recover_directory, replace_directory
from features.errors import DatasetError
from features.lock import locked
from models.bundle.contents import VIEWS
from models.encoder.merge import Weights, best_weights, merge
from models.encoder.tune import tune
from models.encoder.tuning.options import TuneOptions
from models.encoder.tuning.rows import held_out_recall
from tessera.encoders.run_items import CO_LIKED, RunItems
from tessera.pipeline.artifact import write_json
from tessera.pipeline.stage import finished_key

REPORT = "tune.json"
SIMILAR = "similar"
"""Name of the view that answers which items are like an item."""


@dataclass(frozen=True)
class ViewOptions:
    """Choices of a view.

    Attributes:
        name: Name of the view.
        pairs: Sources of pairs; each batch of the fit is of one source.
        merge: Names of two tuned views to average instead of a fit, or empty.
        tune: Choices of the fit.
    """

    name: str = SIMILAR
    pairs: tuple[str, ...] = (CO_LIKED,)
    merge: tuple[str, ...] = ()
    tune: TuneOptions = field(default_factory=TuneOptions)


@dataclass(frozen=True)
class TunedView:
    """Result of a tune.

    Attributes:
        directory: Directory of the view.
        view: The view; without a step if no head was better than none.
        pairs: Number of pairs by source.
        before: Recall of held-out items without a head, the mean over the sources.
        after: The same with the head of the chosen round. For a merged view the mean recall of the merged head.
        rounds: Rounds of the chosen head; 0 if there is none or the view is merged.
        weights: Weights of the two heads of a merged view, or None.
    """

    directory: Path
    view: View
    pairs: dict[str, int]
    before: float
    after: float
    rounds: int
    weights: Weights | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain objects."""
        described = asdict(self)
        return described | {
            "directory": str(self.directory),
            "view": {"name": self.view.name, "id": self.view.id, "steps": [step.id for step in self.view.steps]},
        }


def tune_view(
    run: Path, options: ViewOptions, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> TunedView:
    """Fits a view and writes it into the run's directory; `tessera publish` then puts it into the bundle.

    Args:
        run: Directory of a run with the stages `encode` and `frame`.
        options: Choices.
        progress: Called after each round with the finished rounds and the most that may follow.

    Raises:
        TesseraError: A stage or a view is missing, a source gives no pair, or another tune holds the view.
    """
    for stage in ("encode", "frame"):
        finished_key(run / stage)
    directory = view_directory(run, options.name)
    with locked(directory, wait_s=0):
        recover_directory(directory)
        catalogue = RunItems(run)
        made = _merged(run, catalogue, options) if options.merge else _fitted(catalogue, directory, options, progress)
        _write(made, options)
    return made


def view_directory(run: Path, name: str) -> Path:
    """Returns the directory of a view of a run.

    Raises:
        DatasetError: The name is `base`, or holds another character than letters, digits, `-` and `_`.
    """
    if name == BASE or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DatasetError(
            f"view {name!r}: expected letters, digits, '-' and '_' alone, and not '{BASE}'; choose another name"
        )
    return run / VIEWS / name


def _fitted(
    catalogue: RunItems, directory: Path, options: ViewOptions, progress: Callable[[int, int], None]
) -> TunedView:
    tasks = catalogue.tasks(options.pairs, options.tune.seed)
    tuned = tune(tasks, options.tune, checkpoint=_state(directory), progress=progress)
    view = View(options.name, catalogue.encoder_id, tuned.steps)
    pairs = {source: task.pairs for source, task in zip(options.pairs, tasks, strict=True)}
    return TunedView(directory, view, pairs, tuned.recalls[0], tuned.recalls[tuned.rounds], tuned.rounds)


def _merged(run: Path, catalogue: RunItems, options: ViewOptions) -> TunedView:
    if len(options.merge) != 2:
        raise DatasetError(f"--merge names two views, got {', '.join(options.merge)}")
    views, sources = [], []
    for name in options.merge:
        directory = view_directory(run, name)
        view = load_view(directory)
        if view.source != catalogue.encoder_id:
            raise DatasetError(
                f"{directory} reads vectors of {view.source}, not of {catalogue.encoder_id}; tune it again"
            )
        described = _read_report(directory)
        views.append(view)
        sources.append(described["pairs"])
    tasks = (catalogue.tasks(sources[0], options.tune.seed)[0], catalogue.tasks(sources[1], options.tune.seed)[0])
    first, second = views
    weights = best_weights(first.steps, second.steps, tasks, options.tune.seed)
    merged = View(options.name, catalogue.encoder_id, merge(first.steps, second.steps, weights))
    before, after = (
        float(np.mean([held_out_recall(view.of(task.vectors), task, options.tune.seed) for task in tasks]))
        for view in (View(BASE, catalogue.encoder_id), merged)
    )
    pairs = {task.name: task.pairs for task in tasks}
    return TunedView(view_directory(run, options.name), merged, pairs, before, after, 0, weights)


def _read_report(directory: Path) -> dict[str, Any]:
    try:
        described: dict[str, Any] = msgspec.json.decode((directory / REPORT).read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise DatasetError(
            f"{directory}: no view that `tessera encoder tune` wrote ({error}); tune it first"
        ) from error
    return described


def _state(directory: Path) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    return directory.with_name(f".{directory.name}.state")


def _write(made: TunedView, options: ViewOptions) -> None:
    aside = made.directory.with_name(f".{made.directory.name}.made")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    made.view.save(aside)
    write_json(aside / REPORT, made.to_json() | {"options": asdict(options)})
    replace_directory(aside, made.directory)
    _state(made.directory).unlink(missing_ok=True)
