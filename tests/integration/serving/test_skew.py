"""What was served equals what the log and the batch say, and each of twelve planted faults is named by its feature."""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner, Result

from features.dataset.descriptor import load_dataset
from features.errors import BundleError
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle, load_bundle, write_manifest
from models.bundle.request_features import request_events
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.registry.documents import SKEW_REPORT
from models.registry.gate import Gates
from models.table.default_schema import TableOptions
from serving.api.app import AppParts, create_app
from serving.api.log_sink import LogSink
from serving.metrics import Metrics
from serving.ranking.mirror_feed import mirrored
from serving.ranking.service import RankService
from serving.skew.drift import DriftReport, DriftWatch
from serving.skew.metrics import SkewMetrics
from serving.skew.prove import SkewLimits, prove, read_records
from serving.skew.report import SkewReport
from serving.skew.sample import SkewSampler, is_sampled
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.writer import StoreWriter
from serving.traffic.router import Router
from streaming.forget.request import forget
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog, ends_of
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tessera.cli.main import app
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import verdict
from tessera.pipeline.run import RunOptions, run
from tessera.settings import Settings
from tests.build import corrected_bundle
from tests.integration.world import World, quiet

FEATURES = """
[features]
title_letters = "LENGTH(item.title)"
hour = { sql = "EXTRACT(HOUR FROM event.time)", kind = "categorical" }
"""
OPTIONS = RunOptions(
    quantizer="residual-kmeans",
    encoder_dim=8,
    levels=2,
    codes=8,
    table=TableOptions(dim=8),
    training=TrainConfig(max_epochs=1, network=NetworkConfig(cross_layers=1, cross_rank=8, hidden=(16,))),
)
AT_US, HOUR_US, LATEST = 1_748_736_000_000_000, 3_600_000_000, 10**9
CANDIDATES = int(os.environ.get("SKEW_CANDIDATES", "30"))
REQUESTS = int(os.environ.get("SKEW_REQUESTS", "20"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    directory = tmp_path_factory.mktemp("skew")
    path = write_synthetic(directory / "data", users=60, items=120, events=2_000)
    path.write_text(path.read_text() + FEATURES)
    dataset = load_dataset(path)
    result = run(dataset, directory / "run", OPTIONS, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    bundle = corrected_bundle(load_bundle(result.bundle.directory), directory / "corrected")
    return World(dataset, directory / "run", bundle)


class Shop:
    """A stream on an embedded log, a store, and a server whose every answer is sampled."""

    def __init__(
        self,
        world: World,
        directory: Path,
        storage: str = "float32",
        *,
        opened: Callable[[], EventLog] | None = None,
        topics: Topics | None = None,
    ) -> None:
        opened = opened or (lambda: LocalLog(directory / "log.db"))
        self.world, self.bundle = world, world.bundle
        self.log, self.store, self.topics = opened(), MemoryStore(), topics or Topics()
        self.log.create_topics(self.topics.partitions())
        self.snapshots = Snapshots(directory / "snapshots")
        fill_store(self.store, self.bundle, storage=storage)
        options = TrainerOptions(batch=32, wait_s=0)
        self.trainer = Trainer(self.log, self.bundle, topics=self.topics, options=options, snapshots=self.snapshots)
        self.writer = StoreWriter(self.log, self.bundle.id, self.store, topics=self.topics)
        self.metrics = Metrics()
        self.sink = LogSink(opened, self.topics)
        lines = (world.dataset.directory / "items.jsonl").read_bytes().splitlines()
        # The first items come again over the stream, the second of them without its format.
        items = [json.loads(line) for line in lines[:6]]
        items[1]["format"] = None
        items.append(items[0] | {"item_id": "new", "title": "A new bicycle"})
        self.send(self.topics.items, items[:5])
        self.send_events(0, 120)
        self.later = items[5:]

    def send(self, topic: str, rows: list[dict[str, Any]]) -> None:
        self.log.append(topic, [(None, json.dumps(row).encode()) for row in rows])
        self.drain()

    def send_events(self, start: int, stop: int) -> None:
        self.log.append(self.topics.events, [(None, line) for line in self.world.messages(stop)[start:stop]])
        self.drain()

    def drain(self) -> None:
        while self.trainer.run_once(wait_s=0.0):
            pass
        while self.writer.run_once():
            pass

    def service(self, bundle: Bundle | None = None) -> RankService:
        return RankService(bundle or self.bundle, self.store, deltas=self.topics.deltas)

    def answer(self, service: RankService, *, first: int = 0, requests: int = REQUESTS) -> None:
        """Answers requests, of which every answer is sampled."""
        items = self.bundle.items["item_id"].to_list()
        rng = np.random.default_rng(first)
        with contextlib.closing(SkewSampler(self.sink, self.metrics, 1.0)) as sampler:
            for number in range(first, first + requests):
                user = self.bundle.users["user_id"].to_list()[number % 61] if number % 61 < 60 else "stranger"
                chosen = [*rng.choice(items, CANDIDATES, replace=False).tolist(), items[0], "new", "unknown"]
                at = None if number % 3 else AT_US + number * HOUR_US
                sampler.offer(f"r{number}", service.rank(user, chosen, 10, at=at))
                while sampler.waiting > 32:
                    time.sleep(0.002)

    def proved(self, *, from_snapshot: bool = False, limits: SkewLimits | None = None) -> SkewReport:
        records, unreadable = read_records(self.log, self.topics)
        assert unreadable == 0
        assert self.metrics.skew_records.labels("dropped")._value.get() == 0
        snapshot = self.snapshots.newest(self.bundle) if from_snapshot else None
        return prove(self.log, self.bundle, self.topics, records, snapshot=snapshot, limits=limits or SkewLimits())

    def item_records(self) -> dict[str, record.ItemRecord]:
        """Records of all published items, as a stream would write them."""
        names = self.bundle.items["item_id"].to_list()
        held = dict(zip(names, self.store.read_records(self.bundle.id, record.ITEM, names), strict=True))
        found = {}
        for row in self.bundle.items.filter(pl.col("listed")).iter_rows(named=True):
            payload = held[row["item_id"]]
            vector = np.array(row["content_vector"], dtype="<f4").tobytes()
            published = record.ItemRecord(
                self.bundle.manifest.encoder or "",
                vector,
                list(row["semantic_codes"]),
                {name: row[name] for name in ("topic", "format", "title_letters")},
                self.bundle.manifest.codebook or "",
            )
            found[row["item_id"]] = record.decode_item(payload) if payload else published
        return found

    def overwrite(self, kind: str, payloads: dict[str, bytes]) -> None:
        """Writes records to the store that the log does not have."""
        names = list(payloads)
        self.store.write_records(self.bundle.id, kind, names, [LATEST] * len(names), list(payloads.values()))


@pytest.fixture
def shop(made: World, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Shop]:
    """The shop, with as many partitions of its topics as a parameter says."""
    found = Shop(made, tmp_path, topics=Topics("", getattr(request, "param", 1)))
    with contextlib.closing(found.log), contextlib.closing(found.sink):
        yield found
        found.trainer.close()


@pytest.mark.parametrize("shop", [1, 3], indirect=True)
def test_no_served_value_differs_while_the_stream_runs(shop: Shop) -> None:
    service = shop.service()
    shop.answer(service)
    # The server does not refresh yet, so it knows no change of these items and names the earlier position.
    shop.send(shop.topics.items, shop.later)
    shop.send_events(120, 150)
    shop.answer(service, first=REQUESTS)
    service.refresh()
    shop.answer(service, first=2 * REQUESTS)
    report = shop.proved()
    assert (report.different, report.differences) == (0, [])
    assert report.requests == 3 * REQUESTS
    assert report.values > report.requests * CANDIDATES * 5
    assert not report.skipped


@pytest.mark.parametrize("from_snapshot", [False, True])
def test_an_answer_for_a_forgotten_user_is_proved_without_the_users_features(shop: Shop, from_snapshot: bool) -> None:
    service, users = shop.service(), shop.bundle.users["user_id"].to_list()[:10]
    forget(shop.log, shop.topics, users, by="test")
    shop.drain()
    if from_snapshot:
        shop.trainer.write_snapshot()
    service.refresh()
    shop.answer(service)
    report = shop.proved(from_snapshot=from_snapshot)
    assert report.requests == REQUESTS
    assert report.to_json()["differences"] == []


@pytest.mark.parametrize("partitions", [1, 3])
def test_no_value_of_a_mirror_or_of_a_small_format_differs(made: World, tmp_path: Path, partitions: int) -> None:
    shop = Shop(made, tmp_path, storage="int8", topics=Topics("", partitions))
    opened = mirrored(lambda: LocalLog(tmp_path / "log.db"), shop.topics, shop.store, shop.bundle)
    with contextlib.closing(shop.log), contextlib.closing(shop.sink), opened as rows:
        shop.answer(RankService(shop.bundle, shop.store, rows, deltas=shop.topics.deltas))
        records, _ = read_records(shop.log, shop.topics)
        assert {(one.source, one.storage) for one in records} == {("mirror", "int8")}
        assert records[0].positions == ends_of(shop.log, shop.topics.deltas)
        report = shop.proved()
        assert (report.different, report.undecided) == (0, 0)
        shop.trainer.close()


@pytest.mark.parametrize("shop", [3], indirect=True)
def test_the_window_of_an_answer_begins_with_the_partition_that_was_behind(shop: Shop) -> None:
    shop.answer(shop.service(), requests=3)
    records, _ = read_records(shop.log, shop.topics)
    shop.send_events(120, 150)
    ends = ends_of(shop.log, shop.topics.deltas)
    assert all(before < after for one in records for before, after in zip(one.positions, ends, strict=True))
    different = []
    for ahead in (0, 1, 3):
        later = []
        for one in records:
            position = [*one.positions[: 3 - ahead], *ends[3 - ahead :]]
            later.append(msgspec.structs.replace(one, position=position))
        different.append(prove(shop.log, shop.bundle, shop.topics, later).different)
    assert different[:2] == [0, 0]
    assert different[2] > 0


@pytest.mark.parametrize("shop", [1, 3], indirect=True)
def test_a_snapshot_proves_later_answers_and_counts_earlier_ones(shop: Shop) -> None:
    service = shop.service()
    shop.answer(service, requests=2)
    shop.send_events(120, 150)
    shop.trainer.write_snapshot()
    service.refresh()
    shop.answer(service, first=2, requests=3)
    report = shop.proved(from_snapshot=True)
    assert report.different == 0
    assert (report.requests, dict(report.skipped)) == (3, {"before the snapshot": 2})


def _stale_row(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    # A store that lost the stream's writes of some rows.
    seqs = shop.store.read_seqs(shop.bundle.id, np.arange(shop.bundle.schema.rows))
    rows = np.flatnonzero(seqs > 0)
    shop.store.write_rows(shop.bundle.id, rows, seqs[rows], shop.bundle.rows()[rows], again=True)
    return shop.service()


def _changed_items(shop: Shop, change: Callable[[dict[str, Any]], dict[str, Any]]) -> RankService:
    records = shop.item_records()
    changed = {name: record.ItemRecord(*_with(one, change(dict(one.features)))) for name, one in records.items()}
    shop.overwrite(record.ITEM, {name: record.encode(one) for name, one in changed.items()})
    return shop.service()


def _with(one: record.ItemRecord, features: dict[str, Any]) -> tuple[Any, ...]:
    return one.encoder, one.vector, one.codes, features, one.codebook, one.terms


def _null_column(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    return _changed_items(shop, lambda row: row | {"format": None})


def _retyped_value(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    return _changed_items(shop, lambda row: row | {"topic": [str(row["topic"])]})


def _swapped_columns(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    return _changed_items(
        shop,
        lambda row: row | {"format": (row["topic"] or [None])[0], "topic": [row["format"]] if row["format"] else []},
    )


def _time_zone(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> RankService:
    monkeypatch.setattr(
        "serving.ranking.service.request_events",
        lambda *given, at_us: request_events(*given, at_us=at_us + 3 * HOUR_US),
    )
    return shop.service()


def _stale_model(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    service = shop.service()
    network = shop.bundle.network()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.9)
    service._scorer._network = network
    return service


def _default_always(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> RankService:
    service = shop.service()
    monkeypatch.setattr(service._live, "number", lambda item: service._live.default_item)
    return service


def _history_cut(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    held = dict(pair for chunk in shop.store.scan_records(shop.bundle.id, record.HISTORY) for pair in chunk)
    cut = {}
    for user, payload in held.items():
        history = record.decode_history(payload)
        cut[user] = record.encode(record.HistoryRecord(history.items[-1:], history.times[-1:]))
    shop.overwrite(record.HISTORY, cut)
    return shop.service()


def _labels_turned(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    held = dict(pair for chunk in shop.store.scan_records(shop.bundle.id, record.HISTORY) for pair in chunk)
    turned = {}
    for user, payload in held.items():
        history = record.decode_history(payload)
        labels = bytes(1 - label for label in history.labels)
        turned[user] = record.encode(record.HistoryRecord(history.items, history.times, history.labelled, labels))
    shop.overwrite(record.HISTORY, turned)
    return shop.service()


def _other_correction(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    service = shop.service()
    assert service._corrector is not None
    service._corrector._correction = replace(service._corrector._correction, weight=-6.0)
    return service


def _aggregate_late(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    published = aggregate_record.state_records(shop.bundle.aggregates())
    shop.overwrite(aggregate_record.AGGREGATE, {one.id: one.payload for one in published})
    return shop.service()


def _hash_salt(shop: Shop, _: pytest.MonkeyPatch) -> RankService:
    schema = shop.bundle.schema
    features = tuple(
        replace(one, salt="other") if one.column == "topic" and one.of in ("item", "history") else one
        for one in schema.features
    )
    other = load_bundle(shop.bundle.directory)
    other.__dict__["schema"] = replace(schema, features=features)
    return shop.service(other)


FAULTS: dict[str, tuple[Callable[[Shop, pytest.MonkeyPatch], RankService], str, str]] = {
    "stale row": (_stale_row, "item_id", "other version"),
    "null column": (_null_column, "item.format", "absent"),
    "retyped value": (_retyped_value, "item.topic", "absent"),
    "swapped columns": (_swapped_columns, "item.format", "absent"),
    "another time zone": (_time_zone, "event.hour", "differs"),
    "stale model": (_stale_model, "score", "differs"),
    "default always taken": (_default_always, "item.format", "absent"),
    "history cut": (_history_cut, "history", "cut"),
    "labels turned": (_labels_turned, "labelled items", "differs"),
    "other correction": (_other_correction, "score", "differs"),
    "aggregate late": (_aggregate_late, "aggregate", "differs"),
    "hash salt": (_hash_salt, "item.topic", "absent"),
}


@pytest.mark.parametrize(("fault", "shop"), [*((name, 1) for name in FAULTS), ("stale row", 3)], indirect=["shop"])
def test_a_planted_fault_is_named_by_its_feature(shop: Shop, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    plant, feature, kind = FAULTS[fault]
    shop.answer(plant(shop, monkeypatch))
    monkeypatch.undo()
    report = shop.proved()
    named = {(one.feature, one.kind) for one in report.differences}
    assert any(name.startswith(feature) and kind == of for name, of in named), named
    assert report.differing > 0
    assert all(one.examples for one in report.differences)
    metrics = SkewMetrics()
    metrics.note(report)
    counted = {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "tessera_skew_differences_total"
    }
    assert counted == {(one.feature, one.kind): one.count for one in report.differences}


def test_a_server_far_behind_the_log_is_named(shop: Shop) -> None:
    service = shop.service()
    shop.send_events(120, 150)
    shop.answer(service, requests=3)
    assert shop.proved().different == 0
    report = shop.proved(limits=SkewLimits(late_s=-1.0))
    assert {(one.feature, one.kind, one.count) for one in report.differences} == {("log offset", "late", 3)}


def test_the_command_exits_with_1_if_a_value_differs(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*options: str) -> Result:
        words = ["skew", "--bundle", str(shop.bundle.directory), *options]
        return CliRunner().invoke(app, words, env={"TESSERA_HOME": str(tmp_path), "TESSERA_KAFKA": ""})

    assert "no record of this bundle" in told().output
    shop.answer(shop.service(), requests=3)
    equal = told("--json")
    assert equal.exit_code == 0, equal.output
    assert json.loads(equal.stdout)["requests"] == 3
    shop.answer(_null_column(shop, monkeypatch), first=3, requests=2)
    differs = told()
    assert differs.exit_code == 1
    assert "item.format" in differs.stdout
    assert "absent" in differs.stdout


def test_a_kept_report_is_with_the_version_and_decides_its_gates(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> Result:
        words = ["skew", "--bundle", str(shop.bundle.directory), "--keep"]
        return CliRunner().invoke(app, words, env={"TESSERA_HOME": str(tmp_path), "TESSERA_KAFKA": ""})

    assert isinstance(told().exception, BundleError)
    registry = Settings(home=tmp_path).open_registry()
    release = registry.publish(shop.bundle, params={}, metrics={})
    shop.answer(_null_column(shop, monkeypatch), requests=3)
    assert told().exit_code == 1
    kept = registry.documents.get(release, SKEW_REPORT)
    assert kept is not None
    assert kept["differences"][0]["kind"] == "absent"
    frame, gates = read_frame(shop.world.directory / "frame"), Gates(skew={"different": 0.0})
    judged = verdict(shop.bundle, shop.bundle, frame, gates, served=kept)
    assert [check.name for check in judged.checks if not check.passed] == ["skew.different"]


def test_the_command_proves_answers_and_names_a_fault_on_kafka(
    made: World, tmp_path: Path, kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"t{uuid.uuid4().hex[:8]}-"
    shop = Shop(made, tmp_path, opened=lambda: KafkaLog(kafka_address), topics=Topics(prefix))

    def told() -> tuple[int, dict[str, Any]]:
        words = ["skew", "--bundle", str(shop.bundle.directory), "--json"]
        place = {"TESSERA_HOME": str(tmp_path), "TESSERA_KAFKA": kafka_address, "TESSERA_TOPIC_PREFIX": prefix}
        found = CliRunner().invoke(app, words, env=place)
        return found.exit_code, json.loads(found.stdout)

    with contextlib.closing(shop.log), contextlib.closing(shop.sink):
        shop.answer(shop.service(), requests=5)
        code, equal = told()
        assert (code, equal["requests"], equal["different"]) == (0, 5, 0)
        assert equal["drift"]["users"] == 5
        shop.answer(_null_column(shop, monkeypatch), first=5, requests=3)
        code, differs = told()
        assert code == 1
        assert {(one["feature"], one["kind"]) for one in differs["differences"]} >= {("item.format", "absent")}
        shop.trainer.close()


def test_each_record_is_in_one_interval_of_appends(shop: Shop) -> None:
    service = shop.service()
    shop.answer(service, requests=3)
    time.sleep(0.01)
    middle = time.time_ns() // 1_000_000
    shop.answer(service, first=3, requests=2)
    before, _ = read_records(shop.log, shop.topics, until_ms=middle)
    after, _ = read_records(shop.log, shop.topics, since_ms=middle)
    assert [one.id for one in before] == ["r0", "r1", "r2"]
    assert [one.id for one in after] == ["r3", "r4"]


def test_an_application_logs_the_sampled_requests_under_the_id_of_their_impressions(shop: Shop) -> None:
    log: EventLog = shop.log
    sampler = SkewSampler(shop.sink, shop.metrics, 0.5)
    parts = AppParts(metrics=shop.metrics, sampler=sampler)
    with TestClient(create_app(Router(shop.service()), parts)) as client:
        for number in range(40):
            body = {"user": f"r{number:05d}", "candidates": shop.bundle.items["item_id"].to_list()[:5]}
            assert client.post("/v1/rank", json=body).status_code == 200
    sampler.close()
    records, _ = read_records(log, shop.topics)
    assert 5 < len(records) < 35
    assert all(is_sampled(one.id, 0.5) for one in records)
    assert shop.proved().different == 0


def _told(shop: Shop, home: Path, *options: str) -> Result:
    words = ["skew", "--bundle", str(shop.bundle.directory), *options]
    return CliRunner().invoke(app, words, env={"TESSERA_HOME": str(home), "TESSERA_KAFKA": ""})


def test_a_drift_that_the_log_says_too_is_no_difference_and_alarms(shop: Shop, tmp_path: Path) -> None:
    # An importer that lost a column: log, store and servers agree.
    lines = (shop.world.dataset.directory / "items.jsonl").read_bytes().splitlines()
    shop.send(shop.topics.items, [json.loads(line) | {"format": None} for line in lines])
    shop.answer(shop.service(), requests=60)
    result = _told(shop, tmp_path, "--json")
    report = json.loads(result.stdout)
    assert report["different"] == 0
    assert "item.format missing" in report["drift"]["alarms"]
    assert report["drift"]["users"] == 60
    assert result.exit_code == 3
    shown = _told(shop, tmp_path)
    assert "item.format missing" in " ".join(shown.stdout.split())
    metrics = SkewMetrics()
    metrics.note(replace(shop.proved(), drift=_drift_of(shop)))
    found = {labels: gauge._value.get() for labels, gauge in metrics._alarm._metrics.items()}
    assert found["item.format", "missing"] == 1


def _drift_of(shop: Shop) -> DriftReport:
    assert shop.bundle.profile is not None
    watch = DriftWatch(shop.bundle.schema, shop.bundle.profile, bundle=shop.bundle.id)
    watch.add(read_records(shop.log, shop.topics)[0])
    return watch.look()


def test_a_profile_of_served_records_is_a_reference_without_drift(shop: Shop, tmp_path: Path) -> None:
    shop.answer(shop.service(), requests=60)
    path = tmp_path / "served.json"
    assert _told(shop, tmp_path, "--write-profile", str(path)).exit_code == 0
    drift = json.loads(_told(shop, tmp_path, "--json", "--profile", str(path)).stdout)["drift"]
    assert drift["reference"] == str(path)
    assert drift["alarms"] == []
    assert max(one["psi"] for one in drift["measures"]) < 1e-6
    path.write_text("{}")
    refused = _told(shop, tmp_path, "--profile", str(path))
    assert refused.exit_code == 1
    assert "served.json" in str(refused.exception)


def test_a_bundle_without_a_profile_is_proved_and_the_command_says_that_drift_is_not_watched(
    shop: Shop, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(shop.bundle.directory, tmp_path / "old"))
    (old / "profile.json").unlink()
    write_manifest(old, shop.bundle.manifest)
    shop.bundle = load_bundle(old)
    assert shop.bundle.profile is None
    result = _told(shop, tmp_path)
    assert result.exit_code == 0, result.output
    assert "drift: not watched" in result.stdout


def test_the_profile_of_a_bundle_is_that_of_its_training_rows(made: World) -> None:
    profile = made.bundle.profile
    assert profile is not None
    measures = {one.name: one for one in profile.measures}
    assert {"item.format", "item.format missing", "item.format unseen", "item.topic length", "score"} <= measures.keys()
    for one in profile.measures:
        assert sum(one.shares) == pytest.approx(1, abs=1e-6), one.name
        assert one.units > 0
    # Ten bins of numbers have about equal shares of the rows.
    assert max(measures["score"].shares) < 0.3
    frame = read_frame(made.directory / "frame")
    train = frame.part("train").select(pl.col("user"), pl.col("item"))
    format_ = frame.items["format"][train["item"]]
    by_user = train.with_columns(missing=format_.is_null()).group_by("user").agg(pl.col("missing").mean())
    assert measures["item.format missing"].shares[1] == pytest.approx(float(by_user["missing"].mean()), abs=1e-6)
