"""The registry of released bundles, on MLflow: versions, and the aliases that name the version of each role."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from features.durable import write_directory
from features.errors import BundleError
from features.lock import locked
from models.bundle.bundle import Bundle, load_bundle
from models.registry.documents import PAST_TAG, ROLLOUTS_TAG, Documents
from models.registry.lineage import Lineage, ModelVersion, history
from models.registry.mlflow_client import Tracking, errors_named
from models.registry.release import BUNDLE_TAG, CHALLENGER, CHAMPION, ENDED_TAG, PREVIOUS, Release
from models.registry.trials import TrialLog

_CODEBOOK_TAG, _CODEBOOK_SUFFIX = "tessera.codebook", ".codebook"
_WAIT_S, _FETCH_S = 60.0, 600.0
_MOST_WHY = 5_000


class Registry:
    """Models by the name of their dataset, versions by number, aliases by role.

    Attributes:
        documents: Documents of the releases, and experiments of the models.
        trials: Trials of sweeps.

    Args:
        uri: MLflow tracking address, `sqlite:///…` for a file.
        artifacts: Directory for bundles if the address is a local database. A tracking server has its own.
    """

    def __init__(self, uri: str, *, artifacts: Path) -> None:
        self._tracking = Tracking(uri)
        self.documents = Documents(self._tracking)
        local = uri.startswith("sqlite:")
        self._artifacts = artifacts if local else None
        self.trials = TrialLog(self._tracking, self._artifacts)
        self._lock = artifacts.with_name("registry")
        self._place = str(artifacts.parent) if local else uri
        self._database = Path(uri.removeprefix("sqlite:///")) if local else None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Excludes other processes of one home while the body reads and then changes the registry. Not reentrant.

        Raises:
            TesseraError: Another process is still changing the registry.
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
        """Registers a bundle. The first version of a model becomes its champion.

        A bundle that is registered already keeps its version, which is returned.

        Args:
            bundle: Bundle to register.
            params: Parameters of its training, by name.
            metrics: Metrics of its evaluation, by name.
            lineage: Origin of the bundle.
            trained: File with the events of the training, see `features.training_events`.

        Raises:
            BundleError: The registry is unavailable, or the disk is full.
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
        known = self._tracking.versions(model)
        for version in known:
            if version.tags.get(BUNDLE_TAG) == bundle.id:
                return self._release(model, version.version)
        tags = {BUNDLE_TAG: bundle.id} | origin.tags()
        location = None if self._artifacts is None else (self._artifacts / model).absolute().as_uri()
        run = self._tracking.create_run(model, name=bundle.id, tags=tags, location=location)
        run_id = run.info.run_id
        self._tracking.log(run_id, params=params, metrics=metrics)
        self._tracking.put_directory(run_id, bundle.directory, "bundle")
        if trained is not None:
            self._tracking.put_file(run_id, trained)
        if origin.profile:
            self._tracking.put_json(run_id, "profile.json", origin.profile)
        self._tracking.finish(run_id)
        if not known:
            self._tracking.create_model(model)
        if bundle.manifest.codebook is not None:
            tags[_CODEBOOK_TAG] = bundle.manifest.codebook
            self._register_codebook(model, bundle.manifest.codebook, run)
        version = self._tracking.create_version(
            model, source=f"{run.info.artifact_uri}/bundle", run_id=run_id, tags=tags
        )
        if not self._tracking.aliases(model):
            self._tracking.set_alias(model, CHAMPION, version.version)
        return self._release(model, version.version)

    def challenge(self, release: Release, *, verdict: dict[str, Any]) -> Release:
        """Makes a release the challenger and stores the verdict of the gates with its run."""
        self.documents.put(release, "gates.json", verdict)
        self._tracking.set_alias(release.model, CHALLENGER, release.version)
        return self._release(release.model, release.version)

    def promote(self, release: Release) -> Release:
        """Makes a release the champion. The champion before becomes `previous`.

        The alias of the champion is moved last: after a failure in between, the old champion serves.
        """
        aliases = self._tracking.aliases(release.model)
        before = aliases.get(CHAMPION)
        if before is not None and str(before) != release.version:
            self._tracking.set_alias(release.model, PREVIOUS, str(before))
        self._tracking.set_alias(release.model, CHAMPION, release.version)
        if str(aliases.get(CHALLENGER)) == release.version:
            self._tracking.delete_alias(release.model, CHALLENGER)
        if self.ended(release):
            # The reason that ended its challenge no longer holds. Its run keeps the note.
            self._tracking.delete_version_tag(release.model, release.version, ENDED_TAG)
        return self._release(release.model, release.version)

    def release(self, model: str | None, name: str) -> Release:
        """Returns the release of an alias, a version's number, or a bundle's id.

        Raises:
            BundleError: The model has no such release.
        """
        champion = self.resolve(model)
        for version in self._tracking.versions(champion.model):
            if name in (str(version.version), version.tags.get(BUNDLE_TAG)):
                return self._release(champion.model, str(version.version))
        return self.resolve(champion.model, name)

    def pulse(self, model: str) -> tuple[Any, ...]:
        """Returns a value that changes with the aliases or the experiments of a model, by one request to MLflow."""
        entity = self._tracking.model(model)
        return sorted(entity.aliases.items()), entity.tags.get(ROLLOUTS_TAG, ""), entity.tags.get(PAST_TAG, "")

    def stamp(self) -> tuple[int, ...] | None:
        """Returns a value that changes with every write to a local registry, without a request. None for a server.

        Two writes within a few milliseconds may have one stamp.
        """
        if self._database is None:
            return None
        try:
            found = self._database.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def end_challenge(self, release: Release, *, why: str) -> None:
        """Records why a release is no longer the challenger, and removes the alias if the release has it.

        Args:
            release: The release.
            why: Reason, for operators.
        """
        self._tracking.set_version_tag(release.model, release.version, ENDED_TAG, why[:_MOST_WHY])
        run_id = self._tracking.version(release.model, release.version).run_id
        self._tracking.set_run_tag(run_id, ENDED_TAG, why[:_MOST_WHY])
        if str(self._tracking.aliases(release.model).get(CHALLENGER)) == release.version:
            self._tracking.delete_alias(release.model, CHALLENGER)

    def ended(self, release: Release) -> str:
        """Returns the reason why a release is no longer the challenger, or an empty text."""
        return str(self._tracking.version(release.model, release.version).tags.get(ENDED_TAG, ""))

    def releases(self, model: str) -> list[Release]:
        """Returns all versions of a model, oldest first."""
        numbers = sorted(int(version.version) for version in self._tracking.versions(model))
        return [self._release(model, str(number)) for number in numbers]

    def lineage(self, release: Release) -> Lineage:
        """Returns the lineage of a release, without the profile of the data."""
        return Lineage.of(self._tracking.version(release.model, release.version).tags)

    def versions(self, model: str) -> list[ModelVersion]:
        """Returns all versions of a model with their history, newest first; see `history`."""
        return history(self._tracking, model)

    def models(self) -> list[str]:
        """Returns the names of all registered models, without codebooks."""
        return [name for name in self._tracking.models() if not name.endswith(_CODEBOOK_SUFFIX)]

    def codebooks(self, model: str) -> dict[str, str]:
        """Returns the codebooks of a model's bundles: id by version, oldest first."""
        versions = sorted(self._tracking.versions(model + _CODEBOOK_SUFFIX), key=lambda entity: int(entity.version))
        return {str(entity.version): entity.tags[_CODEBOOK_TAG] for entity in versions}

    def resolve(self, model: str | None, alias: str = CHAMPION) -> Release:
        """Returns the release of an alias.

        Args:
            model: Name of the model. None: the registry holds one model.
            alias: Name of the alias.

        Raises:
            BundleError: The registry has no such model or alias. The message names the existing models or aliases.
        """
        models = self.models()
        if model is None and len(models) == 1:
            model = models[0]
        if model is None or model not in models:
            raise BundleError(
                f"model {model!r}: expected one of {models or 'none yet'} in the registry {self._place}; "
                "`tessera run DATASET.toml` publishes a model, --model NAME chooses one, TESSERA_HOME or "
                "MLFLOW_TRACKING_URI names another registry"
            )
        aliases = self._tracking.aliases(model)
        if alias not in aliases:
            raise BundleError(f"model {model!r} has no {alias}; its aliases are {sorted(aliases)}")
        return self._release(model, aliases[alias])

    def open(self, release: Release, cache: Path) -> Bundle:
        """Returns a release's bundle, verified. Fetches the bundle if it is not in the cache.

        Args:
            release: Release to open.
            cache: Directory of fetched bundles.

        Raises:
            BundleError: The bundle in the registry is incomplete or altered.
        """
        destination = cache / release.bundle
        with suppress(BundleError):
            return load_bundle(destination)
        with errors_named(f"{release.bundle} into {cache}"), locked(destination, wait_s=_FETCH_S):
            # Another process may have fetched the bundle meanwhile. A damaged copy is replaced from the registry.
            with suppress(BundleError):
                return load_bundle(destination)
            shutil.rmtree(destination, ignore_errors=True)
            self._fetch(release, destination)
        return load_bundle(destination)

    def _fetch(self, release: Release, destination: Path) -> None:
        uri = self._tracking.version_uri(release.model, release.version)
        directory = destination.parent
        with errors_named(f"{uri} into {directory}"), tempfile.TemporaryDirectory(dir=directory) as aside:
            source = self._tracking.fetch(uri, Path(aside))
            bundle = load_bundle(source)
            if bundle.id != release.bundle:
                raise BundleError(
                    f"{uri} holds bundle {bundle.id}, the registry names {release.bundle}; publish it again"
                )
            write_directory(destination, partial(shutil.copytree, source, dirs_exist_ok=True))

    def _register_codebook(self, model: str, codebook: str, run: Any) -> None:
        """Registers a codebook under its own name, unless an earlier bundle had the same codebook."""
        name = model + _CODEBOOK_SUFFIX
        if codebook in self.codebooks(model).values():
            return
        self._tracking.create_model(name)
        self._tracking.create_version(
            name,
            source=f"{run.info.artifact_uri}/bundle/codebook",
            run_id=run.info.run_id,
            tags={_CODEBOOK_TAG: codebook},
        )

    def _release(self, model: str, version: str) -> Release:
        entity = self._tracking.version(model, version)
        names = tuple(
            sorted(alias for alias, number in self._tracking.aliases(model).items() if str(number) == str(version))
        )
        return Release(model, str(version), entity.tags[BUNDLE_TAG], names)
