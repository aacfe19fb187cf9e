"""Searches the choices of `[run]` for the lowest validation log loss, trial by trial, within bounds.

Layout of OUT: `stages/` (the stages up to `frame`, one directory for each key), `sweep.db` (the trials), `trials/`
(checkpoints of a trial that has not ended), `reads.json` (the choice of the parts of an item), `best.toml`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from features.durable import make_directory, write_file
from features.errors import DatasetError, TesseraError
from features.jobs.engine import Engine
from features.lock import locked
from models.registry.registry import Registry
from tessera.code_version import code_version
from tessera.pipeline.job import Engines
from tessera.sweep.best import best_of, run_table
from tessera.sweep.space import Base, Space, as_json, check_space, default_space, read_space
from tessera.sweep.study import Drawn, Study, TrialReport
from tessera.sweep.trial import Bounds, TrialMaker

DATABASE, BEST = "sweep.db", "best.toml"
Told = Callable[[TrialReport, int], None]
"""Called with each trial that ends, and the number of trials wanted."""


@dataclass(frozen=True)
class SweepPlan:
    """Wanted trials of a sweep.

    Attributes:
        trials: Trials in all, those of earlier calls included.
        bounds: Bounds of the trials.
        over: `NAME=VALUES` each, in place of names of `[sweep]`.
    """

    trials: int
    bounds: Bounds = field(default_factory=Bounds)
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class SweepResult:
    """Result of a sweep.

    Attributes:
        directory: Directory of the sweep.
        space: Values that were tried, by name.
        trials: Results by number.
        best: Finished trial with the lowest validation log loss; None without any.
        table: Its `[run]` table; empty without any.
        made: Number of trials that this call made.
        stopped: True if an interrupt ended the sweep.
    """

    directory: Path
    space: Space
    trials: list[TrialReport]
    best: TrialReport | None
    table: str
    made: int
    stopped: bool = False

    def to_json(self) -> dict[str, Any]:
        """Returns the result as JSON."""
        return {
            "directory": str(self.directory),
            "space": as_json(self.space),
            "trials": msgspec.to_builtins(self.trials),
            "best": msgspec.to_builtins(self.best),
            "run": self.table,
            "made": self.made,
            "stopped": self.stopped,
        }


def sweep(
    base: Base,
    out: Path,
    plan: SweepPlan,
    *,
    console: Console,
    registry: Registry | None,
    engines: Engines = Engine,
    told: Told = lambda report, wanted: None,
) -> SweepResult:
    """Makes trials until there are as many as wanted. Trials train on `train`, and `validation` alone judges them.

    Args:
        base: Dataset, and the choices of all trials.
        out: Directory of the sweep; an earlier sweep in it goes on.
        plan: Wanted trials.
        console: Prints bars.
        registry: Its MLflow gets a run for each trial; None records none.
        engines: Makes the engine of the batch jobs.
        told: Called with each trial that ends.

    Raises:
        TesseraError: Another sweep uses `out`, or `out` holds trials that are not comparable.
    """
    space: Space = read_space(base, plan.over)
    make_directory(out)
    with locked(out / "sweep", wait_s=0):
        options = base.options
        maker = TrialMaker(base, out, plan.bounds, console=console, code=code_version(__name__), engines=engines)
        data_key = maker.data_key
        if plan.bounds.latency is not None and base.dataset.events.item is None:
            raise DatasetError(
                f"{base.dataset.source}: --latency times a request to rank items; [events] names no item"
            )
        if not space:
            space = default_space(base, maker.default.bytes, plan.bounds.bytes)
            check_space(base, space)
        study = Study(out / DATABASE, seed=options.seed, default_kind=options.training.network.kind)
        try:
            study.identify(_identity(base, space, plan.bounds, data_key), out)
            return _Loop(base, out, plan, space, maker, study).run(registry, told)
        finally:
            study.close()


def _identity(base: Base, space: Space, bounds: Bounds, data_key: str) -> dict[str, Any]:
    """Returns what trials of one sweep share, by the words that an error names."""
    return {
        "data, split or code": data_key,
        "space": as_json(space),
        "[run] table": {name: value for name, value in base.options.choices().items() if not name.startswith("gates")},
        "bound": msgspec.to_builtins(bounds),
    }


class _Loop:
    """Loop of one call over the trials."""

    def __init__(self, base: Base, out: Path, plan: SweepPlan, space: Space, maker: TrialMaker, study: Study) -> None:
        self._base, self._out, self._plan, self._space = base, out, plan, space
        self._maker, self._study = maker, study
        self._made = 0

    def run(self, registry: Registry | None, told: Told) -> SweepResult:
        """Makes the trials that are missing. An interrupt leaves the running trial to a later call."""
        stopped = False
        try:
            while len(self._study.reports) < self._plan.trials:
                self._next(registry, told)
        except KeyboardInterrupt:
            stopped = True
        reports = self._study.reports
        best = best_of(reports)
        table = ""
        if best is not None:
            table = run_table(self._base, best, self._maker.parts)
            write_file(self._out / BEST, (_comment(best, reports) + table).encode())
        return SweepResult(self._out, self._space, reports, best, table, self._made, stopped)

    def _next(self, registry: Registry | None, told: Told) -> None:
        drawn = self._study.draw(self._space)
        report = drawn.report
        if report is None:
            title = f"trial {drawn.number} ({drawn.number + 1}/{self._plan.trials})"
            report = self._recorded(registry, drawn, self._maker.make(drawn, title))
        self._study.record(drawn, report)
        self._maker.checkpoint(drawn).unlink(missing_ok=True)
        self._made += 1
        told(report, self._plan.trials)

    def _recorded(self, registry: Registry | None, drawn: Drawn, report: TrialReport) -> TrialReport:
        if registry is None:
            return report
        figures = {
            "validation_log_loss": report.log_loss,
            "table_bytes": report.bytes,
            "latency_ratio": report.latency,
            "seconds": report.seconds,
        }
        run = registry.trials.record(
            self._base.dataset.name,
            f"{self._study.name} {drawn.number}",
            state=report.state,
            params=report.choices,
            metrics={name: float(value) for name, value in figures.items() if value is not None},
            series={"validation_log_loss_by_epoch": report.epochs},
        )
        return msgspec.structs.replace(report, run=run)


def _comment(best: TrialReport, reports: Sequence[TrialReport]) -> str:
    default = next((one for one in reports if one.number == 0 and one.log_loss is not None), None)
    beside = f"; the default's is {default.log_loss:.5f}" if default is not None else ""
    return f"# Trial {best.number} of {len(reports)}: validation log loss {best.log_loss:.5f}{beside}.\n"


def require_trials(result: SweepResult) -> None:
    """Checks that a trial finished.

    Raises:
        TesseraError: None did; names the reasons of the last one, and the remedy.
    """
    if result.best is None and not result.stopped:
        why = result.trials[-1].why if result.trials else "there are none"
        raise TesseraError(
            f"{result.directory}: no trial finished ({why}); give a wider bound, or another space and another --out"
        )
