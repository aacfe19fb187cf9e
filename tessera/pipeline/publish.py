"""Stage `publish`: writes the bundle, registers it with its origin, and judges it by the gates."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from features.content.chain import load_view
from features.content.kinds import load_encoder
from features.dataset.descriptor import CHOICES
from features.dataset.tables import forgotten_users
from features.device import label_of
from features.errors import BundleError
from features.frame import Frame
from features.history import reach_of
from features.training_events import TRAINED, event_ids, read_trained, trained_on, write_trained
from features.value.score import ScoreFormula
from models.bundle.bundle import FORMAT, Bundle, BundleParts, Training, load_bundle, write_bundle
from models.bundle.contents import VIEWS
from models.bundle.from_frame import kept_consumed, kept_history, kept_labels, trained_until, with_train_positives
from models.encoder.meaning.aspects import load_aspect
from models.encoder.meaning.concepts import load_concepts
from models.encoder.meaning.neighbours import LABELLED
from models.profile.profile import VERSION as PROFILE_VERSION
from models.profile.training import training_profile
from models.ranker.stored import load_ranker
from models.registry.documents import SKEW_REPORT
from models.registry.gate import Gates, Verdict
from models.registry.lineage import Lineage
from models.registry.registry import Registry
from models.registry.release import CHALLENGER, CHAMPION, Release
from models.semantic_id.tokens import load_tokenizer
from models.table.admission import Admission
from models.table.engine import engine
from models.table.row_files import row_files
from serving.policy.policies import check_filters
from tessera.pipeline.artifact import AGGREGATES, PROFILE, read_frame
from tessera.pipeline.compare import verdict
from tessera.pipeline.encode import aspect_directories, concept_directories
from tessera.pipeline.evaluate import read_metrics
from tessera.pipeline.job import Finished, Job
from tessera.pipeline.retrieve import tower_directory
from tessera.pipeline.stage import Advance
from tessera.pipeline.train import RANKER, correction_directory

_OTHER_DATA = "The champion was trained on other data: it is judged on rows that it was not trained on."
_UNKNOWN = "The training rows of the champion are unknown: an earlier release published it, by another split or data."


@dataclass(frozen=True)
class Origin:
    """Origin of a bundle.

    Attributes:
        data_key: Hash of the descriptor and of every file's bytes.
        split: Kind of split that chose the test part.
        options: Choices of the run, nested.
        parent: Id of the bundle that the training started from; None without a warm start.
        code: Version of the code that trained the bundle.
        engine: Engine of the table in training.
        trained: File of the events that the bundle was trained on; see `features.training_events`.
        profile: Profile of the dataset, from `features.dataset.profile`.
    """

    data_key: str
    split: str
    options: dict[str, Any]
    parent: str | None
    code: str
    engine: str
    trained: Path
    profile: dict[str, Any]


@dataclass(frozen=True)
class Ready:
    """Finished stages that a bundle needs.

    `encoded` and `assigned` are None if the items have no text, `meant` if neither concepts nor aspects are declared,
    `correction` if the run corrects nothing, `retrieved` if it trains no towers.
    """

    encoded: Finished | None
    assigned: Finished | None
    framed: Finished
    trained: Finished
    evaluated: Finished
    meant: Finished | None = None
    correction: Finished | None = None
    retrieved: Finished | None = None


def bundle(job: Job, ready: Ready) -> Bundle:
    """Runs the stage: writes the bundle, and beside it the events that the bundle was trained on."""
    config = job.options.train_config()
    encoded, assigned, framed = ready.encoded, ready.assigned, ready.framed
    choices = _resolved(job, framed if assigned else None)
    views = _views(job, encoded)
    correction = correction_directory(ready.correction)
    concepts, aspects = concept_directories(job, ready.meant), aspect_directories(ready.meant)

    def work(directory: Path, advance: Advance) -> None:
        frame = read_frame(framed.directory)
        check_filters(job.dataset, frame.items)
        trained = ready.trained.directory / RANKER
        schema, model = load_ranker(trained, config, trains=False)
        before = [job.previous.trained()] if job.previous else []
        write_trained(trained_on(frame, *before), directory / TRAINED)
        if (directory / "bundle").exists():
            return
        parts = BundleParts(
            dataset=job.dataset,
            schema=schema,
            ranker=model.ranker,
            sketch=model.sketch,
            training=Training(config.table_rate, config.batch),
            users=frame.users,
            items=with_train_positives(frame),
            history=kept_history(frame, reach_of(job.options.history_length, job.dataset.events.lag)),
            metrics=read_metrics(ready.evaluated),
            encoder=encoded.directory / "encoder" if encoded else None,
            codebook=assigned.directory / "codebook" if assigned else None,
            tokens=framed.directory / "tokens" if assigned else None,
            views=views,
            concepts=concepts,
            aspects=aspects,
            aggregates=framed.directory / AGGREGATES if schema.aggregates.columns else None,
            rows=trained if row_files(trained) else None,
            correction=correction,
            towers=tower_directory(ready.retrieved),
            labelled=kept_labels(frame, reach_of(LABELLED, job.dataset.events.lag)) if correction else None,
            consumed=kept_consumed(frame) if job.dataset.keeps_consumed else None,
            trained_until=trained_until(frame, job.dataset),
            positions=job.options.positions,
            choices=choices,
            device=model.device,
            forgotten=tuple(forgotten_users(job.dataset)),
            profile=training_profile(
                frame, schema, model.ranker, Admission(model.sketch, schema.admission), _formula(job)
            ),
        )
        write_bundle(parts, directory / "bundle")

    described = job.dataset.model_dump(mode="json", exclude={"source", *CHOICES}) | {"source": job.dataset.source.name}
    positions = [msgspec.to_builtins(position) for position in job.options.positions]
    finished = job.do(
        "publish",
        work,
        # The bundle records all choices that led to it.
        reads=tuple(job.read),
        descriptor={
            "dataset": described,
            "positions": positions,
            "format": FORMAT,
            "profile": PROFILE_VERSION,
            "views": {name: load_view(directory).id for name, directory in views.items()},
            "concepts": {name: load_concepts(directory).id for name, directory in concepts.items()},
            "aspects": {name: load_aspect(directory).id for name, directory in aspects.items()},
        },
        after={"evaluate": ready.evaluated},
    )
    return load_bundle(finished.directory / "bundle")


def _views(job: Job, encoded: Finished | None) -> dict[str, Path]:
    """Returns the directories of the run's tuned views by name. A view of another encoder is named and left out."""
    if encoded is None or not (job.out / VIEWS).is_dir():
        return {}
    encoder = load_encoder(encoded.directory / "encoder").id
    found = {}
    for directory in sorted(path for path in (job.out / VIEWS).iterdir() if path.is_dir() and "." not in path.name):
        if (source := load_view(directory).source) == encoder:
            found[directory.name] = directory
        else:
            job.warn(
                f"publish: {directory} reads vectors of {source}, not of {encoder}, and is left out; tune it again"
            )
    return found


