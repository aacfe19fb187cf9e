"""Candidates by the two towers over HTTP: alone, fused with content, under filters and policies, and in the stream."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.shown.message import Impression, decode_impression
from models.bundle.bundle import Bundle
from models.towers.towers import Towers, Visits
from serving.api.app import AppParts, create_app
from serving.metrics import Metrics
from serving.ranking.mirror_feed import mirrored
from serving.ranking.service import RankService
from serving.retrieval.meaning import Meant
from serving.sink import Kind
from serving.skew.record import decode as decode_skew
from serving.skew.sample import SkewSampler
from serving.store.memory import MemoryStore
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from tessera.demo.synthetic import new_item
from tests.integration.serving.test_policies import with_policies
from tests.integration.serving.test_retrieve import Place
from tests.integration.world import World

BY_TOWERS, BY_CONTENT = Meant(sources=("towers",)), Meant(sources=("content",))


@pytest.fixture
def place(towered_world: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(towered_world, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def _user(bundle: Bundle) -> str:
    """Returns the user with the most kept visits."""
    return str(bundle.history.group_by("user_id").len().sort("len", "user_id")["user_id"][-1])


def _names(answer: dict[str, Any]) -> list[str]:
    return [one["item"] for one in answer["items"]]


def _vectors(bundle: Bundle, store: MemoryStore, items: pl.DataFrame) -> np.ndarray:
    """Returns the items' vectors as the towers give them on the store's present table."""
    table, _ = store.read_table(bundle.id)
    assert bundle.towers is not None
    return bundle.towers.item_vectors(table.__getitem__, items)


def _slowly(place: Place, user: str, k: int) -> list[tuple[str, float]]:
    """Returns the best items for a user by all products, one item after another."""
    bundle, towers = place.bundle, place.bundle.towers
    assert towers is not None
    vectors = dict(zip(bundle.items["item_id"], _vectors(bundle, place.store, bundle.items), strict=True))
    visits = bundle.history.filter(pl.col("user_id") == user).tail(bundle.schema.history_length)
    newest = visits.tail(towers.length)
    table, _ = place.store.read_table(bundle.id)
    asked = Visits(
        np.array([vectors[item] for item in newest["item_id"]], dtype=np.float32),
        newest["time"].to_numpy().astype(np.int64),
        np.array([newest.height]),
        np.array([time.time_ns() // 1_000]),
    )
    (query,) = towers.user_vectors(table.__getitem__, bundle.users.filter(pl.col("user_id") == user), asked)
    scores = {item: float(vector @ query) for item, vector in vectors.items() if vector.any()}
    best = sorted(scores, key=lambda item: -scores[item])
    return [(item, scores[item]) for item in best if item not in set(visits["item_id"])][:k]


def test_the_towers_alone_give_the_products_of_a_slow_twin(place: Place) -> None:
    user = _user(place.bundle)
    found = place.post("/v1/retrieve", user=user, k=20, sources=["towers"]).json()
    expected = _slowly(place, user, 20)
    assert [one["score"] for one in found["items"]] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert set(_names(found)) == {item for item, _ in expected}
    assert [one["source"] for one in found["items"]] == ["towers"] * 20
    assert found["sources"] == ["towers"]
    assert found["space"] == place.bundle.manifest.towers


def test_the_default_fuses_both_sources_by_ranks(place: Place) -> None:
    user = _user(place.bundle)
    found = place.post("/v1/retrieve", user=user, k=150).json()
    assert found["sources"] == ["towers", "content"]
    alone = {
        name: _names(place.post("/v1/retrieve", user=user, k=150, sources=[name]).json())
        for name in ("towers", "content")
    }
    assert alone["towers"] != alone["content"]
    for one in found["items"]:
        ranks = {name: items.index(one["item"]) + 1 for name, items in alone.items() if one["item"] in items}
        assert one["ranks"] == ranks
        assert one["source"] == ("both" if len(ranks) == 2 else next(iter(ranks)))
        assert one["score"] == pytest.approx(sum(1 / (60 + rank) for rank in ranks.values()), rel=1e-6)
    scores = [one["score"] for one in found["items"]]
    assert scores == sorted(scores, reverse=True)
    # A short answer is the beginning of a long one, since each list has 100 items.
    few, many = (_names(place.post("/v1/retrieve", user=user, k=k).json()) for k in (5, 100))
    assert few == many[:5]
    assert {one["source"] for one in found["items"]} == {"towers", "content", "both"}


def test_content_weighs_what_training_chose(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    user, both = _user(place.bundle), ["towers", "content"]
    alone = {name: _names(place.post("/v1/retrieve", user=user, k=150, sources=[name]).json()) for name in both}
    monkeypatch.setattr(Towers, "content_weight", property(lambda _: 0.25))
    for one in place.post("/v1/retrieve", user=user, k=20).json()["items"]:
        shares = [
            weight / (61 + alone[name].index(one["item"]))
            for name, weight in (("towers", 1.0), ("content", 0.25))
            if one["item"] in alone[name][:100]
        ]
        assert one["score"] == pytest.approx(sum(shares), rel=1e-6)
    # A source that weighs nothing is not asked, unless a request names it.
    monkeypatch.setattr(Towers, "content_weight", property(lambda _: 0.0))
    found = place.post("/v1/retrieve", user=user, k=20).json()
    assert (found["sources"], _names(found)) == (["towers"], alone["towers"][:20])
    named = place.post("/v1/retrieve", user=user, k=100, sources=both).json()
    assert (named["sources"], _names(named)) == (both, alone["towers"][:100])
    assert place.post("/v1/retrieve", user="nobody", k=3).json()["plan"]["method"] == "popular"


def test_filters_hold_and_visited_items_stay_out_in_both_sources(place: Place) -> None:
    user = _user(place.bundle)
    visited = set(place.bundle.history.filter(pl.col("user_id") == user)["item_id"][-20:])
    cooking = set(place.items.filter(pl.col("topic").list.contains("cooking"))["item_id"])
    for sources in (["towers"], ["content"], ["towers", "content"]):
        found = place.post("/v1/retrieve", user=user, k=300, sources=sources).json()
        assert len(found["items"]) > 20
        assert not visited & set(_names(found))
        filtered = place.post(
            "/v1/retrieve", user=user, k=30, sources=sources, filter={"column": "topic", "eq": "cooking"}
        ).json()
        assert filtered["items"]
        assert set(_names(filtered)) <= cooking - visited


def test_steered_and_viewed_requests_ask_content_alone(place: Place) -> None:
    user = _user(place.bundle)
    found = place.post("/v1/retrieve", user=user, k=5, view="base").json()
    assert (found["sources"], {one["source"] for one in found["items"]}) == (["content"], {"content"})


def test_a_user_of_whom_nothing_is_known_gets_the_most_popular(place: Place) -> None:
    for asked in ({}, {"sources": ["towers"]}, {"sources": ["content"]}):
        found = place.post("/v1/retrieve", user="nobody", k=3, **asked).json()
        assert found["plan"]["method"] == "popular"
        assert (found["sources"], found["space"]) == ([], None)
        assert [(one["source"], one["ranks"]) for one in found["items"]] == [("popular", {})] * 3


def test_a_ranking_takes_its_candidates_from_both_sources(place: Place) -> None:
    user = _user(place.bundle)
    fused = place.post("/v1/retrieve", user=user, k=200).json()
    sources = {one["item"]: (one["source"], one["ranks"]) for one in fused["items"]}
    found = place.post("/v1/rank", user=user, k=50, explain=True).json()
    assert found["retrieved"]
    assert [(one["source"], one["ranks"]) for one in found["items"]] == [sources[item] for item in _names(found)]
    alone = place.post("/v1/rank", user=user, k=200, sources=["towers"]).json()
    assert {one["source"] for one in alone["items"]} == {"towers"}
    assert all("ranks" not in one for one in alone["items"])
    given = place.post("/v1/rank", user=user, candidates=_names(found)[:5], k=5, explain=True).json()
    assert all("source" not in one and "ranks" not in one for one in given["items"])


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/v1/retrieve", {"item": "1", "sources": ["towers"]}, "sources find items for a user"),
        ("/v1/retrieve", {"user": "1", "sources": ["clicks"]}, "'towers' or 'content'"),
        ("/v1/retrieve", {"user": "1", "sources": []}, "at least 1"),
        ("/v1/retrieve", {"user": "1", "sources": ["content", "content"]}, "named twice"),
        ("/v1/retrieve", {"user": "1", "sources": ["towers"], "view": "base"}, "the towers have no view"),
        ("/v1/retrieve", {"user": "1", "sources": ["towers"], "aspect": "a"}, "the towers have no aspect"),
        ("/v1/retrieve", {"user": "1", "sources": ["towers", "content"], "avoid": ["a"]}, "the towers have no avoid"),
        ("/v1/rank", {"user": "1", "sources": ["towers"], "avoid": ["a"]}, "the towers have no avoid"),
        ("/v1/rank", {"user": "1", "candidates": ["1"], "sources": ["towers"]}, "sources find candidates"),
    ],
)
def test_wrong_sources_are_refused(place: Place, path: str, body: dict[str, Any], problem: str) -> None:
    response = place.post(path, **body)
    assert response.status_code == 422
    assert problem in response.json()["detail"]


def test_a_bundle_without_towers_answers_by_content_and_refuses_towers_by_name(
    client: TestClient, world: World
) -> None:
    user = _user(world.bundle)
    for path in ("/v1/retrieve", "/v1/rank"):
        response = client.post(path, json={"user": user, "sources": ["towers"]})
        assert response.status_code == 422
        assert response.json()["field"] == "sources"
        assert f"bundle {world.bundle.id} has no towers" in response.json()["detail"]
    found = client.post("/v1/retrieve", json={"user": user}).json()
    assert (found["sources"], {one["source"] for one in found["items"]}) == (["content"], {"content"})


def test_a_policy_leaves_consumed_items_out_of_both_sources(place: Place) -> None:
    bundle = with_policies(place.bundle, {"unseen": {"leave_out_consumed": True}, "new": {"new": {"share": 0.3}}})
    with TestClient(create_app(Router(RankService(bundle, place.store)))) as client:
        user = _user(bundle)
        consumed = set(bundle.history.filter(pl.col("user_id") == user)["item_id"])
        for sources in (["towers"], ["towers", "content"]):
            asked = {"user": user, "k": 60, "sources": sources, "policy": "unseen"}
            found = client.post("/v1/retrieve", json=asked).json()
            assert len(found["items"]) > 20
            assert not consumed & set(_names(found))
            assert {one["source"] for one in found["items"]} <= {"towers", "content", "both"}
        arranged = client.post("/v1/rank", json={"user": user, "k": 10, "policy": "new", "explain": True}).json()
        assert all(one["source"] in ("towers", "content", "both") for one in arranged["items"])


def test_new_changed_and_deleted_items_of_the_stream_are_in_the_towers_index(place: Place) -> None:
    user, item = _user(place.bundle), new_item(3, "sourdough bread") | {"year": 2031}
    ask = {"user": user, "k": 5, "sources": ["towers"], "filter": {"column": "year", "eq": 2031}}
    place.post("/v1/items", items=[item])
    place.drain()
    first = place.post("/v1/retrieve", **ask).json()["items"]
    assert [one["item"] for one in first] == [item["item_id"]]
    place.post("/v1/items", items=[item | {"title": "a bicycle", "body": "cycling on a bicycle", "topic": "cycling"}])
    place.drain()
    changed = place.post("/v1/retrieve", **ask).json()["items"]
    assert [one["item"] for one in changed] == [item["item_id"]]
    assert changed[0]["score"] != first[0]["score"]
    place.post("/v1/items", items=[{"item_id": item["item_id"], "_deleted": True}])
    place.drain()
    assert place.post("/v1/retrieve", **ask).json()["items"] == []


def test_a_new_visit_moves_the_user_at_the_next_request(place: Place, towered_world: World) -> None:
    ask = {"user": "a reader who is new", "k": 5, "sources": ["towers"]}
    assert place.post("/v1/retrieve", **ask).json()["sources"] == []
    row = msgspec.json.decode(towered_world.messages(1)[0]) | {"label": 1, "user_id": ask["user"]}
    assert place.post("/v1/events", events=[_positive(place.bundle, row)]).status_code == 202
    place.drain()
    found = place.post("/v1/retrieve", **ask).json()
    assert found["sources"] == ["towers"]
    assert len(found["items"]) == 5


def _positive(bundle: Bundle, row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the events as a positive one of another user."""
    events = bundle.dataset.events
    return {name: value for name, value in row.items() if name in set(row)} | {str(events.user): row["user_id"]}


