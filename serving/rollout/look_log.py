"""Looks of a judge at an experiment, stored with the challenger's run for the console and later reports."""

from dataclasses import asdict
from typing import Any

from features.errors import TesseraError
from models.registry.registry import Registry
from serving.rollout.experiment import Experiment
from serving.rollout.judge import ExperimentState

_MOST = 240


def looks_name(experiment: Experiment) -> str:
    """Returns the name under which an experiment's looks are stored among its challenger's documents."""
    return f"rollouts/{experiment.name}-{experiment.started}.json"


class LookLog:
    """Recorder of looks; old looks are thinned out, so that those of a long experiment fit on a page."""

    def __init__(self, registry: Registry, model: str) -> None:
        self._registry = registry
        self._model = model
        self._held: dict[str, list[dict[str, Any]]] = {}

    def note(self, experiment: Experiment, standing: ExperimentState, now: float) -> None:
        """Adds a look, and writes all looks of the experiment."""
        release = self._registry.release(self._model, experiment.challenger)
        name = looks_name(experiment)
        if name not in self._held:
            self._held[name] = list((self._registry.documents.get(release, name) or {}).get("looks", ()))
        looks = self._held[name]
        looks.append({"at": now} | asdict(standing))
        if len(looks) > _MOST:
            half = len(looks) // 2
            looks[:half] = looks[:half:2]
        self._registry.documents.put(release, name, {"experiment": experiment.name, "looks": looks})


def looks_of(registry: Registry, model: str, experiment: Experiment) -> list[dict[str, Any]]:
    """Returns the looks at an experiment, oldest first; none if it was not judged, or its challenger is gone."""
    try:
        release = registry.release(model, experiment.challenger)
        return list((registry.documents.get(release, looks_name(experiment)) or {}).get("looks", ()))
    except TesseraError:
        return []
