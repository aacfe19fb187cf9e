"""Policies over HTTP: consumed items leave, rules move items, answers explain it, and impressions record it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import DatasetError, EventError
from features.shown.message import Impression, decode_impression
from models.bundle.bundle import Bundle
from serving.api.app import AppParts, create_app
from serving.metrics import Metrics
from serving.policy.policies import check_filters
from serving.ranking.service import RankService
from serving.retrieval.meaning import Meant, PolicyRequest
from serving.sink import Kind
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from tests.integration.world import World

POLICIES: dict[str, Any] = {
    "home": {
        "leave_out_consumed": True,
        "diversity": {"by": "content", "weight": 0.3, "column": "topic", "most": 3},
        "boost": [{"filter": {"column": "year", "gte": 2020}, "times": 2.0}],
        "pin": [{"filter": {"column": "year", "lt": 2015}, "position": 2}],
        "new": {"share": 0.1, "positives": 3},
    },
    "unseen": {"leave_out_consumed": True},
    "codes": {"diversity": {"by": "semantic-id", "weight": 0.5}},
    "fresh": {"new": {"share": 0.2, "positives": 3}},
    "recent": {"boost": [{"filter": {"column": "year", "gte": 2020}, "times": 1e6}]},
}


def with_policies(bundle: Bundle, policies: dict[str, Any]) -> Bundle:
    """Returns a bundle whose descriptor has policies."""
    manifest = msgspec.structs.replace(bundle.manifest, dataset=bundle.manifest.dataset | {"policies": policies})
    return dataclasses.replace(bundle, manifest=manifest)


class _Kept:
    """Sink that keeps the messages."""

    def __init__(self) -> None:
        self.impressions: list[Impression] = []

    def append(self, kind: Kind, messages: Any) -> None:
        for _, payload in messages:
            found = decode_impression(payload)
            assert isinstance(found, Impression)
            self.impressions.append(found)


@pytest.fixture(scope="module")
def service(world: World) -> RankService:
    store = MemoryStore()
    fill_store(store, world.bundle)
    return RankService(with_policies(world.bundle, POLICIES), store)


@pytest.fixture(scope="module")
def kept() -> _Kept:
    return _Kept()


@pytest.fixture(scope="module")
def recorder(kept: _Kept) -> Iterator[Recorder]:
    opened = Recorder(kept, Metrics())  # type: ignore[arg-type]
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(service: RankService, recorder: Recorder) -> Iterator[TestClient]:
    with TestClient(create_app(Router(service), AppParts(recorder=recorder))) as opened:
        yield opened


def _user(world: World) -> tuple[str, set[str]]:
    """Returns the user with the most kept visits, and the items of these."""
    history = world.bundle.history
    user = history.group_by("user_id").len().sort("len", "user_id")["user_id"][-1]
    return str(user), set(history.filter(pl.col("user_id") == user)["item_id"].to_list())


def _ask(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def _ids(answer: dict[str, Any]) -> list[str]:
    return [one["item"] for one in answer["items"]]


@pytest.mark.parametrize("policy", ["home", "unseen"])
def test_consumed_items_are_left_out_of_rank_and_retrieve(client: TestClient, world: World, policy: str) -> None:
    user, consumed = _user(world)
    items = world.bundle.items["item_id"].to_list()
    without = _ask(client, "/v1/rank", user=user, candidates=items, k=len(items))
    assert consumed <= set(_ids(without))
    for body in ({"candidates": items, "k": len(items)}, {"k": 30}):
        answer = _ask(client, "/v1/rank", user=user, policy=policy, **body)
        assert not consumed & set(_ids(answer))
        assert answer["policy"] == policy
    for body in ({"user": user}, {"item": next(iter(consumed)), "shown_to": user}, {"text": "news", "shown_to": user}):
        answer = _ask(client, "/v1/retrieve", k=50, policy=policy, **body)
        assert len(answer["items"]) > 10
        assert not consumed & set(_ids(answer))


def test_a_policy_that_only_leaves_out_keeps_the_order(client: TestClient, world: World) -> None:
    user, consumed = _user(world)
    items = world.bundle.items["item_id"].to_list()
    plain = [
        item
        for item in _ids(_ask(client, "/v1/rank", user=user, candidates=items, k=len(items)))
        if item not in consumed
    ]
    assert _ids(_ask(client, "/v1/rank", user=user, candidates=items, k=len(items), policy="unseen")) == plain


def test_pins_boosts_and_caps_hold(client: TestClient, world: World) -> None:
    user, _ = _user(world)
    rows = {row["item_id"]: row for row in world.bundle.items.select("item_id", "year", "topic").to_dicts()}
    answer = _ask(client, "/v1/rank", user=user, k=20, policy="home", explain=True)
    moved = [one["moved"] for one in answer["items"]]
    assert rows[answer["items"][1]["item"]]["year"] < 2015
    assert moved[1]["pinned"]
    for one in answer["items"]:
        assert one["moved"]["times"] == pytest.approx(2.0 if rows[one["item"]]["year"] >= 2020 else 1.0)
    topics = [topic for one in answer["items"] for topic in rows[one["item"]]["topic"]]
    fixed = sum(one["pinned"] or one["drawn"] for one in moved)
    assert max(topics.count(topic) for topic in topics) <= 3 + fixed
    assert max(one["similarity"] for one in moved) > 0
    assert set(answer["left_out"]) == {"consumed", "cap"}
    recent = _ids(_ask(client, "/v1/rank", user=user, k=10, policy="recent"))
    assert all(rows[item]["year"] >= 2020 for item in recent)


def test_semantic_ids_spread_an_answer(client: TestClient, world: World) -> None:
    codes = dict(
        world.bundle.items.select("item_id", pl.col("semantic_codes").cast(pl.List(pl.UInt16)).list.first()).iter_rows()
    )
    first = world.bundle.items["item_id"][0]
    plain, spread = (
        {codes[item] for item in _ids(_ask(client, "/v1/retrieve", item=first, k=10, **own))}
        for own in ({}, {"policy": "codes"})
    )
    assert len(spread) > len(plain)


def test_the_floor_is_drawn_and_its_propensity_recorded(
    client: TestClient, world: World, recorder: Recorder, kept: _Kept
) -> None:
    counts = dict(world.bundle.items.select("item_id", "train_positives").iter_rows())
    user, items = _user(world)[0], world.bundle.items["item_id"].to_list()
    new = [item for item in items if counts[item] <= 3]
    answers = [
        _ask(client, "/v1/rank", user=user, candidates=items, k=10, policy="fresh", explain=bool(number % 2))
        for number in range(20)
    ]
    answers.append(_ask(client, "/v1/rank", user=user, candidates=items, k=10))
    recorder.close()
    found = {one.id: one for one in kept.impressions}
    shown = [found[answer["impression"]] for answer in answers]
    *explored, plain = shown
    assert (plain.policy, plain.propensities) == ("", [])
    for answer, one in zip(answers, explored, strict=False):
        assert one.policy == "fresh"
        assert one.items == _ids(answer)
        drawn = [item for item, chance in zip(one.items, one.propensities, strict=True) if chance < 1]
        assert len(drawn) == 2
        assert all(counts[item] <= 3 for item in drawn)
        assert [chance for chance in one.propensities if chance < 1] == pytest.approx([2 / len(new)] * 2)
        assert [one.items.index(item) for item in drawn] == [4, 9]
    assert len({tuple(one.items) for one in explored}) > 1


def test_wrong_policies_are_refused_by_name(client: TestClient, world: World) -> None:
    refusals: list[tuple[str, dict[str, Any], str, str]] = [
        ("/v1/rank", {"user": "1", "policy": "hom"}, "policy", "has no policy 'hom'; choose of home, unseen"),
        ("/v1/retrieve", {"user": "1", "policy": "hom"}, "policy", "has no policy 'hom'"),
        ("/v1/retrieve", {"text": "x", "policy": "home"}, "shown_to", "name the user"),
        ("/v1/retrieve", {"user": "1", "shown_to": "2", "policy": "home"}, "shown_to", "is another user than '1'"),
        ("/v1/retrieve", {"text": "x", "shown_to": "2"}, "body", "shown_to is read by a policy"),
        ("/v1/rank", {"user": "1", "policy": ""}, "policy", "at least 1"),
    ]
    for path, body, field, words in refusals:
        response = client.post(path, json=body)
        assert response.status_code == 422, response.text
        assert response.json()["field"] == field
        assert words in response.json()["detail"]


def test_a_bundle_without_policies_says_so(world: World) -> None:
    store = MemoryStore()
    fill_store(store, world.bundle)
    with pytest.raises(EventError, match="has no policy 'home'; choose of none; declare"):
        RankService(world.bundle, store).rank("1", None, 5, meant=Meant(policy=PolicyRequest("home", "")))


def test_a_filter_of_the_wrong_kind_is_refused_with_its_field(world: World, tmp_path: Path) -> None:
    text = world.dataset.source.read_text()
    path = tmp_path / "dataset.toml"
    path.write_text(
        f'{text}\n[policies.home]\nboost = [{{ filter = {{ column = "year", gte = "new" }}, times = 2 }}]\n'
    )
    with pytest.raises(DatasetError, match=r"dataset.toml: \[policies\] home.boost.0.filter: column 'year' holds num"):
        check_filters(load_dataset(path), world.bundle.items)


def test_policies_are_part_of_a_bundle_and_absent_without_them(world: World) -> None:
    assert "policies" not in world.bundle.manifest.dataset
    dataset = Dataset.model_validate(world.bundle.manifest.dataset | {"policies": POLICIES})
    written = json.loads(json.dumps(dataset.model_dump(mode="json")))
    assert Dataset.model_validate(written).policies == dataset.policies
    assert np.isclose(dataset.policies["home"].boost[0].times, 2.0)
