"""The offline job: encode → assign → frame → train → evaluate → publish, stage by stage."""

import resource
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from features.content import kinds as encoders
from features.dataset.descriptor import Dataset
from features.dataset.profile import few_known
from features.dataset.split import PARTS
from features.dataset.tables import read_events, read_items, read_users
from features.durable import write_directory
from features.errors import DatasetError
from features.frame import build_frame
from features.history import DEFAULT_LENGTH
from features.jobs.encode import encode_catalogue
from features.jobs.shard import read_shards, write_parquet, write_shards
from features.training_events import TRAINED, trained_on, write_trained
from models.bundle.bundle import FORMAT, Bundle, BundleParts, LogPosition, Training, load_bundle, write_bundle
from models.ranker.evaluate import by_item_novelty, rate_baselines
from models.ranker.loading import assembler, examples
from models.ranker.train import Checkpointing, TrainConfig, predict, train
from models.registry.gate import Gates, Verdict
from models.registry.registry import Registry
from models.registry.release import Release
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.codebook.quantizer import recommended_shape
from models.semantic_id.report.health import codebook_health, collapse_alarm, held_out_items
from models.semantic_id.tokens import Scheme
from models.table.admission import Admission
from models.table.default_schema import TableOptions, default_schema, hashed_id_schema
from models.table.engine import engine
from tessera.code_version import code_version
from tessera.pipeline.artifact import (
    InputFiles,
    kept_history,
    load_ranker,
    read_frame,
    save_ranker,
    trained_until,
    with_content,
    with_tokens,
    with_train_positives,
    write_json,
)
from tessera.pipeline.publish import Origin, Publisher
from tessera.pipeline.stage import Advance, Stages, key_of
from tessera.pipeline.warm_start import Previous

STAGES = ("encode", "assign", "frame", "train", "evaluate", "publish")
_RANKER, _HASHED_ID = "ranker", "hashed-id"


