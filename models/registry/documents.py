"""Keeps documents in the registry: JSON and pages with a version's run, experiments with a model.

The registry knows no experiment. Its callers name the type; see `serving.rollout.lifecycle`.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError, TesseraError
from features.training_events import TRAINED, read_trained
from models.registry.mlflow_client import Tracking
from models.registry.release import Release

ROLLOUTS_TAG, PAST_TAG = "tessera.rollouts", "tessera.rollouts.past"
"""Tags of a model: its running experiments, and its ended experiments, each a JSON list."""
# Longest text of a tag on every database that MLflow supports, in characters.
_MOST_TEXT = 5_000
ENCODER_REPORT, UPGRADES = "encoder-report.json", "upgrades"
"""Names of a document and of a directory of a release's run: the report and the upgrades of its encoder."""
SKEW_REPORT = "skew-report.json"
"""Name of a document of a release's run: the newest kept report of `tessera skew`."""
T = TypeVar("T", bound=msgspec.Struct)


class Documents:
    """Documents of releases and experiments of models.

    Every method raises BundleError if the registry is unavailable.

    Args:
        tracking: Client of MLflow.
    """

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    # Of a release.

    def put(self, release: Release, name: str, content: dict[str, Any]) -> None:
        """Keeps a JSON document with a release's run. A document of the same name is replaced."""
        self._tracking.put_json(self._run(release), name, content)

    def get(self, release: Release, name: str) -> dict[str, Any] | None:
        """Returns a JSON document that `put` kept, or None if there is none."""
        content = self._read(release, name)
        return None if content is None else dict(msgspec.json.decode(content))

    def put_page(self, release: Release, name: str, html: str) -> None:
        """Keeps a page with a release's run."""
        self._tracking.put_text(self._run(release), name, html)

    def log(self, release: Release, metrics: Mapping[str, float]) -> None:
        """Adds metrics to a release's run. A metric of the same name is replaced."""
        self._tracking.log(self._run(release), params={}, metrics=metrics)

    def names(self, release: Release, directory: str) -> list[str]:
        """Returns the names of the documents in a directory of a release's run, in order."""
        return sorted(self._tracking.files(self._run(release), directory))

    def trained(self, release: Release) -> NDArray[np.uint32] | None:
        """Returns the ids (K,) uint32 of the events that a release was trained on, or None if they were not kept."""
        run_id = self._run(release)
        if TRAINED not in self._tracking.files(run_id):
            return None
        with tempfile.TemporaryDirectory() as aside:
            return read_trained(self._tracking.fetch_file(run_id, TRAINED, Path(aside)))

    # Of a model.

    def running(self, model: str, kind: type[T]) -> list[T]:
        """Returns the experiments that run on a model.

        Args:
            model: Name of the model.
            kind: Type of the experiments.

        Raises:
            BundleError: The stored experiments do not have this type.
        """
        return self._experiments(model, ROLLOUTS_TAG, kind)

    def set_running(self, model: str, experiments: Sequence[msgspec.Struct]) -> None:
        """Stores the experiments that run on a model. Servers follow them.

        Raises:
            TesseraError: The experiments do not fit into a tag. Nothing is stored.
        """
        text = _text(experiments)
        if len(text) > _MOST_TEXT:
            raise TesseraError(
                f"model {model!r}: {len(experiments)} rollouts are more than the registry can hold; end one, or give "
                "them shorter ramps and names"
            )
        self._tracking.set_model_tag(model, ROLLOUTS_TAG, text)

    def ended(self, model: str, kind: type[T]) -> list[T]:
        """Returns the experiments that ended on a model, oldest first; see `running`."""
        return self._experiments(model, PAST_TAG, kind)

    def set_ended(self, model: str, experiments: Sequence[msgspec.Struct]) -> None:
        """Stores the experiments that ended on a model. The oldest are dropped until the rest fit into a tag.

        Args:
            model: Name of the model.
            experiments: The experiments, oldest first.
        """
        kept = list(experiments)
        while len(text := _text(kept)) > _MOST_TEXT:
            del kept[0]
        self._tracking.set_model_tag(model, PAST_TAG, text)

    def _experiments(self, model: str, tag: str, kind: type[T]) -> list[T]:
        text = self._tracking.model(model).tags.get(tag, "")
        try:
            return msgspec.json.decode(text, type=list[kind]) if text else []  # type: ignore[valid-type]
        except msgspec.DecodeError as error:
            raise BundleError(f"model {model!r}: the rollouts in the registry cannot be read: {error}") from error

    def _read(self, release: Release, name: str) -> bytes | None:
        run_id = self._run(release)
        if name not in self._tracking.files(run_id, name.rpartition("/")[0] or None):
            return None
        with tempfile.TemporaryDirectory() as aside:
            return self._tracking.fetch_file(run_id, name, Path(aside)).read_bytes()

    def _run(self, release: Release) -> str:
        return str(self._tracking.version(release.model, release.version).run_id)


def _text(experiments: Sequence[msgspec.Struct]) -> str:
    return msgspec.json.encode(list(experiments)).decode()
