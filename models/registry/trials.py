"""Trials of a sweep in MLflow: one run each, in an experiment beside that of the model's bundles."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.registry.mlflow_client import Tracking

SUFFIX = ".sweep"
"""Suffix of the MLflow experiment of a model's trials."""
_TRIAL_TAG = "tessera.trial"
_STATE_TAG = "tessera.trial.state"
# Letters that MLflow accepts in names of parameters and metrics on every system.
_OTHER = re.compile(r"[^\w\-./ ]")


class TrialLog:
    """Trials of sweeps by the name of their model. Every method raises BundleError if MLflow is unavailable.

    Args:
        tracking: Client of MLflow.
        artifacts: Directory for artifacts if the address is a local database; None for a server.
    """

    def __init__(self, tracking: Tracking, artifacts: Path | None) -> None:
        self._tracking = tracking
        self._artifacts = artifacts

    def record(
        self,
        model: str,
        trial: str,
        *,
        state: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        series: Mapping[str, Sequence[float]],
    ) -> str:
        """Records a trial as a run and returns the run's id. A trial that was recorded already keeps its run.

        Args:
            model: Name of the model.
            trial: Name of the trial, unique over the sweeps of the model.
            state: End of the trial, a tag of the run.
            params: Values of the trial by name.
            metrics: Results by name.
            series: Results of each epoch by name.
        """
        experiment = f"{model}{SUFFIX}"
        location = None if self._artifacts is None else (self._artifacts / experiment).absolute().as_uri()
        run_id = self._known(experiment, trial)
        if run_id is None:
            tags = {_TRIAL_TAG: trial}
            run = self._tracking.create_run(experiment, name=trial, tags=tags, location=location)
            run_id = str(run.info.run_id)
        self._tracking.set_run_tag(run_id, _STATE_TAG, state)
        named = {_OTHER.sub("_", name): value for name, value in params.items()}
        self._tracking.log(run_id, params=named, metrics=metrics)
        for name, values in series.items():
            self._tracking.log_series(run_id, name, values)
        self._tracking.finish(run_id)
        return run_id

    def _known(self, experiment: str, trial: str) -> str | None:
        runs = self._tracking.runs(experiment)
        return next((str(run.info.run_id) for run in runs if run.data.tags.get(_TRIAL_TAG) == trial), None)