@dataclass(frozen=True)
class RunOptions:
    """Options of a run; all other choices come from the dataset.

    Attributes:
        seed: of everything random, the split included where it is random.
        encoder, encoder_model, encoder_dim: how content becomes vectors.
        runner, runner_options: where the Beam jobs run; they decide no byte of the output.
        quantizer: kind of the codebook.
        quantizer_options: other settings of its kind, as names and texts.
        levels, codes: of a Semantic ID, and per level; None for what suits the catalogue's size, or the earlier run's.
        tokens: how a Semantic ID becomes values of the table; pieces: most values that the scheme `pieces` makes.
        table: the unified table's size and shape.
        history_length: L.
        warm_start: the directory of an earlier run to go on from: its encoder, the names of its codes, its rows.
        gates: how much worse than the champion a bundle may be that is to challenge it.
        positions: where the log's topics stood when the dataset's files were made; the bundle's stream starts there.
    """

    seed: int = 0
    encoder: str = "lsa"
    encoder_model: str | None = None
    encoder_dim: int = 128
    runner: str = "DirectRunner"
    runner_options: tuple[str, ...] = ()
    quantizer: codebooks.Kind = "rqvae"
    quantizer_options: tuple[tuple[str, str], ...] = ()
    codes: int | None = None
    levels: int | None = None
    tokens: Scheme = "prefix"
    pieces: int | None = None
    table: TableOptions = field(default_factory=TableOptions)
    history_length: int = DEFAULT_LENGTH
    warm_start: Path | None = None
    train: TrainConfig = field(default_factory=TrainConfig)
    gates: Gates = field(default_factory=Gates)
    positions: tuple[LogPosition, ...] = ()


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        release: only when it was published.
        executed: the seconds of each stage that was done.
        verdict: of the gates; None where there was no champion to compare with.
        engine: of the tables that this process trains; empty where nothing is trained.
    """

    directory: Path
    bundle: Bundle | None
    release: Release | None
    metrics: dict[str, Any]
    executed: dict[str, float]
    verdict: Verdict | None = None
    engine: str = ""


def run(
    dataset: Dataset, out: Path, options: RunOptions, *, console: Console, registry: Registry | None, until: str
) -> RunResult:
    """Runs the stages up to and including `until`; finished ones are kept.

    Args:
        dataset: what to learn from.
        out: one directory per stage.
        registry: where the bundle is published, or None to leave it in `out`.
        until: one of `STAGES`.
    """
    return _Run(dataset, out, options, console, registry).up_to(until)


class _Run:
    """One run; a method for each stage, in order."""

    def __init__(
        self, dataset: Dataset, out: Path, options: RunOptions, console: Console, registry: Registry | None
    ) -> None:
        self._dataset = dataset
        self._out = out
        self._options = options
        self._console = console
        self._registry = registry
        if options.warm_start and options.warm_start.resolve() == out.resolve():
            raise DatasetError(f"--warm-start {out} is this run's own --out; give the new run another directory")
        self._previous = Previous(options.warm_start) if options.warm_start else None
        self._stages = Stages(out, console)
        self._split = dataset.split.model_copy(update={"seed": dataset.split.seed + options.seed})
        source = dataset.model_dump(mode="json", exclude={"source", "split"})
        self._inputs = InputFiles(dataset)
        self._data_key = key_of(source, self._inputs.hashes)
        self._code = code_version(__name__)

    def up_to(self, until: str) -> RunResult:
        """Does the stages, and returns what they made."""
        with self._stages.held():
            return self._do(until)

    def _do(self, until: str) -> RunResult:
        metrics: dict[str, Any] = {}
        bundle = release = judged = None
        wanted = STAGES[: STAGES.index(until) + 1]
        encoded = self._encode()
        assigned = self._assign(encoded) if encoded and "assign" in wanted else None
        if "frame" in wanted:
            frame_dir = self._frame(encoded, assigned)
            self._warn(frame_dir)
        if "train" in wanted:
            trained = self._train(frame_dir)
        if "evaluate" in wanted:
            metrics = msgspec.json.decode((self._evaluate(frame_dir, trained, assigned) / "metrics.json").read_bytes())
        if "publish" in wanted:
            bundle = self._bundle(frame_dir, trained, encoded, assigned, metrics)
            release, judged = self._publish(bundle, frame_dir)
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        said = f"peak memory of this process and its largest child: {peak / 1e6:.2f} GB"
        self._console.print(Text(said, "dim"))
        return RunResult(
            self._out, bundle, release, metrics, self._stages.executed, judged, engine() if "train" in wanted else ""
        )

    def _encode(self) -> Path | None:
        options = self._options
        if not self._dataset.has_content:
            self._console.print(
                f"encode, assign: skipped, since {self._dataset.name} has no items with text; "
                "the ranker learns without Semantic IDs"
            )
            return None
        choice = (options.encoder, options.encoder_model, options.encoder_dim, options.seed)
        before = self._previous.key if self._previous else ()
        self._encode_key = key_of("encode", self._code, self._data_key, choice, *before)
        kind = encoders.kind(options.encoder)

        def work(directory: Path, advance: Advance) -> None:
            items = read_items(self._dataset)
            assert items is not None
            texts = items.select("item_id", "text")
            fitted = directory / "encoder"
            if not fitted.exists():
                model = (
                    encoders.load_encoder(self._previous.encoder)
                    if self._previous
                    else kind.fit(
                        texts["text"].to_list(), dim=options.encoder_dim, seed=options.seed, model=options.encoder_model
                    )
                )
                write_directory(fitted, model.save)
            shards = write_shards(texts, directory / "texts")
            encode_catalogue(
                shards,
                fitted,
                directory / "vectors",
                runner=options.runner,
                options=options.runner_options,
                progress=advance,
            )

        return self._stages.run("encode", self._encode_key, work, inputs=self._inputs)

    def _assign(self, encoded: Path) -> Path:
        options = self._options
        self._assign_key = key_of(
            "assign",
            self._code,
            self._encode_key,
            (options.quantizer, options.quantizer_options),
            options.codes,
            options.levels,
            options.seed,
        )

        def work(directory: Path, advance: Advance) -> None:
            items = read_shards(encoded / "vectors")
            vectors = items["vector"].to_numpy()
            held_out = held_out_items(len(vectors), options.seed)
            start = self._previous.codebook() if self._previous else None
            suited = (start.levels, start.codes) if start else recommended_shape(len(vectors))
            codes = min(options.codes or suited[1], int((~held_out).sum()))
            book = directory / "codebook"
            if not book.exists():
                made = codebooks.fit(
                    options.quantizer,
                    vectors[~held_out],
                    levels=options.levels or suited[0],
                    codes=codes,
                    seed=options.seed,
                    options=dict(options.quantizer_options),
                    start=start,
                    progress=advance,
                )
                if self._previous:
                    made = self._previous.named(made, items)
                write_directory(book, made.save)
            shards = sorted((encoded / "vectors").glob("part-*.parquet"))
            assign_catalogue(shards, book, directory / "codes", runner=options.runner, options=options.runner_options)
            fit, new = vectors[~held_out], vectors[held_out]
            made = codebooks.load(book)
            codes_of_all = read_shards(directory / "codes")["codes"].to_numpy()
            health = codebook_health(made, codes_of_all, {"fitted": fit, "held_out": new})
            zeros = items["item_id"].filter(pl.Series(~vectors.any(axis=1)))
            write_json(directory / "report.json", asdict(health) | {"seed": options.seed, "zero_vectors": len(zeros)})
            if len(zeros):
                counted = f"{len(zeros):,} of {len(vectors):,} items have a zero content vector"
                why = f"the encoder can use none of their text, e.g. {zeros[0]}"
                self._console.print(Text(f"encode: {counted}, since {why}", "yellow"))
            for line in collapse_alarm(health):
                self._console.print(Text(f"assign: {line}", "yellow"))

        return self._stages.run("assign", self._assign_key, work)

    def _frame(self, encoded: Path | None, assigned: Path | None) -> Path:
        before = self._assign_key if assigned else self._data_key
        choice = self._options.history_length, self._options.tokens, self._options.pieces
        self._frame_key = key_of("frame", self._code, before, self._split.model_dump(mode="json"), choice)

        def work(directory: Path, advance: Advance) -> None:
            events, _ = read_events(self._dataset)
            tables = {"events": events}
            items, users = read_items(self._dataset), read_users(self._dataset)
            if users is not None:
                tables["users"] = users
            if items is not None:
                tables["items"] = items if assigned is None else with_content(items, assigned)
            advance(1, 3)
            frame = build_frame(self._dataset, tables, split=self._split, history_length=self._options.history_length)
            for part in PARTS:
                if not frame.part(part).height:
                    raise DatasetError(
                        f"{self._dataset.source}: [split] by = {self._split.by!r} leaves the part {part!r} empty; "
                        "change its fractions, or by"
                    )
            advance(2, 3)
            if assigned is not None:
                made = codebooks.load(assigned / "codebook")
                frame, tokenizer = with_tokens(frame, self._options.tokens, made, pieces=self._options.pieces)
                write_directory(directory / "tokens", tokenizer.save)
            for name in ("users", "items", "examples"):
                write_parquet(getattr(frame, name), directory / f"{name}.parquet")
            advance(3, 3)

        return self._stages.run("frame", self._frame_key, work, inputs=self._inputs)

    def _warn(self, frame_dir: Path) -> None:
        """Says, in each run, what `tessera check` warns of."""
        frame = read_frame(frame_dir)
        # The first row of an event is the event; drawn negatives stand behind it.
        events = frame.examples.unique("event", keep="first", maintain_order=True)
        for kind, table, declared in (
            ("item", frame.items, self._dataset.items),
            ("user", frame.users, self._dataset.users),
        ):
            if declared is not None:
                named = table[f"{kind}_id"].gather(events[kind]).to_frame()
                for line in few_known(named, table.filter("listed"), kind):
                    self._console.print(Text(f"frame: {line}", "yellow"))

    def _train(self, frame_dir: Path) -> Path:
        config = self._train_config()
        before = self._previous.key if self._previous else ()
        self._train_key = key_of(
            "train", self._code, self._frame_key, asdict(config), asdict(self._options.table), *before
        )

        def work(directory: Path, advance: Advance) -> None:
            frame = read_frame(frame_dir)
            options = self._options
            schema = default_schema(self._dataset, frame, options.table, history_length=options.history_length)
            baseline = hashed_id_schema(schema)
            start = None
            if self._previous:
                schema, start = self._previous.ranker(schema, frame, config)
            jobs = ((_RANKER, schema, start), (_HASHED_ID, baseline, None))
            for number, (name, shape, begin) in enumerate(jobs):
                place = directory / name
                if place.exists():
                    continue

                def both(done: int, total: int, number: int = number) -> None:
                    advance(done + number * total, 2 * total)

                halfway = Checkpointing(directory / f"{name}.checkpoint")
                trained = train(shape, frame, config, progress=both, checkpointing=halfway, start=begin)
                write_directory(place, partial(save_ranker, schema=shape, trained=trained))
                halfway.path.unlink(missing_ok=True)
                if config.precision == "auto":
                    self._console.print(f"train: {name} multiplied in {trained.precision}, the faster precision here")

        return self._stages.run("train", self._train_key, work, unit="samples")

    def _evaluate(self, frame_dir: Path, trained: Path, assigned: Path | None) -> Path:
        self._evaluate_key = key_of("evaluate", self._code, self._train_key)

        def work(directory: Path, advance: Advance) -> None:
            frame = read_frame(frame_dir)
            fit, test = frame.part("train"), frame.part("test")
            labels = test["label"].to_numpy().astype(np.float32)
            items = test["item"].to_numpy().astype(np.int64)
            known = np.isin(items, fit["item"].unique().to_numpy())
            found: dict[str, NDArray[np.floating]] = {**rate_baselines(frame)}
            advance(1, 3)
            for number, name in enumerate((_HASHED_ID, _RANKER)):
                schema, model = load_ranker(trained / name, self._train_config())
                admission = Admission(model.sketch, schema.admission)
                found[name] = predict(model.ranker, assembler(schema, frame, test, admission), examples(test))
                advance(number + 2, 3)
            metrics: dict[str, Any] = {
                "split": self._split.by,
                "seed": self._options.seed,
                "rows": {name: frame.part(name).height for name in ("train", "validation", "test")},
                "quality": {
                    name: {part: asdict(measured) for part, measured in by_item_novelty(labels, p, known).items()}
                    for name, p in found.items()
                },
            }
            if assigned:
                metrics["semantic_ids"] = msgspec.json.decode((assigned / "report.json").read_bytes())
            write_json(directory / "metrics.json", metrics)

        return self._stages.run("evaluate", self._evaluate_key, work)

    def _bundle(
        self, frame_dir: Path, trained: Path, encoded: Path | None, assigned: Path | None, metrics: dict[str, Any]
    ) -> Bundle:
        def work(directory: Path, advance: Advance) -> None:
            frame = read_frame(frame_dir)
            schema, model = load_ranker(trained / _RANKER, self._train_config())
            before = [self._previous.trained()] if self._previous else []
            write_trained(trained_on(frame, *before), directory / TRAINED)
            if (directory / "bundle").exists():
                return
            write_bundle(
                BundleParts(
                    dataset=self._dataset,
                    schema=schema,
                    ranker=model.ranker,
                    sketch=model.sketch,
                    training=Training(self._options.train.table_rate, self._options.train.batch),
                    users=frame.users,
                    items=with_train_positives(frame),
                    history=kept_history(frame, self._options.history_length),
                    metrics=metrics,
                    encoder=encoded / "encoder" if encoded else None,
                    codebook=assigned / "codebook" if assigned else None,
                    tokens=frame_dir / "tokens" if assigned else None,
                    trained_until=trained_until(frame, self._dataset),
                    positions=self._options.positions,
                ),
                directory / "bundle",
            )

        positions = [msgspec.to_builtins(place) for place in self._options.positions]
        key = key_of("publish", self._code, self._evaluate_key, FORMAT, *positions)
        return load_bundle(self._stages.run("publish", key, work) / "bundle")

    def _publish(self, bundle: Bundle, frame_dir: Path) -> tuple[Release | None, Verdict | None]:
        if self._registry is None:
            return None, None
        origin = Origin(
            dataset=self._dataset,
            data_key=self._data_key,
            split=self._split.by,
            options=asdict(self._options),
            parent=self._previous.bundle if self._previous else None,
            code=self._code,
            engine=engine(),
            trained=self._out / "publish" / TRAINED,
        )
        publisher = Publisher(self._registry, self._console, self._out / "champion")
        return publisher.publish(bundle, origin, lambda: read_frame(frame_dir), self._options.gates)

    def _train_config(self) -> TrainConfig:
        return replace(self._options.train, seed=self._options.seed)
