"""A server with indexes of int8 rows answers as one of float32 rows does, in fewer bytes, and follows the stream."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.ranking.service import RankService
from serving.retrieval import index as planner
from serving.store.memory import MemoryStore
from serving.traffic.follow import ServiceOpener
from tessera.demo.synthetic import new_item
from tests.integration.serving.test_retrieve import Place
from tests.integration.world import World


@pytest.fixture
def place(world: World, tmp_path: Path) -> Iterator[Place]:
    made = Place(world, tmp_path)
    with made.client, contextlib.closing(made.sink):
        yield made


def test_answers_of_int8_indexes_are_those_of_float32_indexes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_LEAST_INDEXED", 64)
    small, whole = RankService(place.bundle, place.store, index="int8"), place.service
    asked = place.items["item_id"].to_list()[:20]
    shared = 0
    for item in asked:
        found, expected = (one.similar(item, 10) for one in (small, whole))
        shared += len({name for name, _ in found} & {name for name, _ in expected})
        assert np.allclose([score for _, score in found], [score for _, score in expected], atol=0.02)
    assert shared >= 0.95 * 10 * len(asked)
    assert small.index_bytes["base"] < whole.index_bytes["base"] / 2


def test_items_of_the_stream_enter_and_leave_an_int8_index(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_LEAST_INDEXED", 64)
    place.service = RankService(place.bundle, place.store, index="int8")
    item = new_item(3, "sourdough bread")
    assert place.post("/v1/items", items=[item]).status_code == 202
    place.drain()
    nearest = place.service.similar(item["item_id"], 1)[0][0]
    assert item["item_id"] in dict(place.service.similar(nearest, 30))
    assert place.post("/v1/items", items=[{"item_id": item["item_id"], "_deleted": True}]).status_code == 202
    place.drain()
    assert item["item_id"] not in dict(place.service.similar(nearest, 30))


def test_the_opener_passes_the_format_on(world: World) -> None:
    opened, close = ServiceOpener(MemoryStore(), index="int8")(world.bundle)
    whole, close_whole = ServiceOpener(MemoryStore())(world.bundle)
    with contextlib.ExitStack() as stack:
        stack.callback(close)
        stack.callback(close_whole)
        assert opened.index_bytes["base"] < whole.index_bytes["base"]
