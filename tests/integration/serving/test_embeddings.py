"""Embeddings by feature value, and the mirror that a server reads rows from: the table's numbers, as fresh as told."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from features.errors import EventError, StoreError
from features.hashing import fingerprint
from models.bundle import delta
from serving.api.app import create_app
from serving.ranking.mirror_feed import mirrored
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def mirror_of(world: World, settings: Settings) -> Iterator[tuple[MemoryStore, MirrorRows]]:
    store = MemoryStore()
    fill_store(store, world.bundle)
    with mirrored(settings.open_log, settings.topics, store, world.bundle) as rows:
        yield store, rows


def _until(ready: Any) -> None:
    give_up = time.monotonic() + 10
    while not ready() and time.monotonic() < give_up:
        time.sleep(0.02)
    assert ready()


def test_a_values_embedding_is_its_rows_by_the_hash_contract(world: World) -> None:
    bundle, store = world.bundle, MemoryStore()
    fill_store(store, bundle)
    client = RankService(bundle, store).embeddings
    schema, table = bundle.schema, bundle.rows()
    feature = next(f for f in schema.features if f.of == "item" and f.column == "item_id")
    # The most frequent ones: all of them are admitted.
    names = bundle.items.sort("train_positives", descending=True)["item_id"].to_list()[:7]
    rows = schema.hash_spec.lookup(feature.salt, feature.chunks, fingerprint(names))
    expected = table[rows].reshape(len(names), -1)
    np.testing.assert_array_equal(client.lookup(feature.name, names), expected)
    pooled = client.lookup(feature.name, [names[:2], [], [names[2]], None])
    np.testing.assert_allclose(pooled[0], expected[:2].mean(axis=0), rtol=1e-6)
    assert not pooled[1].any()
    np.testing.assert_array_equal(pooled[2], expected[2])
    assert not pooled[3].any()
    assert client.lookup(feature.name, []).shape == (0, client.width(feature.name))
    with pytest.raises(EventError, match="feature 'colour' is unknown; the bundle has"):
        client.lookup("colour", ["red"])
    mixed = [names[0], 5, 0.5, True, [names[1], 7]]
    alone = np.concatenate([client.lookup(feature.name, [value]) for value in mixed])
    np.testing.assert_array_equal(client.lookup(feature.name, mixed), alone)
    with pytest.raises(EventError, match="values: expected text, numbers, booleans or lists"):
        client.lookup(feature.name, [{"a": 1}])  # type: ignore[list-item]


def test_embeddings_over_http(world: World) -> None:
    store = MemoryStore()
    fill_store(store, world.bundle)
    service = RankService(world.bundle, store)
    feature = world.bundle.schema.features[0].name
    with TestClient(create_app(Router(service)), raise_server_exceptions=False) as client:
        answer = client.post("/v1/embeddings", json={"feature": feature, "values": ["a", ["a", "b"], None]})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["bundle"], body["width"], len(body["vectors"])) == (world.bundle.id, len(body["vectors"][0]), 3)
        wrong = client.post("/v1/embeddings", json={"feature": "nothing", "values": ["a"]})
        assert (wrong.status_code, wrong.json()["field"]) == (422, "feature")
        mixed = client.post("/v1/embeddings", json={"feature": feature, "values": ["a", 1]})
        alone = [client.post("/v1/embeddings", json={"feature": feature, "values": [value]}) for value in ("a", 1)]
        assert mixed.json()["vectors"] == [answer.json()["vectors"][0] for answer in alone]
        assert client.post("/v1/embeddings", json={"feature": feature, "values": []}).status_code == 422


def test_a_mirror_follows_the_stream_and_ranks_as_the_store_does(
    world: World, settings: Settings, mirror_of: tuple[MemoryStore, MirrorRows]
) -> None:
    store, rows = mirror_of
    by_store, by_mirror = RankService(world.bundle, store), RankService(world.bundle, store, rows)
    user, every = world.bundle.users["user_id"][0], np.arange(world.bundle.schema.rows)
    before = by_mirror.rank(user, None, 20).items
    with contextlib.closing(settings.open_log()) as log:
        log.append(settings.topics.events, [(None, message) for message in world.messages(200)])
        options = TrainerOptions(batch=64, lateness_s=1e9)
        with StreamService(
            world.bundle, StreamConnections.shared(log, store, topics=settings.topics), options
        ) as stream:
            stream.drain()
    _until(lambda: np.array_equal(rows.mirror.seqs(), store.read_seqs(world.bundle.id, every)))
    np.testing.assert_array_equal(rows.mirror.read_rows(every), store.read_rows(world.bundle.id, every))
    assert by_mirror.rank(user, None, 20).items == by_store.rank(user, None, 20).items != before


def test_a_mirror_that_lags_says_so_and_the_store_answers(
    world: World, mirror_of: tuple[MemoryStore, MirrorRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = mirror_of
    service = RankService(world.bundle, store, rows)
    with TestClient(create_app(Router(service))) as client:
        assert client.get("/readyz").json()["mirror"]["reads_from"] == "mirror"
        monkeypatch.setattr(rows.mirror, "lag_s", lambda: 60.0)
        found = client.get("/readyz")
        assert (found.status_code, found.json()["mirror"]) == (200, {"lag_s": 60.0, "reads_from": "store"})
    one = np.array([3])
    store.write_rows(world.bundle.id, one, np.array([9]), np.ones((1, world.bundle.schema.dim), dtype=np.float32))
    assert (rows.read_rows(one) == 1).all()
    assert (StoreRows(store, world.bundle.id).read_rows(one) == 1).all()
    assert not (rows.mirror.read_rows(one) == 1).all()


def test_with_a_mirror_rankings_go_on_while_the_store_is_away_and_say_that_they_are_stale(
    world: World, mirror_of: tuple[MemoryStore, MirrorRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = mirror_of
    service = RankService(world.bundle, store, rows)
    user, items = world.bundle.history["user_id"][0], world.bundle.items["item_id"].to_list()[:20]
    body = {"user": user, "candidates": [*items, "unknown"]}

    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the store does not answer")

    with TestClient(create_app(Router(service))) as client:
        before = client.post("/v1/rank", json=body).json()
        with monkeypatch.context() as away:
            for name in ("read_records", "read_rows", "changes", "scan_records", "table"):
                away.setattr(store, name, refuse)
            during = client.post("/v1/rank", json=body).json()
            assert client.get("/readyz").status_code == 200
            # A user that was not seen yet is known from what was published.
            assert service.rank(world.bundle.history["user_id"][-1], items, 3).known_user
            # The mirror lags too, since nobody follows the log: old rows are better than none.
            away.setattr(rows.mirror, "lag_s", lambda: 60.0)
            assert client.post("/v1/rank", json=body).json()["items"] == before["items"]
        assert (before["stale"], during["stale"]) == (False, True)
        assert during["items"] == before["items"]
        time.sleep(0.6)
        assert not client.post("/v1/rank", json=body).json()["stale"]
        assert "tessera_stale_answers_total 2.0" in client.get("/metrics").text


def test_a_mirror_outlasts_an_error_and_goes_on_from_the_same_delta(
    world: World, settings: Settings, mirror_of: tuple[MemoryStore, MirrorRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rows = mirror_of
    fold, calls = rows.mirror.fold, list[int]()

    def faulty(change: delta.Delta) -> int:
        calls.append(change.seq)
        if len(calls) == 1:
            raise ValueError("operands could not be broadcast together")
        return fold(change)

    monkeypatch.setattr(rows.mirror, "fold", faulty)
    size = (1, world.bundle.schema.dim)
    for seq in (5, 6):
        change = delta.changed_rows(
            world.bundle.id, seq, np.array([0]), torch.full(size, seq), torch.ones(1), records=[]
        )
        with contextlib.closing(settings.open_log()) as log:
            log.append(settings.topics.deltas, [(None, delta.encode(next(change)))])
    _until(lambda: rows.mirror.seqs()[0] == 6)
    assert calls == [5, 5, 6]