def test_a_mirror_and_a_later_server_give_the_same_answers(place: Place) -> None:
    place.post("/v1/items", items=[new_item(number, "sourdough bread") for number in range(3)])
    place.drain()
    users = place.bundle.history["user_id"].unique(maintain_order=True)[:10].to_list()
    with mirrored(place.settings.open_log, place.settings.topics, place.store, place.bundle) as rows:
        for other in (RankService(place.bundle, place.store, rows), RankService(place.bundle, place.store)):
            for user in users:
                for meant in (BY_TOWERS, Meant()):
                    expected = place.service.retrieve(user=user, k=20, meant=meant)
                    assert other.retrieve(user=user, k=20, meant=meant).items == expected.items


def test_metrics_and_the_index_say_what_the_towers_hold_and_find(place: Place) -> None:
    user = _user(place.bundle)
    found = place.post("/v1/retrieve", user=user, k=20).json()
    page = place.client.get("/metrics").text
    for source in {one["source"] for one in found["items"]}:
        count = sum(one["source"] == source for one in found["items"])
        assert f'tessera_retrieved_items_total{{source="{source}"}} {count:.1f}' in page
    schema, towers = place.bundle.schema, place.bundle.towers
    assert towers is not None
    (line,) = [one for one in page.splitlines() if one.startswith('tessera_index_bytes{index="towers"}')]
    index, rows = (place.bundle.items.height + 1) * towers.width * 4, schema.reserved * schema.dim * 4
    assert index + rows < float(line.rsplit(" ", 1)[1]) < index + rows + 200 * place.bundle.users.height


