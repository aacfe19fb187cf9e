"""Aggregates in three homes: the frame, the stream with its store, mirror and snapshots, and the server."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.aggregate.aggregator import Aggregator
from features.aggregate_frame import with_aggregates
from features.dataset.aggregate import Aggregate
from features.frame import Frame, build_frame
from models.bundle import aggregate_record, delta
from models.bundle.bundle import Bundle, write_bundle
from serving.api.app import create_app
from serving.ranking.histories import UserRecords
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import verify
from serving.store.writer import StoreWriter
from serving.traffic.router import Router
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tests.build import coloured_parts, coloured_tables

EVENTS, HOUR_US = 300, 3_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DECLARED = {
    "clicks": Aggregate(by=("item",), value="positive", windows=("6h", "2d", "all")),
    "colour_mood": Aggregate(by=("item.colour",), value="rate", half_life=("3h",)),
    "last_seen": Aggregate(by=("user",), value="recency"),
}


@dataclass
class Shop:
    """A bundle that stops before the test events, and everything that runs on it."""

    directory: Path
    bundle: Bundle
    frame: Frame

    def __post_init__(self) -> None:
        self.log, self.store, self.topics = LocalLog(self.directory / "log.db"), MemoryStore(), Topics()
        self.log.create_topics(self.topics.partitions())
        self.snapshots = Snapshots(self.directory / "snapshots")
        fill_store(self.store, self.bundle)
        self.trainer = self.start()
        self.writer = StoreWriter(self.log, self.bundle.id, self.store, topics=self.topics)

    def start(self) -> Trainer:
        options = TrainerOptions(batch=7, wait_s=0)
        return Trainer(self.log, self.bundle, topics=self.topics, options=options, snapshots=self.snapshots)

    def send(self, events: pl.DataFrame) -> None:
        messages = [
            {"user_id": user, "item_id": item, "label": label, "time": (EPOCH + timedelta(microseconds=t)).isoformat()}
            for user, item, label, t in events.select("user_id", "item_id", "label", "time").iter_rows()
        ]
        self.log.append(self.topics.events, [(b"one", json.dumps(message).encode()) for message in messages])

    def drain(self) -> None:
        while self.trainer.run_once(wait_s=0.0):
            pass
        while self.writer.run_once():
            pass

    def stored(self) -> Aggregator:
        held = self.store.scan_records(self.bundle.id, aggregate_record.AGGREGATE)
        plan = self.bundle.schema.aggregates
        return aggregate_record.restored(plan, dict(itertools.chain.from_iterable(held)))

    def expected(self) -> Aggregator:
        """The state of the frame after all events."""
        plan = self.bundle.schema.aggregates
        known = self.frame.examples.with_columns(split=pl.lit("train"))
        return with_aggregates(self.frame.replace(examples=known), plan, base_rate=plan.base_rate)[1]


def events() -> pl.DataFrame:
    return coloured_tables(events=EVENTS)["events"].with_columns(pl.col("time") * HOUR_US)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle")
    parts = coloured_parts(directory, events=EVENTS, aggregates=DECLARED, every_us=HOUR_US)
    return write_bundle(parts, directory / "bundle")


@pytest.fixture
def shop(bundle: Bundle, tmp_path: Path) -> Iterator[Shop]:
    tables = coloured_tables(events=EVENTS) | {"events": events()}
    frame = build_frame(bundle.dataset, tables, split=bundle.dataset.split, history_length=5)
    found = Shop(tmp_path, bundle, frame)
    with contextlib.closing(found.log):
        yield found
        found.trainer.close()


def assert_equal(found: Aggregator, expected: Aggregator) -> None:
    assert found.watermark == expected.watermark
    for by, state in expected.states.items():
        assert len(found.states[by]) == len(state)
        assert not found.states[by].differ(state.keys, state.rows).any()


def test_a_replayed_stream_is_the_frame_bit_for_bit(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[Any] = []
    apply = shop.trainer.step.aggregates.apply

    def noted(*arguments: Any) -> Any:
        answered, records = apply(*arguments)
        columns.append(answered)
        return answered, records

    monkeypatch.setattr(shop.trainer.step.aggregates, "apply", noted)
    plan = shop.bundle.schema.aggregates
    whole, before_test = with_aggregates(shop.frame, plan, base_rate=plan.base_rate)
    assert_equal(shop.trainer.step.aggregates.state, before_test)
    test = whole.part("test")
    shop.send(events().filter(pl.col("event").is_in(test["event"].implode())))
    shop.drain()
    assert np.concatenate(columns).tobytes() == test.select(plan.columns).to_numpy().tobytes()
    assert len(plan.columns) == 18
    for state in (shop.trainer.step.aggregates.state, shop.stored()):
        assert_equal(state, shop.expected())
    assert verify(shop.log, shop.bundle, shop.store, shop.topics).difference == ""


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_restart_brings_aggregates_back(shop: Shop, snapshot: bool) -> None:
    test = shop.frame.part("test")["event"].implode()
    chosen = events().filter(pl.col("event").is_in(test))
    shop.send(chosen[:20])
    shop.drain()
    if snapshot:
        shop.trainer.write_snapshot()
    shop.send(chosen[20:])
    shop.drain()
    shop.trainer.close()
    shop.trainer = shop.start()
    assert_equal(shop.trainer.step.aggregates.state, shop.expected())
    newest = shop.snapshots.newest(shop.bundle)
    assert (newest is not None) == snapshot
    assert verify(shop.log, shop.bundle, shop.store, shop.topics, snapshot=newest).difference == ""


def test_a_stream_beyond_its_bound_forgets_the_oldest_keys_everywhere(shop: Shop) -> None:
    state = shop.trainer.step.aggregates.state
    state.plan = replace(state.plan, most_keys=24)
    mirror = Mirror(shop.store, shop.bundle.id, shop.bundle.schema.aggregates)
    shop.send(events().filter(pl.col("event").is_in(shop.frame.part("test")["event"].implode())))
    shop.drain()
    for message in shop.log.read(shop.topics.deltas, 0, 0, shop.log.end_offsets(shop.topics.deltas)[0]):
        mirror.fold(delta.decode(message.value))
    assert 0 < len(state.states["item",]) <= 24
    assert_equal(shop.stored(), state)
    assert verify(shop.log, shop.bundle, shop.store, shop.topics).difference == ""
    known = shop.expected().states["item",].keys
    asked = [one.read(known, np.full(len(known), 10**15)).every.tolist() for one in (
        shop.stored().states["item",], mirror._aggregates.states["item",], state.states["item",]
    )]  # fmt: skip
    assert asked[0] == asked[1] == asked[2]
    assert [0, 0] in asked[0]


def test_verify_names_an_aggregate_that_differs(shop: Shop) -> None:
    shop.send(events()[-10:])
    shop.drain()
    found = shop.stored()
    key = int(found.states["user",].keys[0])
    name = aggregate_record.key_id(list(found.states).index(("user",)), key)
    held = shop.store.read_records(shop.bundle.id, aggregate_record.AGGREGATE, [name])[0]
    assert held is not None
    shop.store.write_records(shop.bundle.id, aggregate_record.AGGREGATE, [name], [10**6], [b"\x01" * len(held)])
    difference = verify(shop.log, shop.bundle, shop.store, shop.topics).difference
    assert f"aggregate '{name}'" in difference


def test_a_server_answers_from_store_and_mirror_alike_and_says_as_of_when(shop: Shop) -> None:
    mirror = Mirror(shop.store, shop.bundle.id, shop.bundle.schema.aggregates)
    test = shop.frame.part("test")["event"].implode()
    shop.send(events().filter(pl.col("event").is_in(test)))
    shop.drain()
    for message in shop.log.read(shop.topics.deltas, 0, 0, shop.log.end_offsets(shop.topics.deltas)[0]):
        mirror.fold(delta.decode(message.value))
    mirror.caught_up()
    rows = StoreRows(shop.store, shop.bundle.id)
    services = (
        RankService(shop.bundle, shop.store),
        RankService(shop.bundle, shop.store, MirrorRows(mirror, rows, most_lag_s=1e9)),
    )
    newest = int(events()["time"].max())  # type: ignore[arg-type]
    answers = []
    for service in services:
        with TestClient(create_app(Router(service))) as client:
            asked = {"user": "u1", "candidates": [f"i{number}" for number in range(40)] + ["new"], "k": 41}
            now = client.post("/v1/rank", json=asked).json()
            later = client.post("/v1/rank", json=asked | {"at": "1971-01-01T00:00:00Z"}).json()
        answers.append((now["items"], later["items"]))
        assert now["as_of_source"] == "stream"
        assert datetime.fromisoformat(now["as_of"]) == EPOCH + timedelta(microseconds=newest)
        assert (later["as_of"], later["as_of_source"]) == ("1971-01-01T00:00:00Z", "request")
        assert now["items"] != later["items"]
    assert answers[0] == answers[1]


def test_a_mirror_that_begins_to_lag_during_a_request_still_answers_it(shop: Shop) -> None:
    mirror = Mirror(shop.store, shop.bundle.id, shop.bundle.schema.aggregates)
    rows = MirrorRows(mirror, StoreRows(shop.store, shop.bundle.id), most_lag_s=1e9)
    requests = RankService(shop.bundle, shop.store, rows)._aggregates
    asked = requests.of("u1", np.arange(5))
    nothing = UserRecords(None, stale=False)
    fresh, as_of = requests.answer(asked, nothing, None)
    rows._most_lag_s = -1.0
    assert rows.mirrored(away=False) is None
    late, late_as_of = requests.answer(asked, nothing, None)
    assert fresh is not None
    assert late is not None
    assert (late.tobytes(), late_as_of) == (fresh.tobytes(), as_of)
    assert as_of is not None


def test_a_time_that_is_none_is_refused_by_name(shop: Shop) -> None:
    with TestClient(create_app(Router(RankService(shop.bundle, shop.store)))) as client:
        for wrong in ("yesterday", 17, "1971-13-01T00:00:00Z"):
            answer = client.post("/v1/rank", json={"user": "u1", "candidates": ["i1"], "at": wrong})
            assert answer.status_code == 422
            assert answer.json()["field"] == "at"
