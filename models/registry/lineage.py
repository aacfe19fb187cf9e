"""Reads the lineage and the history of registered versions: origin, metrics and end of each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from models.registry.mlflow_client import Tracking
from models.registry.release import BUNDLE_TAG, ENDED_TAG

_DATASET_TAG = "tessera.dataset"
_ORIGIN = ("encoder", "codebook", "parent", "code", "engine", "device")


@dataclass(frozen=True)
class Lineage:
    """Origin of a bundle.

    Attributes:
        dataset: Hash of the descriptor and of every file's bytes.
        encoder, codebook: Ids, or None.
        parent: Id of the bundle whose table started the training (warm start), or None.
        code: Version of the code and libraries of the run, see `tessera.code_version`. None in earlier releases.
        engine: Engine of the table in training, `torchrec` or `plain`. None in earlier releases.
        device: Device that trained the ranker: `cpu`, or a card with its driver and versions. None in earlier releases.
        profile: Profile of the data, in the form of `tessera check --json`.
    """

    dataset: str
    encoder: str | None = None
    codebook: str | None = None
    parent: str | None = None
    code: str | None = None
    engine: str | None = None
    device: str | None = None
    profile: dict[str, Any] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """Returns the tags under which MLflow keeps the lineage. The profile is a document of the run."""
        named = {name: getattr(self, name) for name in ("dataset", *_ORIGIN)}
        return {f"tessera.{name}": value for name, value in named.items() if value}

    @staticmethod
    def of(tags: Mapping[str, str]) -> "Lineage":
        """Returns the lineage of a version's tags, without the profile."""
        origin: dict[str, Any] = {name: tags.get(f"tessera.{name}") for name in _ORIGIN}
        return Lineage(tags.get(_DATASET_TAG, ""), **origin)


@dataclass(frozen=True)
class ModelVersion:
    """A registered version with its history.

    Attributes:
        version: Number of the version, as text.
        bundle: Id of the bundle.
        aliases: Aliases of the version, sorted.
        created: Time of the registration, Unix seconds.
        ended: Reason why the version is no longer the challenger. Empty without a recorded reason.
        lineage: Origin of the bundle.
        metrics: Metrics of the run, by name.
    """

    version: str
    bundle: str
    aliases: tuple[str, ...]
    created: float
    ended: str
    lineage: Lineage
    metrics: dict[str, float]


def history(tracking: Tracking, model: str) -> list[ModelVersion]:
    """Returns all versions of a model, newest first, without profiles.

    Raises:
        BundleError: The registry is unavailable.
    """
    aliases: dict[str, list[str]] = {}
    for alias, number in sorted(tracking.aliases(model).items()):
        aliases.setdefault(number, []).append(alias)
    runs = {run.info.run_id: run for run in tracking.runs(model)}
    return [
        ModelVersion(
            version=str(entity.version),
            bundle=entity.tags[BUNDLE_TAG],
            aliases=tuple(aliases.get(str(entity.version), ())),
            created=entity.creation_timestamp / 1_000,
            ended=entity.tags.get(ENDED_TAG, ""),
            lineage=Lineage.of(entity.tags),
            metrics=dict(runs[entity.run_id].data.metrics) if entity.run_id in runs else {},
        )
        for entity in sorted(tracking.versions(model), key=lambda entity: -int(entity.version))
    ]
