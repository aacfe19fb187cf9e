"""Trials of a sweep in one SQLite file, drawn by Optuna's tree of Parzen estimators (Bergstra et al., NeurIPS 2011).

Only this module knows Optuna. A trial that a killed process left is taken up again under its number, with its values.
The draw of a trial depends on the seed, its number and the trials before, so a sweep that was killed draws the values
that it would have drawn.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from features.errors import TesseraError
from tessera.sweep.space import Choices, Space, applies, text_of

State = Literal["finished", "pruned", "infeasible", "failed"]
_NAME, _ID, _IDENTITY, _REPORT = "sweep", "id", "identity", "report"
_KIND = "ranker.kind"
# Trials drawn evenly before the estimators decide, and trials that prune nothing.
_EVEN_TRIALS, _UNPRUNED_TRIALS = 8, 4
_ENDS: dict[State, TrialState] = {
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "infeasible": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


class TrialReport(msgspec.Struct, frozen=True):
    """Result of one trial.

    Attributes:
        number: Number of the trial. Trial 0 is the default: the choices of the run, none varied.
        state: `finished`, `pruned` (stopped early), `infeasible` (beyond a bound) or `failed`.
        choices: Values of the trial by dotted name, as texts that `--set` takes.
        log_loss: Lowest validation log loss of its epochs; None without an epoch.
        epochs: Validation log loss after each epoch.
        bytes: Bytes of the table's weights; None if the table cannot be made.
        latency: Time to score one request over the default's in the same process; None if it was not measured.
        seconds: Seconds of the trial's training, since the last start of the process.
        why: Reason of a trial that is not finished.
        run: Id of the trial's run in MLflow.
    """

    number: int
    state: State
    choices: dict[str, str]
    log_loss: float | None = None
    epochs: tuple[float, ...] = ()
    bytes: int | None = None
    latency: float | None = None
    seconds: float = 0.0
    why: str = ""
    run: str = ""


@dataclass(frozen=True)
class Drawn:
    """A trial that is to be made.

    Attributes:
        trial: Optuna's trial.
        choices: Values of the trial by dotted name.
        report: Result that a killed process had already recorded, or None.
    """

    trial: Trial
    choices: dict[str, str]
    report: TrialReport | None = None

    @property
    def number(self) -> int:
        """Number of the trial."""
        return self.trial.number

    def is_pruned(self, epochs: Sequence[float]) -> bool:
        """Records the losses of the epochs so far, and returns True if the trial is worse than the median's."""
        known = self.trial.storage.get_trial(self.trial._trial_id).intermediate_values
        for epoch, loss in enumerate(epochs):
            if epoch not in known:
                self.trial.report(loss, epoch)
        return self.trial.should_prune()


class Study:
    """Trials of one sweep.

    Args:
        path: SQLite file; made if it is missing.
        seed: Seed of the draws.
        default_kind: Kind of the network where a trial does not vary it.
    """

    def __init__(self, path: Path, *, seed: int, default_kind: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._seed, self._kind = seed, default_kind
        address = "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")
        self._storage = optuna.storages.RDBStorage(address)
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS)
        self._study = optuna.create_study(
            storage=self._storage, study_name=_NAME, direction="minimize", load_if_exists=True, pruner=pruner
        )

    def close(self) -> None:
        """Closes the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def identify(self, identity: dict[str, Any], directory: Path) -> None:
        """Records what makes trials comparable, and refuses other trials.

        Raises:
            TesseraError: The file holds trials of another space, other data or other bounds.
        """
        known = self._study.user_attrs.get(_IDENTITY)
        if known is None:
            self._study.set_user_attr(_ID, f"sweep-{uuid.uuid4().hex[:8]}")
            self._study.set_user_attr(_IDENTITY, identity)
            return
        now = msgspec.json.decode(msgspec.json.encode(identity))
        other = [name for name in now if known.get(name) != now[name]]
        if other:
            raise TesseraError(
                f"{directory}: its trials were made with another {' and '.join(other)}, and would not be comparable; "
                "give another --out, or remove the directory"
            )

    @property
    def name(self) -> str:
        """Name of the study, which no other study has."""
        return str(self._study.user_attrs[_ID])

    @property
    def reports(self) -> list[TrialReport]:
        """Results of the trials that have ended, by number."""
        ended = [trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished()]
        return [_report(trial) for trial in ended if _REPORT in trial.user_attrs]

    def draw(self, space: Space) -> Drawn:
        """Returns the trial that a killed process left, else a new one."""
        left = [one for one in self._study.get_trials(deepcopy=False) if one.state == TrialState.RUNNING]
        number = left[0].number if left else len(self._study.get_trials(deepcopy=False))
        self._study.sampler = optuna.samplers.TPESampler(
            seed=(self._seed * 100_003 + number) % 2**32, n_startup_trials=_EVEN_TRIALS, multivariate=False
        )
        trial = Trial(self._study, left[0]._trial_id) if left else self._study.ask()
        # The first trial is the default, so that no sweep ends below it.
        choices = {} if trial.number == 0 else self._suggested(trial, space)
        return Drawn(trial, choices, _report(left[0]) if left and _REPORT in left[0].user_attrs else None)

    def _suggested(self, trial: Trial, space: Space) -> dict[str, str]:
        chosen: dict[str, str] = {}
        kind = self._kind
        if isinstance(knob := space.get(_KIND), Choices):
            chosen[_KIND] = kind = trial.suggest_categorical(_KIND, knob.values)
        for name, knob in space.items():
            if name == _KIND or not applies(name, kind):
                continue
            if isinstance(knob, Choices):
                chosen[name] = trial.suggest_categorical(name, knob.values)
            elif knob.whole:
                chosen[name] = text_of(trial.suggest_int(name, int(knob.low), int(knob.high), log=knob.log))
            else:
                # Six digits are enough for a rate, and readable in a file.
                drawn = trial.suggest_float(name, knob.low, knob.high, log=knob.log)
                chosen[name] = text_of(min(max(float(f"{drawn:.6g}"), knob.low), knob.high))
        return chosen

    def record(self, drawn: Drawn, report: TrialReport) -> None:
        """Ends a trial with its result. A process that is killed in between leaves the result to be told again."""
        drawn.trial.set_user_attr(_REPORT, msgspec.to_builtins(report))
        constraints = drawn.trial.storage.get_trial(drawn.trial._trial_id).system_attrs
        if not any(name.endswith(":bounds") for name in constraints):
            drawn.trial.set_constraint("bounds", 1.0 if report.state == "infeasible" else 0.0)
        value = report.log_loss if report.state == "finished" else None
        self._study.tell(drawn.trial, value, state=_ENDS[report.state])


def _report(trial: FrozenTrial) -> TrialReport:
    return msgspec.convert(trial.user_attrs[_REPORT], TrialReport)