def _resolved(job: Job, coded: Finished | None) -> dict[str, Any]:
    """Returns the choices that the stages read, with the resulting levels and codes of the Semantic IDs."""
    if coded is None:
        return dict(job.read)
    tokenizer = load_tokenizer(coded.directory / "tokens")
    return job.read | {"levels": tokenizer.levels, "codes": tokenizer.codes}


def register(job: Job, published: Bundle, framed: Finished, registry: Registry) -> tuple[Release, Verdict | None]:
    """Registers the bundle, see `Publisher.publish`."""
    origin = Origin(
        data_key=job.data_key,
        split=job.split.by,
        options=job.options.choices(),
        parent=job.previous.bundle if job.previous else None,
        code=job.code,
        engine=engine(),
        trained=job.out / "publish" / TRAINED,
        profile=msgspec.json.decode((framed.directory / PROFILE).read_bytes()),
    )
    publisher = Publisher(registry, job.console, job.out / "champion")
    return publisher.publish(published, origin, lambda: read_frame(framed.directory), job.options.gates)


class Publisher:
    """Registers bundles.

    Args:
        registry: Receives the bundles.
        console: Prints progress and warnings.
        champions: Directory to which the champion is fetched.
    """

    def __init__(self, registry: Registry, console: Console, champions: Path) -> None:
        self._registry = registry
        self._console = console
        self._champions = champions

    def publish(
        self, bundle: Bundle, origin: Origin, frame: Callable[[], Frame], gates: Gates
    ) -> tuple[Release, Verdict | None]:
        """Registers a bundle. If the gates pass, the bundle becomes the challenger.

        Args:
            bundle: Bundle to register.
            origin: Origin of the bundle.
            frame: Returns the frame of the run. Both bundles are measured on its test part.
            gates: Thresholds of the comparison with the champion.

        Returns:
            The release and the verdict. The verdict is None for a first bundle, for a bundle that has an alias
            already, and if the champion cannot be opened.
        """
        with self._console.status("publish: registering in MLflow"):
            release = self._registry.publish(
                bundle,
                trained=origin.trained,
                params={"split": origin.split} | flat(origin.options),
                metrics=quality_metrics(bundle),
                lineage=Lineage(
                    dataset=origin.data_key,
                    encoder=bundle.manifest.encoder,
                    codebook=bundle.manifest.codebook,
                    parent=origin.parent,
                    code=origin.code,
                    engine=origin.engine,
                    device=label_of(bundle.manifest.device),
                    profile=origin.profile,
                ),
            )
        if {CHAMPION, CHALLENGER} & set(release.aliases):
            return release, None
        before = self._registry.resolve(release.model)
        with self._console.status("publish: the champion on the same test set"):
            try:
                champion = self._registry.open(before, self._champions)
            except BundleError as error:
                message = (
                    f"publish: the champion cannot be opened for the comparison: {error}; the bundle has no alias, "
                    f"`tessera rollout promote {release.version}` makes it the champion"
                )
                self._console.print(Text(message, "yellow"))
                return release, None
            note = "" if self._registry.lineage(before).dataset == origin.data_key else _OTHER_DATA
            run_frame = frame()
            seen = self._seen(before, champion, bundle, origin)
            if seen is None:
                unseen, note = np.zeros(run_frame.height("test"), dtype=bool), _UNKNOWN
            else:
                unseen = ~np.isin(event_ids(run_frame, "test"), np.concatenate([seen, read_trained(origin.trained)]))
            served = self._registry.documents.get(before, SKEW_REPORT) if gates.skew else None
            judged = verdict(champion, bundle, run_frame, gates, note=note, unseen=unseen, served=served)
        if judged.passed:
            return self._registry.challenge(release, verdict=judged.to_json()), judged
        self._registry.documents.put(release, "gates.json", judged.to_json())
        return release, judged

    def _seen(self, before: Release, champion: Bundle, bundle: Bundle, origin: Origin) -> NDArray[np.uint32] | None:
        """Returns the events that the champion was trained on; None if they are unknown.

        A champion that an earlier version of Tessera published has no record of them. If its split and its data are
        those of the new bundle, and the split is not random, both were trained on the same events.
        """
        recorded = self._registry.documents.trained(before)
        if recorded is not None:
            return recorded
        same = self._registry.lineage(before).dataset == origin.data_key
        split = bundle.dataset.split
        alike = champion.dataset.split == split and split.by != "random"
        return read_trained(origin.trained) if same and alike else None


def _formula(job: Job) -> ScoreFormula | None:
    tasks = job.dataset.events.tasks
    return None if tasks is None else tasks.formula()


def flat(options: dict[str, Any]) -> dict[str, str]:
    """Returns nested options by dotted name, each cut to the 500 characters that MLflow takes."""
    flattened: dict[str, str] = {}
    pending: list[tuple[str, Any]] = [("", options)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(f"{name}.{key}".lstrip("."), below) for key, below in value.items()]
        else:
            flattened[name] = str(value)[:500]
    return flattened


def quality_metrics(bundle: Bundle) -> dict[str, float]:
    """Returns the measurements of a bundle's ranker on the test part, by part and name, and those of several tasks."""
    metrics = bundle.manifest.metrics
    by_part = dict(metrics["quality"]["ranker"])
    for task, quality in metrics.get("tasks", {}).items():
        by_part |= {f"task.{task}.{part}": measured for part, measured in quality.items()}
    return {
        f"{part}.{name}": value
        for part, measured in by_part.items()
        for name, value in measured.items()
        if value is not None
    }
