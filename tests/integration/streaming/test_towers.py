"""The towers' item vectors follow the stream: they are those that the table and the items' records give at any time."""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from models.bundle import record
from models.bundle.record import ItemRecord, entity_frame
from models.table.schema import SEMANTIC_ID
from serving.api.app import create_app
from serving.ranking.service import RankService
from serving.ranking.tower_index import TowerIndex
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.protocol import OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.store import RedisStore
from serving.traffic.router import Router
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from tessera.demo.synthetic import new_item
from tests.integration.streaming.test_stream import Place
from tests.integration.world import World

NEW, CHANGED, DELETED = 12, 20, 5


@pytest.fixture
def world(towered_world: World) -> World:
    """The world of these tests has towers."""
    return towered_world


@pytest.fixture(params=["embedded", "servers"])
def place(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Iterator[Place]:
    """A log and a store in this process, then the real servers."""
    with contextlib.ExitStack() as opened:
        if request.param == "embedded":
            log: EventLog = opened.enter_context(contextlib.closing(LocalLog(tmp_path / "log.db")))
            store: OnlineStore = opened.enter_context(contextlib.closing(open_embedded(tmp_path / "redis")))
        else:
            log = opened.enter_context(contextlib.closing(KafkaLog(request.getfixturevalue("kafka_address"))))
            store = opened.enter_context(contextlib.closing(RedisStore(request.getfixturevalue("redis_address"))))
        store.drop(world.bundle.id)
        yield Place(log, store, Topics(f"t{uuid.uuid4().hex[:8]}-"))
        store.drop(world.bundle.id)


def _by_service(service: RankService, names: list[str]) -> np.ndarray:
    """Returns the vectors of the index that answers, zero for an item that it does not find."""
    live = service._live
    assert isinstance(live.towers, TowerIndex)
    return live.towers.searcher.index.vectors(live.catalogue.number_items(names))


def _by_table(world: World, place: Place, names: list[str]) -> np.ndarray:
    """Returns the vectors that the store's table and records give, one item after another, the slow way."""
    bundle, towers = world.bundle, world.bundle.towers
    assert towers is not None
    table, _ = place.store.read_table(bundle.id)
    like, found = bundle.items.clear(), []
    for name, data in zip(names, place.store.read_records(bundle.id, record.ITEM, names), strict=True):
        if data == record.TOMBSTONE:
            found.append(np.zeros(towers.width, dtype=np.float32))
            continue
        frame = bundle.items.filter(pl.col("item_id") == name)
        if data is not None:
            frame = entity_frame([_row(world, name, record.decode_item(data))], like)
        found.append(towers.item_vectors(table.__getitem__, frame)[0])
    return np.array(found)


def _row(world: World, name: str, item: ItemRecord) -> dict[str, object]:
    tokenizer = world.bundle.tokenizer
    assert tokenizer is not None
    tokens = tokenizer.tokens(np.array([item.codes], dtype=np.uint16))[0]
    return item.features | {"item_id": name, SEMANTIC_ID: tokens, "content_vector": item.content().tolist()}


def _changes(world: World) -> tuple[list[dict[str, object]], list[str]]:
    """Returns rows of new, changed and deleted items, and the ids of the deleted ones."""
    known = world.bundle.items.filter(pl.col("listed"))["item_id"].to_list()
    rows = [new_item(number, "sourdough bread") for number in range(NEW)]
    rows += [new_item(100 + n, "road racing") | {"item_id": name} for n, name in enumerate(known[:CHANGED])]
    deleted = [*known[CHANGED : CHANGED + DELETED], str(rows[0]["item_id"])]
    return [*rows, *({"item_id": name, "_deleted": True} for name in deleted)], deleted


def test_vectors_after_streaming_are_those_of_the_table_and_the_records(place: Place, world: World) -> None:
    bundle = world.bundle
    fill_store(place.store, bundle)
    service = RankService(bundle, place.store)
    rows, deleted = _changes(world)
    names = list(dict.fromkeys([*bundle.items["item_id"].to_list(), *(str(row["item_id"]) for row in rows)]))
    messages, before = world.messages(400), place.store.read_table(bundle.id)[0]
    for part in range(4):
        place.send(place.topics.events, messages[100 * part : 100 * part + 100])
        place.send(place.topics.items, [json.dumps(row, default=str).encode() for row in rows[part::4]])
        with place.stream(world) as stream:
            stream.drain()
        service.refresh()
    after = place.store.read_table(bundle.id)[0]
    start = bundle.schema.rows - bundle.schema.reserved
    assert (before[:start] != after[:start]).any()
    assert (before[start:] == after[start:]).all()
    found, expected = _by_service(service, names), _by_table(world, place, names)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(_by_service(RankService(bundle, place.store), names), expected, rtol=0, atol=1e-6)
    assert not found[[names.index(name) for name in deleted]].any()
    new = [str(row["item_id"]) for row in rows[1:NEW]]
    assert found[[names.index(name) for name in new]].any(axis=1).all()
    published = bundle.towers.item_vectors(before.__getitem__, bundle.items) if bundle.towers is not None else None
    assert published is not None
    assert (np.abs(published[:CHANGED] - found[:CHANGED]).max(axis=1) > 1e-3).any()


def test_a_new_item_is_found_by_the_towers_within_a_second_of_the_store(towered_world: World, tmp_path: Path) -> None:
    bundle, store = towered_world.bundle, MemoryStore()
    fill_store(store, bundle)
    user = bundle.history["user_id"][0]
    item = new_item(3, "sourdough bread") | {"year": 2031}
    ask = {"user": user, "k": 5, "sources": ["towers"], "filter": {"column": "year", "eq": 2031}}
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        place = Place(log, store, Topics(f"t{uuid.uuid4().hex[:8]}-"))
        with TestClient(create_app(Router(RankService(bundle, store)))) as client:
            assert client.post("/v1/retrieve", json=ask).json()["items"] == []
            place.send(place.topics.items, [json.dumps(item, default=str).encode()])
            with place.stream(towered_world) as stream:
                stream.drain()
            began = time.monotonic()
            while not client.post("/v1/retrieve", json=ask).json()["items"]:
                assert time.monotonic() - began < 1.0
                time.sleep(0.02)