class _Kept:
    """Sink that keeps the messages."""

    def __init__(self) -> None:
        self.messages: dict[Kind, list[bytes]] = {}

    def append(self, kind: Kind, messages: Any) -> None:
        self.messages.setdefault(kind, []).extend(payload for _, payload in messages)


def test_impressions_and_skew_records_hold_the_sources(place: Place) -> None:
    kept, metrics, user = _Kept(), Metrics(), _user(place.bundle)
    recorder, sampler = Recorder(kept, metrics), SkewSampler(kept, metrics, 1.0)  # type: ignore[arg-type]
    parts = AppParts(recorder=recorder, sampler=sampler)
    with TestClient(create_app(Router(place.service), parts)) as client:
        found = client.post("/v1/rank", json={"user": user, "k": 9}).json()
        client.post("/v1/rank", json={"user": user, "k": 2, "candidates": _names(found)[:2]})
    recorder.close()
    sampler.close()
    shown, given = (decode_impression(one) for one in kept.messages["impressions"])
    assert isinstance(shown, Impression)
    assert isinstance(given, Impression)
    assert shown.items == _names(found)
    assert shown.sources == [one["source"] for one in found["items"]]
    assert given.sources == []
    sampled, plain = (decode_skew(one) for one in kept.messages["skew"])
    of_candidate = dict(zip(sampled.candidates, sampled.sources, strict=True))
    assert [of_candidate[item] for item in shown.items] == shown.sources
    assert plain.sources == []
