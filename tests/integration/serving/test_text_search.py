"""Text search over HTTP: vectors and words fused by ranks, live in a stream, within filters."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.ranking.service import RankService
from serving.retrieval.meaning import Meant
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from tessera.demo.synthetic import new_item
from tests.integration.serving.test_retrieve import Place
from tests.integration.world import World


@pytest.fixture
def place(world: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(world, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def _names(answer: dict[str, Any]) -> list[str]:
    return [one["item"] for one in answer["items"]]


def test_an_answer_says_the_rank_in_each_channel_and_sums_reciprocal_ranks(place: Place) -> None:
    text = place.items["text"][7]
    found = place.post("/v1/retrieve", text=text, k=20).json()
    assert found["channels"] == ["content", "lexical"]
    alone = {
        name: _names(place.post("/v1/retrieve", text=text, k=100, channels=[name]).json())
        for name in ("content", "lexical")
    }
    assert found["items"][0]["ranks"] == {"content": 1, "lexical": 1}
    weights = {"content": 1, "lexical": 10}
    for one in found["items"]:
        ranks = {name: items.index(one["item"]) + 1 for name, items in alone.items() if one["item"] in items}
        assert one["ranks"] == ranks
        assert one["score"] == pytest.approx(sum(weights[name] / (60 + rank) for name, rank in ranks.items()))
    scores = [one["score"] for one in found["items"]]
    assert scores == sorted(scores, reverse=True)


def test_words_follow_new_changed_and_deleted_items_of_the_stream(place: Place) -> None:
    item = new_item(3, "sourdough bread") | {"title": "zyxwv 機械学習 robot", "year": 2031}
    place.post("/v1/items", items=[item])
    place.drain()
    ask = {"k": 5, "channels": ["lexical"]}
    for query in ("ZYXWV", "機械"):
        assert _names(place.post("/v1/retrieve", text=query, **ask).json()) == [item["item_id"]]
    assert place.post("/v1/retrieve", text="zyxwv", k=5).json()["items"][0]["ranks"] == {"lexical": 1}
    place.post("/v1/items", items=[item | {"title": "qwxyz"}])
    place.drain()
    assert _names(place.post("/v1/retrieve", text="zyxwv", **ask).json()) == []
    assert _names(place.post("/v1/retrieve", text="qwxyz", **ask).json()) == [item["item_id"]]
    place.post("/v1/items", items=[{"item_id": item["item_id"], "_deleted": True}])
    place.drain()
    assert _names(place.post("/v1/retrieve", text="qwxyz", **ask).json()) == []


def test_a_server_that_starts_later_has_the_words_of_the_stream(place: Place) -> None:
    item = new_item(3, "sourdough bread") | {"title": "zyxwv robot"}
    place.post("/v1/items", items=[item])
    place.drain()
    meant = Meant(channels=("lexical",))
    asked: dict[str, Any] = {"text": "robot bread", "k": 9, "meant": meant}
    later = RankService(place.bundle, place.store)
    assert later.retrieve(**asked).items == place.service.retrieve(**asked).items
    assert later.retrieve(text="zyxwv", k=9, meant=meant).items[0][0] == item["item_id"]
    empty = MemoryStore()
    fill_store(empty, place.bundle)
    assert RankService(place.bundle, empty).retrieve(text="zyxwv", k=9, meant=meant).items == []


def test_both_channels_keep_to_the_filter(place: Place) -> None:
    tree = {"column": "topic", "eq": "cooking"}
    cooking = set(place.items.filter(place.items["topic"].list.contains("cooking"))["item_id"].to_list())
    for channels in (["content"], ["lexical"], ["content", "lexical"]):
        found = place.post("/v1/retrieve", text=place.items["text"][7], k=30, filter=tree, channels=channels).json()
        assert found["items"]
        assert set(_names(found)) <= cooking


def test_a_text_without_a_known_word_gives_the_most_popular(place: Place) -> None:
    found = place.post("/v1/retrieve", text="qqqq", k=3).json()
    assert found["plan"]["method"] == "popular"
    assert [one["ranks"] for one in found["items"]] == [{}, {}, {}]


def test_the_metrics_say_the_bytes_of_each_index(place: Place) -> None:
    found = dict(
        line.removeprefix("tessera_index_bytes").rsplit(" ", 1)
        for line in place.client.get("/metrics").text.splitlines()
        if line.startswith("tessera_index_bytes{")
    )
    rows, width = place.bundle.items.height + 1, len(place.items["content_vector"][0])
    assert float(found['{index="base"}']) == rows * width * 4
    assert 0 < float(found['{index="lexical"}']) < rows * 1_000


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"text": "a", "channels": ["words"]}, "'content' or 'lexical'"),
        ({"item": "1", "channels": ["lexical"]}, "channels search a text"),
        ({"text": "a", "channels": []}, "at least 1"),
        ({"text": "a", "channels": ["lexical", "lexical"]}, "named twice"),
        ({"text": "a", "channels": ["lexical"], "view": "base"}, "has no view"),
        ({"text": "a", "channels": ["lexical"], "avoid": ["War"]}, "words have no concepts to avoid"),
    ],
)
def test_channels_that_fit_no_search_are_refused(place: Place, body: dict[str, Any], problem: str) -> None:
    answer = place.post("/v1/retrieve", **body)
    assert answer.status_code == 422
    assert problem in answer.text
