"""Retrieval, explanations, items and what comes in, over HTTP: answers, plans, and the log."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from serving.api.app import AppParts, create_app
from serving.api.ingest import Intake
from serving.api.log_sink import LogSink
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from streaming.trainer import TrainerOptions
from tessera.demo.synthetic import new_item
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World


class Place:
    """A server in this process over a log and a store of its own."""

    def __init__(self, world: World, directory: Path) -> None:
        self.bundle, self.settings = world.bundle, Settings(home=directory)
        self.store = MemoryStore()
        fill_store(self.store, self.bundle)
        self.service = RankService(self.bundle, self.store)
        self.sink = LogSink(self.settings.open_log, self.settings.topics)
        app = create_app(Router(self.service), AppParts(intake=Intake(self.sink)))
        self.client = TestClient(app, raise_server_exceptions=False)
        self.items = self.bundle.items.filter(pl.col("listed"))

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})

    def appended(self) -> int:
        with contextlib.closing(self.settings.open_log()) as log:
            log.create_topics(self.settings.topics.partitions())
            topics = self.settings.topics
            return int(sum(sum(log.end_offsets(topic).values()) for topic in (topics.events, topics.items)))

    def drain(self) -> None:
        with contextlib.closing(self.settings.open_log()) as log:
            options = TrainerOptions(batch=64, lateness_s=1e9)
            connections = StreamConnections.shared(log, self.store, topics=self.settings.topics)
            with StreamService(self.bundle, connections, options) as stream:
                stream.drain()
        self.service.refresh()


@pytest.fixture
def place(world: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(world, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def _vectors(items: pl.DataFrame) -> np.ndarray:
    return np.array(items["content_vector"].to_list(), dtype=np.float32)


def test_the_nearest_items_that_match_are_those_of_a_scan(place: Place) -> None:
    vectors, ids = _vectors(place.items), place.items["item_id"].to_list()
    held = (place.items["year"] >= 2020).to_numpy() & ~place.items["topic"].list.contains("cooking").to_numpy()
    tree = {"and": [{"column": "year", "gte": 2020}, {"not": {"column": "topic", "eq": "cooking"}}]}
    scores = np.where(held, vectors @ vectors[5], -np.inf)
    scores[5] = -np.inf
    found = place.post("/v1/retrieve", item=ids[5], k=10, filter=tree).json()
    assert found["bundle"] == place.bundle.id
    best = [ids[n] for n in np.argsort(-scores)[:10]]
    assert {one["item"] for one in found["items"]} == set(best)
    assert [one["score"] for one in found["items"]] == pytest.approx(np.sort(scores)[::-1][:10], abs=1e-5)
    assert found["plan"]["method"] == "exact"
    assert found["plan"]["matches"] == held.sum()
    assert found["plan"]["why"]


def test_a_text_and_a_user_are_ways_to_ask(place: Place) -> None:
    row = place.items.row(7, named=True)
    by_text = place.post("/v1/retrieve", text=row["text"], k=3, channels=["content"]).json()
    assert by_text["items"][0]["item"] == row["item_id"]
    assert by_text["items"][0]["score"] == pytest.approx(1.0, abs=1e-5)
    user = place.bundle.history["user_id"][0]
    liked = set(place.bundle.history.filter(pl.col("user_id") == user)["item_id"].to_list()[-20:])
    by_user = place.post("/v1/retrieve", user=user, k=20).json()
    assert not liked & {one["item"] for one in by_user["items"]}
    stranger = place.post("/v1/retrieve", user="nobody", k=5, filter={"column": "topic", "eq": "cooking"}).json()
    assert stranger["plan"]["method"] == "popular"
    topics = dict(zip(place.items["item_id"], place.items["topic"].to_list(), strict=True))
    assert all("cooking" in topics[one["item"]] for one in stranger["items"])


def test_ranking_retrieves_among_what_matches(place: Place) -> None:
    user = place.bundle.history["user_id"][0]
    found = place.post("/v1/rank", user=user, k=20, filter={"column": "topic", "in": ["cooking", "cycling"]}).json()
    topics = dict(zip(place.items["item_id"], place.items["topic"].to_list(), strict=True))
    assert found["retrieved"]
    assert found["items"]
    assert all({"cooking", "cycling"} & set(topics[one["item"]]) for one in found["items"])


def test_reasons_are_what_taking_a_feature_away_costs(place: Place) -> None:
    user, ids = place.bundle.history["user_id"][0], place.items["item_id"].to_list()[:30]
    plain = place.post("/v1/rank", user=user, candidates=ids, k=5).json()
    found = place.post("/v1/rank", user=user, candidates=ids, k=5, explain=True).json()
    assert [one["item"] for one in found["items"]] == [one["item"] for one in plain["items"]]
    schema = place.bundle.schema
    names = {feature.name for feature in schema.features} | {numeric.name for numeric in schema.numeric}
    for one in found["items"]:
        reasons = one["reasons"]
        assert reasons.keys() - {"content"} == names
        assert list(map(abs, reasons.values())) == sorted(map(abs, reasons.values()), reverse=True)
        assert any(abs(value) > 1e-4 for value in reasons.values())
    # A user nobody knows has no row to take away.
    unknown = place.post("/v1/rank", user="nobody", candidates=ids, k=5, explain=True).json()
    assert all(one["reasons"]["user_id"] == 0 for one in unknown["items"])
    assert "reasons" not in plain["items"][0]


def test_an_item_comes_in_is_found_by_filter_and_text_changes_and_leaves(place: Place) -> None:
    item = new_item(3, "sourdough bread") | {"year": 2031}
    recent = {"column": "year", "gt": 2030}
    assert place.post("/v1/retrieve", text=item["title"], filter=recent).json()["items"] == []
    assert place.client.get(f"/v1/items/{item['item_id']}").status_code == 404
    answer = place.post("/v1/items", items=[item])
    assert (answer.status_code, answer.json()) == (202, {"accepted": 1})
    place.drain()
    found = place.post("/v1/retrieve", text=item["title"], filter=recent).json()
    assert [one["item"] for one in found["items"]] == [item["item_id"]]
    seen = place.client.get(f"/v1/items/{item['item_id']}").json()
    assert seen["encoder"] == place.bundle.manifest.encoder
    assert seen["codebook"] == place.bundle.manifest.codebook
    assert seen["attributes"]["year"] == 2031
    assert len(seen["semantic_id"]) == place.bundle.codebook.levels
    assert np.linalg.norm(seen["vector"]) == pytest.approx(1.0, abs=1e-5)
    assert place.post("/v1/items", items=[item | {"year": 1999}]).status_code == 202
    place.drain()
    assert place.post("/v1/retrieve", text=item["title"], filter=recent).json()["items"] == []
    assert place.post("/v1/items", items=[{"item_id": item["item_id"], "_deleted": True}]).status_code == 202
    place.drain()
    assert place.client.get(f"/v1/items/{item['item_id']}").status_code == 404
    gone = place.post("/v1/retrieve", item=item["item_id"])
    assert (gone.status_code, gone.json()["field"]) == (422, "item")
    top = place.post("/v1/retrieve", text=item["title"], k=50).json()
    assert item["item_id"] not in {one["item"] for one in top["items"]}


def test_a_published_item_is_shown_as_it_was_published(place: Place) -> None:
    row = place.items.row(0, named=True)
    seen = place.client.get(f"/v1/items/{row['item_id']}").json()
    assert seen["semantic_id"] == list(row["semantic_codes"])
    assert seen["attributes"]["year"] == row["year"]
    assert seen["attributes"]["topic"] == row["topic"]
    assert place.client.get("/v1/items/a%2Fb").status_code == 404


def test_events_come_in_and_are_trained_on(place: Place, world: World) -> None:
    rows = [json.loads(message) for message in world.messages(20)]
    before = place.store.read_table(place.bundle.id)[1].max()
    assert place.post("/v1/events", events=rows).json() == {"accepted": 20}
    assert place.appended() == 20
    place.drain()
    assert place.store.read_table(place.bundle.id)[1].max() > before


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/events", {"events": []}, "events"),
        ("/v1/events", {"events": [{}]}, "events.0"),
        ("/v1/events", {"events": [{"user_id": "1"}]}, "events.0"),
        ("/v1/events", {"events": ["x"]}, "events.0"),
        (
            "/v1/events",
            {"events": [GOOD := {"user_id": "1", "item_id": "a", "time": 1.7e9, "clicked": 1}, 3]},
            "events.1",
        ),
        ("/v1/events", {"events": [GOOD, GOOD | {"clicked": "often"}]}, "events.1"),
        ("/v1/events", {"events": [GOOD | {"time": float("nan")}]}, "events.0.time"),
        ("/v1/events", {"events": [GOOD | {"time": 1e300}]}, "events.0"),
        ("/v1/events", {"events": [GOOD | {"user_id": None}]}, "events.0"),
        ("/v1/items", {"items": [{"title": "no id"}]}, "items.0"),
        ("/v1/items", {"items": [{"item_id": "x", "year": "soon"}]}, "items.0"),
        ("/v1/items", {"items": [{"item_id": {"a": 1}}]}, "items.0.item_id"),
        ("/v1/retrieve", {}, "body"),
        ("/v1/retrieve", {"item": "a", "text": "b"}, "body"),
        ("/v1/retrieve", {"item": "no such"}, "item"),
        ("/v1/retrieve", {"text": "x", "filter": {"column": "size", "eq": 1}}, "filter"),
        ("/v1/retrieve", {"text": "x", "filter": {"column": "year", "eq": float("inf")}}, "filter.eq"),
        ("/v1/retrieve", {"text": "x", "filter": {"and": []}}, "filter.and"),
        ("/v1/rank", {"user": "1", "candidates": ["a"], "filter": {"column": "year", "eq": 1}}, "body"),
        ("/v1/rank", {"user": "1", "k": 101, "explain": True}, "body"),
        ("/v1/rank", {"user": "1", "context": {"x": float("nan")}}, "context.x"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_appended(place: Place, path: str, body: Any, field: str) -> None:
    answer = place.post(path, **body)
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["field"].startswith(field), answer.text
    assert place.appended() == 0


def test_a_filter_of_any_depth_gets_an_answer(place: Place) -> None:
    for depth in (10, 40, 400, 20_000):
        text = '{"text": "x", "filter": ' + '{"not": ' * depth + '{"column": "year", "eq": 1}' + "}" * (depth + 1)
        answer = place.client.post("/v1/retrieve", content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 200 if depth == 10 else answer.status_code in (400, 422), answer.text
        assert depth == 10 or answer.headers["content-type"] == "application/problem+json"
