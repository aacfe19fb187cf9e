"""The registry of released bundles, on MLflow: versions, metrics, and the aliases that say which one serves."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.durable import write_directory
from features.errors import BundleError
from features.lock import locked
from features.training_events import TRAINED, read_trained
from models.bundle.bundle import Bundle, load_bundle
from models.registry.mlflow_client import open_client, told

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
"""Who serves, who wants to, and who served before: what a rollback goes back to."""
_BUNDLE_TAG, _CODEBOOK_TAG = "tessera.bundle", "tessera.codebook"
_CODEBOOK_SUFFIX = ".codebook"
_ORIGIN = ("encoder", "codebook", "parent", "code", "engine")
_PAGE = 100
_WAIT_S, _FETCH_S = 60.0, 600.0
_ROLLOUTS_TAG, _PAST_TAG, _ENDED_TAG = "tessera.rollouts", "tessera.rollouts.past", "tessera.rollout"


@dataclass(frozen=True)
class Lineage:
    """Where a bundle comes from.

    Attributes:
        dataset: hash of the descriptor and of every file's bytes.
        encoder, codebook: ids, or None.
        parent: id of the bundle that it was warm-started from, or None.
        code: version of the code and libraries that made it, see `tessera.code_version`; None of earlier releases.
        engine: of the table in training, `torchrec` or `plain`; None of earlier releases.
        profile: what the data were, as `tessera check --json` has it.
    """

    dataset: str
    encoder: str | None = None
    codebook: str | None = None
    parent: str | None = None
    code: str | None = None
    engine: str | None = None
    profile: dict[str, Any] = field(default_factory=dict)

    def tags(self) -> dict[str, str]:
        """As MLflow keeps them."""
        named = {name: getattr(self, name) for name in ("dataset", *_ORIGIN)}
        return {f"tessera.{name}": value for name, value in named.items() if value}


@dataclass(frozen=True)
class ModelVersion:
    """A registered version with its history, for those who look.

    Attributes:
        created: seconds since 1970.
        ended: why it is challenger no more; empty where nothing was noted.
        metrics: of its run, by name.
    """

    version: str
    bundle: str
    aliases: tuple[str, ...]
    created: float
    ended: str
    lineage: Lineage
    metrics: dict[str, float]


@dataclass(frozen=True)
class Release:
    """One registered version of a model."""

    model: str
    version: str
    bundle: str
    aliases: tuple[str, ...]


class Registry:
    """Models by the name of their dataset, versions by number, aliases by role.

    Args:
        uri: an MLflow tracking address, `sqlite:///…` for a file.
        artifacts: directory for bundles where the address is a local database; a tracking server has its own.
    """

    def __init__(self, uri: str, *, artifacts: Path) -> None:
        self._client: Any = open_client(uri)
        local = uri.startswith("sqlite:")
        self._artifacts = artifacts if local else None
        self._lock = artifacts.with_name("registry")
        self._place = str(artifacts.parent) if local else uri

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Excludes other processes of one home from a change that reads first; not reentrant.

        Raises:
            TesseraError: another process is still changing the registry.
        """
        with locked(self._lock, wait_s=_WAIT_S):
            yield

    def publish(
        self,
        bundle: Bundle,
        *,
        params: dict[str, Any],
        metrics: dict[str, float],
        lineage: Lineage | None = None,
        trained: Path | None = None,
    ) -> Release:
        """Registers a bundle with its metrics; the first version of a model becomes its champion.

        `trained` is the file of the events that it was trained on, see `features.training_events`.

        Publishing the same bundle again returns the version it has.
        """
        with self.changing():
            return self._publish(bundle, params=params, metrics=metrics, lineage=lineage, trained=trained)

    def _publish(
        self,
        bundle: Bundle,
        *,
        params: dict[str, Any],
        metrics: dict[str, float],
        lineage: Lineage | None,
        trained: Path | None,
    ) -> Release:
        origin = lineage or Lineage(dataset="", encoder=bundle.manifest.encoder, codebook=bundle.manifest.codebook)
        model = bundle.dataset.name
        known = self._versions(model)
        for version in known:
            if version.tags.get(_BUNDLE_TAG) == bundle.id:
                return self._release(model, version.version)
        tags = {_BUNDLE_TAG: bundle.id} | origin.tags()
        run = self._client.create_run(self._experiment(model), tags=tags, run_name=bundle.id)
        run_id = run.info.run_id
        for name, value in params.items():
            self._client.log_param(run_id, name, value)
        for name, metric in metrics.items():
            self._client.log_metric(run_id, name, metric)
        self._client.log_artifacts(run_id, str(bundle.directory), "bundle")
        if trained is not None:
            self._client.log_artifact(run_id, str(trained))
        if origin.profile:
            self._client.log_dict(run_id, origin.profile, "profile.json")
        self._client.set_terminated(run_id)
        if not known:
            self._create_model(model)
        if bundle.manifest.codebook is not None:
            tags[_CODEBOOK_TAG] = bundle.manifest.codebook
            self._register_codebook(model, bundle.manifest.codebook, run)
        version = self._client.create_model_version(
            model, source=f"{run.info.artifact_uri}/bundle", run_id=run_id, tags=tags
        )
        if not self._aliases(model):
            self._client.set_registered_model_alias(model, CHAMPION, version.version)
        return self._release(model, version.version)

    def challenge(self, release: Release, *, verdict: dict[str, Any]) -> Release:
        """Makes a release the challenger; `verdict`, of the gates, is kept with it."""
        self.record(release, "gates.json", verdict)
        self._client.set_registered_model_alias(release.model, CHALLENGER, release.version)
        return self._release(release.model, release.version)

    def record(self, release: Release, name: str, content: dict[str, Any]) -> None:
        """Keeps a JSON document with a release's run."""
        run_id = self._client.get_model_version(release.model, release.version).run_id
        self._client.log_dict(run_id, content, name)

    def promote(self, release: Release) -> Release:
        """Makes a release the champion; the one before becomes `previous`.

        The new champion is named last, so that whoever fails in between leaves the old one serving.
        """
        aliases = self._aliases(release.model)
        before = aliases.get(CHAMPION)
        if before is not None and str(before) != release.version:
            self._client.set_registered_model_alias(release.model, PREVIOUS, str(before))
        self._client.set_registered_model_alias(release.model, CHAMPION, release.version)
        if str(aliases.get(CHALLENGER)) == release.version:
            self._client.delete_registered_model_alias(release.model, CHALLENGER)
        if self.ended(release):
            # What once ended its challenge is past; its run keeps the note.
            self._client.delete_model_version_tag(release.model, release.version, _ENDED_TAG)
        return self._release(release.model, release.version)

    def release(self, model: str | None, name: str) -> Release:
        """The release of an alias, a version's number, or a bundle's id.

        Raises:
            BundleError: there is none.
        """
        champion = self.resolve(model)
        for version in self._versions(champion.model):
            if name in (str(version.version), version.tags.get(_BUNDLE_TAG)):
                return self._release(champion.model, str(version.version))
        return self.resolve(champion.model, name)

    def pulse(self, model: str) -> tuple[Any, ...]:
        """What servers follow, to be compared with what it was: the aliases and the experiments; one question."""
        found = self._client.get_registered_model(model)
        return sorted(found.aliases.items()), found.tags.get(_ROLLOUTS_TAG, ""), found.tags.get(_PAST_TAG, "")

    def rollouts(self, model: str) -> str:
        """The experiments that run on a model, as they were set; an empty text where none does."""
        return str(self._client.get_registered_model(model).tags.get(_ROLLOUTS_TAG, ""))

    def set_rollouts(self, model: str, text: str) -> None:
        """Sets what `rollouts` gives; servers follow it."""
        self._client.set_registered_model_tag(model, _ROLLOUTS_TAG, text)

    def ended_rollouts(self, model: str) -> str:
        """The experiments that ended on a model, as they were set; an empty text where none did."""
        return str(self._client.get_registered_model(model).tags.get(_PAST_TAG, ""))

    def set_ended_rollouts(self, model: str, text: str) -> None:
        """Sets what `ended_rollouts` gives."""
        self._client.set_registered_model_tag(model, _PAST_TAG, text)

    def record_page(self, release: Release, name: str, html: str) -> None:
        """Keeps a page with a release's run."""
        run_id = self._client.get_model_version(release.model, release.version).run_id
        self._client.log_text(run_id, html, name)

    def end_challenge(self, release: Release, *, why: str) -> None:
        """Notes with a release why it is challenger no more, and takes the alias away where it has it."""
        self._client.set_model_version_tag(release.model, release.version, _ENDED_TAG, why[:5_000])
        run_id = self._client.get_model_version(release.model, release.version).run_id
        self._client.set_tag(run_id, _ENDED_TAG, why[:5_000])
        if str(self._aliases(release.model).get(CHALLENGER)) == release.version:
            self._client.delete_registered_model_alias(release.model, CHALLENGER)

    def ended(self, release: Release) -> str:
        """Why a release is challenger no more; an empty text where nothing was noted."""
        return str(self._client.get_model_version(release.model, release.version).tags.get(_ENDED_TAG, ""))

    def releases(self, model: str) -> list[Release]:
        """All versions of a model, oldest first."""
        numbers = sorted(int(version.version) for version in self._versions(model))
        return [self._release(model, str(number)) for number in numbers]

    def lineage(self, release: Release) -> Lineage:
        """Where a release's bundle came from; the profile is left with its run."""
        tags = self._client.get_model_version(release.model, release.version).tags
        found = {name: tags.get(f"tessera.{name}") for name in _ORIGIN}
        return Lineage(dataset=tags.get("tessera.dataset", ""), **found)

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions of a model with their history, the newest first; the profiles are left with their runs."""
        aliases: dict[str, list[str]] = {}
        for alias, number in sorted(self._aliases(model).items()):
            aliases.setdefault(str(number), []).append(alias)
        runs = {run.info.run_id: run for run in _all(self._client.search_runs, [self._experiment(model)])}
        found: list[ModelVersion] = []
        for one in sorted(self._versions(model), key=lambda one: -int(one.version)):
            origin = {name: one.tags.get(f"tessera.{name}") for name in _ORIGIN}
            found.append(
                ModelVersion(
                    version=str(one.version),
                    bundle=one.tags[_BUNDLE_TAG],
                    aliases=tuple(aliases.get(str(one.version), ())),
                    created=one.creation_timestamp / 1_000,
                    ended=one.tags.get(_ENDED_TAG, ""),
                    lineage=Lineage(dataset=one.tags.get("tessera.dataset", ""), **origin),
                    metrics=dict(runs[one.run_id].data.metrics) if one.run_id in runs else {},
                )
            )
        return found

    def recorded(self, release: Release, name: str) -> dict[str, Any] | None:
        """A JSON document that `record` kept; None where there is none."""
        run_id = self._client.get_model_version(release.model, release.version).run_id
        directory = name.rpartition("/")[0] or None
        if name not in {found.path for found in self._client.list_artifacts(run_id, directory)}:
            return None
        with tempfile.TemporaryDirectory() as aside:
            path = self._client.download_artifacts(run_id, name, aside)
            return dict(msgspec.json.decode(Path(path).read_bytes()))

    def trained(self, release: Release) -> NDArray[np.uint32] | None:
        """Ids (K,) of the events that a release was trained on; None where whoever published it did not say."""
        run_id = self._client.get_model_version(release.model, release.version).run_id
        if TRAINED not in {found.path for found in self._client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory() as aside:
            return read_trained(Path(self._client.download_artifacts(run_id, TRAINED, aside)))

    def models(self) -> list[str]:
        """The names of all registered models; codebooks are none."""
        names = [found.name for found in _all(self._client.search_registered_models)]
        return [name for name in names if not name.endswith(_CODEBOOK_SUFFIX)]

    def codebooks(self, model: str) -> dict[str, str]:
        """The codebooks that a model's bundles need or needed: id by version, oldest first."""
        found = self._versions(model + _CODEBOOK_SUFFIX)
        return {str(one.version): one.tags[_CODEBOOK_TAG] for one in sorted(found, key=lambda one: int(one.version))}

    def resolve(self, model: str | None, alias: str = CHAMPION) -> Release:
        """Finds the version an alias stands for; without a model, the only model there is.

        Raises:
            BundleError: no such model or alias; says which there are.
        """
        models = self.models()
        if model is None and len(models) == 1:
            model = models[0]
        if model is None or model not in models:
            raise BundleError(
                f"model {model!r}: expected one of {models or 'none yet'} in the registry {self._place}; "
                "`tessera run DATASET.toml` makes one, --model NAME chooses one, TESSERA_HOME or MLFLOW_TRACKING_URI "
                "names another registry"
            )
        aliases = self._aliases(model)
        if alias not in aliases:
            raise BundleError(f"model {model!r} has no {alias}; its aliases are {sorted(aliases)}")
        return self._release(model, aliases[alias])

    def open(self, release: Release, cache: Path) -> Bundle:
        """Fetches a release's bundle, into `cache` where it is not there yet, and checks it.

        Raises:
            BundleError: what the registry has is incomplete or altered.
        """
        destination = cache / release.bundle
        with suppress(BundleError):
            return load_bundle(destination)
        with told(f"{release.bundle} into {cache}"), locked(destination, wait_s=_FETCH_S):
            # Another process may have fetched it meanwhile. A damaged copy is replaced: the registry's may be sound.
            with suppress(BundleError):
                return load_bundle(destination)
            shutil.rmtree(destination, ignore_errors=True)
            self._fetch(release, destination)
        return load_bundle(destination)

    def _fetch(self, release: Release, destination: Path) -> None:
        from mlflow.artifacts import download_artifacts

        cache = destination.parent
        version = self._client.get_model_version(release.model, release.version)
        uri = self._client.get_model_version_download_uri(release.model, version.version)
        with told(f"{uri} into {cache}"), tempfile.TemporaryDirectory(dir=cache) as aside:
            source = Path(download_artifacts(artifact_uri=uri, tracking_uri=self._client.tracking_uri, dst_path=aside))
            found = load_bundle(source)
            if found.id != release.bundle:
                raise BundleError(
                    f"{uri} holds bundle {found.id}, the registry names {release.bundle}; publish it anew"
                )
            write_directory(destination, partial(shutil.copytree, source, dirs_exist_ok=True))

    def _experiment(self, model: str) -> str:
        found = self._client.get_experiment_by_name(model)
        if found is not None:
            return str(found.experiment_id)
        location = None if self._artifacts is None else (self._artifacts / model).absolute().as_uri()
        return str(self._client.create_experiment(model, artifact_location=location))

    def _create_model(self, model: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _register_codebook(self, model: str, codebook: str, run: Any) -> None:
        """Registers a codebook that no earlier bundle came with, under a name of its own."""
        name = model + _CODEBOOK_SUFFIX
        if codebook in self.codebooks(model).values():
            return
        self._create_model(name)
        self._client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/bundle/codebook",
            run_id=run.info.run_id,
            tags={_CODEBOOK_TAG: codebook},
        )

    def _versions(self, model: str) -> list[Any]:
        quote = '"' if "'" in model else "'"
        return _all(self._client.search_model_versions, f"name = {quote}{model}{quote}")

    def _aliases(self, model: str) -> dict[str, str]:
        return dict(self._client.get_registered_model(model).aliases)

    def _release(self, model: str, version: str) -> Release:
        found = self._client.get_model_version(model, version)
        names = tuple(sorted(alias for alias, number in self._aliases(model).items() if str(number) == str(version)))
        return Release(model, str(version), found.tags[_BUNDLE_TAG], names)


def _all(search: Callable[..., Any], *arguments: Any) -> list[Any]:
    """All results of a search, page by page: MLflow gives so many at a time."""
    found: list[Any] = []
    token = None
    while True:
        page = search(*arguments, max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
