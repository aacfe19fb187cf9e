"""Several labels through run, evaluation, bundle, servers, stream and gates."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.label import TASK
from features.errors import DatasetError, TesseraError
from models.bundle.bundle import load_bundle
from models.export.feast import write_repository
from models.export.write import write_export
from models.networks.kinds import DEFAULT
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.table.default_schema import TableOptions
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import verify
from serving.store.writer import StoreWriter
from streaming.log.protocol import Message
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.step import Step
from streaming.trainer import Trainer, TrainerOptions
from tessera.demo.synthetic import write_synthetic
from tessera.export_source import open_source
from tessera.pages.console import view
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import verdict
from tessera.pipeline.options import load_options
from tessera.pipeline.run import RunOptions, run
from tests.contract.test_network import OPTIONS
from tests.integration.embedded_site import site
from tests.integration.streaming.test_ranks import TOPICS, filled, stream
from tests.integration.world import World, quiet

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
SMALL = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=8,
    table=TableOptions(dim=8),
    training=TrainConfig(batch=64, max_epochs=2),
)
NOW_MS = 4_000_000_000_000
LABELS = {"clicked", "stars", "bought"}
ONE = 'label = { column = "clicked" }'
SEVERAL = """judge = "click"
score = "click * buy ** 0.5 + 0.1 * like"
[events.labels]
click = { column = "clicked" }
like = { column = "stars", positive = ">= 4", weight = 0.5 }
buy = { column = "bought", weight = 2.0 }
"""
SHOWN = """name = "shop"
[events]
from = "impressions"
path = "impressions.jsonl"
outcomes_path = "outcomes.jsonl"
outcomes = ["click", "buy"]
[events.labels]
click = { column = "click" }
buy = { column = "buy", weight = 2.0 }
[split]
by = "time"
"""


def described(directory: Path, labels: str = SEVERAL) -> Path:
    """Synthetic data with two more columns: stars, and a purchase that is unknown for every third event."""
    descriptor = write_synthetic(directory, users=60, items=120, events=2_000)
    events = pl.read_parquet(directory / "events.parquet")
    drawn = np.random.default_rng(7).random((events.height, 2))
    clicked = events["clicked"].to_numpy()
    bought = (clicked & (drawn[:, 0] < 0.6)).astype(np.int64)
    events = events.with_columns(
        stars=pl.Series(1 + 2 * clicked + (3 * drawn[:, 1]).astype(np.int64)),
        bought=pl.Series(bought).set(pl.Series(np.arange(len(bought)) % 3 == 0), None),
        # An event whose judged label is unknown teaches the other tasks.
        clicked=pl.Series(clicked.astype(np.int64)).set(pl.Series(np.arange(len(bought)) % 11 == 5), None),
    )
    events.write_parquet(directory / "events.parquet")
    lines = descriptor.read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("label = "))
    descriptor.write_text("\n".join([*lines[:place], *labels.splitlines(), *lines[place + 1 :]]))
    return descriptor


def made(directory: Path, kind: str = DEFAULT, labels: str = SEVERAL, **options: Any) -> World:
    dataset = load_dataset(described(directory / "data", labels))
    network = NetworkConfig(kind=kind, options=OPTIONS.get(kind, {}), uncertainty=options.pop("uncertainty", False))
    chosen = replace(SMALL, training=replace(SMALL.training, network=network, **options))
    result = run(dataset, directory / "run", chosen, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return World(dataset, directory / "run", result.bundle)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return made(tmp_path_factory.mktemp("labels"))


def test_the_frame_carries_the_labels_of_all_tasks_and_unknown_is_unknown(world: World) -> None:
    examples = read_frame(world.directory / "frame").examples.sort("event")
    raw = pl.read_parquet(world.dataset.directory / "events.parquet")
    assert examples.height == raw.height
    assert examples[f"{TASK}click"].equals(raw["clicked"].cast(pl.Int8).alias(f"{TASK}click"))
    assert examples[f"{TASK}buy"].equals(raw["bought"].cast(pl.Int8).alias(f"{TASK}buy"))
    assert examples[f"{TASK}like"].equals((raw["stars"] >= 4).cast(pl.Int8).alias(f"{TASK}like"))
    assert examples["label"].equals(raw["clicked"].cast(pl.Int8).alias("label"))
    clicked = examples.filter(pl.col("label") == 1)
    visited = {(user, item) for user, item in clicked.select("user", "item").iter_rows()}
    lists = examples.select("user", "history").explode("history").drop_nulls()
    assert set(lists.iter_rows()) <= visited


def test_each_task_is_evaluated_on_its_known_labels(world: World) -> None:
    metrics = world.bundle.manifest.metrics
    test = read_frame(world.directory / "frame").part("test")
    assert list(metrics["tasks"]) == ["buy", "click", "like"]
    for name, quality in metrics["tasks"].items():
        assert quality["all"]["rows"] == test.height - test[f"{TASK}{name}"].null_count()
        assert quality["all"]["auc"] > 0.5
    assert metrics["tasks"]["click"]["all"] == metrics["quality"]["ranker"]["all"]
    assert metrics["tasks"]["buy"]["all"]["rows"] < metrics["tasks"]["click"]["all"]["rows"] < test.height


def test_a_bundle_of_several_tasks_has_a_format_of_its_own_and_scores_by_the_formula(world: World) -> None:
    bundle = load_bundle(world.bundle.directory)
    assert bundle.manifest.format == 8
    assert bundle.manifest.network["tasks"] == {"buy": 2.0, "click": 1.0, "like": 0.5}
    assert bundle.manifest.network["judge"] == "click"
    assert bundle.dataset.events.score == world.dataset.events.score
    items = bundle.items["item_id"].to_list()[:20]
    assert len(set(bundle.rank(bundle.users["user_id"][0], items).tolist())) == 20


def test_one_label_is_written_as_before(tmp_path: Path) -> None:
    manifest = made(tmp_path, labels=ONE).bundle.manifest
    assert manifest.format == 4
    assert not {"tasks", "judge", "uncertainty"} & set(manifest.network)
    assert not {"labels", "judge", "score"} & set(manifest.dataset["events"])
    assert "tasks" not in manifest.metrics


def test_another_kind_has_an_output_for_each_task_and_is_streamed(tmp_path: Path) -> None:
    # The contract suite holds the outputs of the other kinds.
    world = made(tmp_path, "mmoe")
    aucs = {name: own["all"]["auc"] for name, own in world.bundle.manifest.metrics["tasks"].items()}
    assert aucs["click"] > 0.5
    assert len(set(aucs.values())) == 3
    with contextlib.closing(filled(tmp_path / "log.db", world)) as log:
        assert stream(world, log, 1)


def test_scores_over_http_are_those_of_the_formula_by_hand(world: World, tmp_path: Path) -> None:
    with site(tmp_path, world) as place:
        body = {"user": world.bundle.users["user_id"][0], "candidates": world.bundle.items["item_id"].to_list()[:30]}
        answer = place.client.post("/v1/rank", json=body | {"k": 30, "explain": True}).json()
        with place.current.pinned() as service:
            ranked = service.rank(body["user"], body["candidates"], 30)
    shown = view.tasks(world.bundle)
    assert shown["formula"] == "click * buy ** 0.5 + 0.1 * like"
    assert [(one["name"], one["judged"]) for one in shown["tasks"]] == [
        ("buy", False),
        ("click", True),
        ("like", False),
    ]
    assert shown["tasks"][1]["found"] == world.bundle.manifest.metrics["tasks"]["click"]["all"]
    # Impressions, and so rollouts, have the judged task's probability.
    assert ranked.judged == [one["tasks"]["click"] for one in answer["items"]]
    scores = [one["score"] for one in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    for one in answer["items"]:
        click, like, buy = (one["tasks"][name] for name in ("click", "like", "buy"))
        assert one["score"] == pytest.approx(click * math.sqrt(buy) + 0.1 * like, abs=1e-7)
        assert len({click, like, buy}) == 3
        assert max(abs(value) for value in one["reasons"].values()) < 1.1
    alone = world.bundle.rank(body["user"], [one["item"] for one in answer["items"]])
    np.testing.assert_allclose(alone, scores, atol=1e-6)


def test_a_stream_teaches_all_tasks_and_is_the_fold_of_its_log(world: World, tmp_path: Path) -> None:
    bundle, store, topics = world.bundle, MemoryStore(), Topics()
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(topics.partitions())
        log.append(topics.events, [(None, line) for line in world.messages(150)])
        fill_store(store, bundle)
        options = TrainerOptions(batch=50, wait_s=0, lateness_s=1e9)
        with contextlib.closing(Trainer(log, bundle, topics=topics, options=options)) as trainer:
            while trainer.run_once():
                pass
            assert not np.array_equal(trainer.step.ranker.table.weight.numpy(), bundle.rows())
        writer = StoreWriter(log, bundle.id, store, topics=topics)
        while writer.run_once():
            pass
        assert verify(log, bundle, store, topics).difference == ""


def test_a_message_teaches_the_tasks_whose_labels_it_has(world: World) -> None:
    messages = [json.loads(line) for line in world.messages(80)]
    seen = {}
    for kept in ("bought", "stars", "clicked", ""):
        step = Step(world.bundle, Topics(), lateness_s=1e9)
        rows = [{name: value for name, value in row.items() if name not in LABELS - {kept}} for row in messages]
        batch = [
            Message(Topics().events, 0, place, None, json.dumps(row).encode(), NOW_MS) for place, row in enumerate(rows)
        ]
        outcome = step.apply(batch)
        assert outcome.bad == []
        known = sum(row.get(kept) is not None for row in messages) if kept else 0
        assert (outcome.events, outcome.neutral) == (known, len(messages) - known)
        assert np.isfinite(outcome.logits).all()
        assert np.isnan(outcome.labels).all() == (kept != "clicked")
        seen[kept] = step.ranker.table.weight.numpy().copy()
    changed = [not np.array_equal(rows, world.bundle.rows()) for rows in seen.values()]
    assert changed == [True, True, True, False]
    assert not np.array_equal(seen["bought"], seen["stars"])


def test_two_trainers_have_the_bits_of_one(world: World, tmp_path: Path) -> None:
    found = set()
    for count in (1, 2):
        with contextlib.closing(filled(tmp_path / f"{count}.db", world)) as log:
            found.add(stream(world, log, count))
            assert log.end_offsets(TOPICS.deltas)[0] > 0
    assert len(found) == 1


def test_two_processes_train_what_one_does_with_learned_weights(tmp_path: Path) -> None:
    one, two = (made(tmp_path / str(count), processes=count, uncertainty=True).bundle for count in (1, 2))
    learned = []
    for bundle in (one, two):
        tasks = bundle.network().tasks
        assert tasks is not None
        assert tasks.log_variances is not None
        assert (tasks.log_variances != 0).all()
        learned.append(tasks.log_variances.detach().numpy())
    np.testing.assert_allclose(*learned, atol=1e-4)
    users, items = one.users["user_id"].to_list()[:10], one.items["item_id"].to_list()[:20]
    for user in users:
        np.testing.assert_allclose(one.rank(user, items), two.rank(user, items), atol=2e-3)


def test_gates_judge_the_named_task(world: World) -> None:
    frame = read_frame(world.directory / "frame")
    judged = verdict(world.bundle, world.bundle, frame, load_options(world.dataset).gates)
    known = frame.height("test") - frame.part("test")["label"].null_count()
    assert f"The task 'click' is judged, on {known:,} rows." in judged.note
    auc = next(check for check in judged.checks if check.name == "all: AUC")
    assert auc.champion == pytest.approx(world.bundle.manifest.metrics["tasks"]["click"]["all"]["auc"], abs=1e-4)


def test_outcomes_of_impressions_are_tasks(tmp_path: Path) -> None:
    path = tmp_path / "shop.toml"
    path.write_text(SHOWN)
    dataset = load_dataset(path)
    assert (dataset.events.judge, dataset.events.label.column) == ("click", "click")
    assert dataset.events.label_columns == ("buy", "click")
    described = dataset.model_dump(mode="json")
    assert "label" not in described["events"]
    assert Dataset.model_validate(described).events.labels == dataset.events.labels
    for old, new, problem in (
        ('column = "buy"', 'column = "bid"', r"label.column: 'bid' is no kind of outcome; the nearest is 'buy'"),
        (
            "[events.labels]",
            '[events.placement]\nposition = "position"\n[events.labels]',
            "position path has one label",
        ),
        ('{ column = "click" }', "{ implicit = true }", "labels.click: implicit = true draws negatives for one label"),
    ):
        path.write_text(SHOWN.replace(old, new))
        with pytest.raises(DatasetError, match=problem):
            load_dataset(path)


def test_labels_of_tasks_are_exported_and_are_no_features(world: World, tmp_path: Path) -> None:
    schema = write_export(open_source(world.directory), tmp_path / "export")
    columns = {one.name: one.meaning for one in schema.tables["examples"].columns}
    assert "1 for a positive event of the task buy" in columns[f"{TASK}buy"]
    (views, _) = write_repository(schema, tmp_path / "export", tmp_path / "feast")
    assert "history" in views.read_text()
    assert TASK not in views.read_text()


def test_bad_descriptors_are_refused_by_name(tmp_path: Path) -> None:
    for labels, problem in (
        (SEVERAL.replace("buy ** 0.5", "bye ** 0.5"), r"\[events\].*score: unknown task 'bye'; the nearest is 'buy'"),
        (
            SEVERAL.replace('judge = "click"', 'judge = "clicks"'),
            r"judge: unknown task 'clicks'; the nearest is 'click'",
        ),
        (SEVERAL.replace("weight = 2.0", "weight = 0"), r"\[events\] labels.buy.weight: .*greater than 0"),
        (ONE + "\n" + SEVERAL, r"label and labels both say"),
        ('label = { column = "clicked" }\nscore = "click"', r"score is about several tasks"),
        ('[events.labels]\nclick = { column = "clicked" }', r"labels names fewer than two tasks"),
    ):
        with pytest.raises(DatasetError, match=problem):
            load_dataset(described(tmp_path / "data", labels))


def test_an_absent_label_column_and_choices_of_one_label_are_refused_by_name(tmp_path: Path) -> None:
    dataset = load_dataset(described(tmp_path / "data", SEVERAL.replace('"bought"', '"bougth"')))
    with pytest.raises(DatasetError, match=r"events.parquet.*'bougth'.*'bought'"):
        run(dataset, tmp_path / "run", SMALL, console=quiet(), registry=None, until="frame")
    several = load_dataset(described(tmp_path / "data"))
    with pytest.raises(TesseraError, match=r'correct = "neighbours" corrects the score of one label'):
        load_options(several, ["correct=neighbours"])
    with pytest.raises(TesseraError, match=r"ranker.uncertainty weighs several tasks"):
        load_options(load_dataset(described(tmp_path / "data", ONE)), ["ranker.uncertainty=true"])


def test_a_ranker_of_other_tasks_is_no_warm_start(world: World, tmp_path: Path) -> None:
    labels = SEVERAL.replace("like", "love")
    dataset = load_dataset(described(tmp_path / "data", labels))
    chosen = replace(SMALL, warm_start=world.directory)
    with pytest.raises(DatasetError, match=r"outputs buy, click, like, this run has buy, click, love"):
        run(dataset, tmp_path / "run", chosen, console=quiet(), registry=None, until="publish")
