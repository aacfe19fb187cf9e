"""Ranking over HTTP: answers, problem documents, readiness and metrics."""

import contextlib
import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.errors import StoreError
from features.history import Jagged
from models.bundle.catalogue import Catalogue
from models.bundle.request_aggregates import answer
from models.bundle.request_features import request_events, sent_values
from models.ranker.train import predict
from models.table.batch import Assembler, Examples, aggregate_keys
from serving.api.app import AppParts, create_app
from serving.background import MOST_MISSES
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from tests.integration.world import World
from tests.servers import until


def test_served_scores_are_the_offline_scores(service: RankService, world: World) -> None:
    bundle, items = world.bundle, world.bundle.items["item_id"].to_list()[:50]
    user = bundle.history["user_id"][0]
    catalogue = Catalogue(bundle)
    history = bundle.history.filter(pl.col("user_id") == user)["item_id"].to_list()[-bundle.schema.history_length :]
    liked = np.array([catalogue.item_numbers[name] for name in history], dtype=np.int64)
    same = np.zeros(len(items), dtype=np.int64)
    rows = Examples(
        same + catalogue.user_numbers[user],
        np.array([catalogue.item_numbers[name] for name in items], dtype=np.int64),
        Jagged(liked, np.array([0, len(liked)], dtype=np.int64)).take(same),
        np.zeros(0, dtype=np.float32),
        same,
    )
    keys = aggregate_keys(bundle.schema.aggregates, catalogue.users, catalogue.items, rows)
    rows = replace(rows, aggregates=answer(bundle.aggregates(), keys, len(items), None)[0])
    events = request_events(bundle, catalogue, sent_values(bundle, {}, {}, 1), "", np.zeros(1, dtype=np.int64))
    offline = predict(
        bundle.ranker(), Assembler(bundle.schema, catalogue.users, catalogue.items, events, catalogue.vectors), rows
    )
    served = dict(service.rank(user, items, len(items)).items)
    assert np.allclose([served[name] for name in items], offline, atol=1e-5)


def test_a_request_without_candidates_retrieves_them_by_vector(client: TestClient, world: World) -> None:
    user = world.bundle.history["user_id"][0]
    answer = client.post("/v1/rank", json={"user": user, "k": 5}).json()
    liked = set(world.bundle.history.filter(pl.col("user_id") == user)["item_id"][-20:])
    assert answer["retrieved"]
    assert answer["bundle"] == world.bundle.id
    scores = [item["score"] for item in answer["items"]]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
    assert not liked & {item["item"] for item in answer["items"]}


def test_unknown_user_and_item_are_served_by_defaults_and_counted(client: TestClient, world: World) -> None:
    item = world.bundle.items["item_id"][0]
    response = client.post("/v1/rank", json={"user": 10**18, "candidates": [item, "no-such-item", 7.5 and "x"]})
    assert response.status_code == 200
    assert response.json()["unknown_items"] == ["no-such-item", "x"]
    assert not response.json()["known_user"]
    text = client.get("/metrics").text
    assert "tessera_unknown_items_total 2.0" in text
    assert "tessera_unknown_users_total 1.0" in text


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "user"),
        ({"user": ""}, "user"),
        ({"user": None}, "user"),
        ({"user": [1]}, "user"),
        ({"user": "1", "k": 0}, "k"),
        ({"user": "1", "candidates": []}, "candidates"),
        ({"user": "1", "candidates": ["1", {}]}, "candidates.1"),
        ({"user": "1", "candidates": ["1"] * 2_001}, "candidates"),
        ({"user": "1", "kay": 3}, "kay"),
        ({"user": "1", "context": {"no_such": 1}}, "context"),
        ({"user": "\ud800"}, "user"),
        ({"user": "1", "context": {"no_such": "\ud800"}}, "context.no_such"),
        ({"user": "1", "context": {"no_such": 10**400}}, "context.no_such"),
        ({"user": "1", "candidates": ["\udfff"]}, "candidates.0"),
    ],
)
def test_wrong_input_gets_a_problem_document_that_names_the_field(client: TestClient, body: object, field: str) -> None:
    # As ASCII, so that half a surrogate pair goes out as the escape it is.
    response = client.post("/v1/rank", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["field"] == field


def test_a_body_that_is_not_json_and_a_wrong_path_get_problem_documents(client: TestClient) -> None:
    for response in (client.post("/v1/rank", content=b"{oops"), client.get("/v1/nowhere"), client.get("/v1/rank")):
        assert response.status_code in (404, 405, 422)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code


def test_health_readiness_version_and_docs_answer(client: TestClient, world: World) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json()["bundle"] == world.bundle.id
    version = client.get("/v1/version").json()
    assert (version["bundle"], version["model"]) == (world.bundle.id, world.dataset.name)
    assert (version["encoder"], version["codebook"]) == (world.bundle.encoder.id, world.bundle.codebook.id)
    assert client.get("/docs").status_code == 200
    assert f'tessera_bundle_info{{bundle="{world.bundle.id}"}} 1.0' in client.get("/metrics").text


def test_an_unreachable_store_is_not_ready_and_never_an_internal_error(
    service: RankService, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the store at redis://nowhere does not answer")

    with TestClient(create_app(Router(service)), raise_server_exceptions=False) as client:
        for name in ("ping", "read_records", "read_rows", "changes", "scan_records"):
            monkeypatch.setattr(service._store, name, refuse)
        for response in (client.get("/readyz"), client.post("/v1/rank", json={"user": "1"})):
            assert response.status_code == 503
            assert response.headers["content-type"] == "application/problem+json"
        assert client.get("/healthz").status_code == 200


def test_a_server_outlasts_every_error_behind_requests_and_is_not_ready_while_it_learns_nothing(
    service: RankService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = RankService(service.bundle, service._store)
    refresh, fault = service.refresh, threading.Event()

    def faulty() -> int:
        if fault.is_set():
            raise pl.exceptions.ComputeError("expected a duration, got str")
        return refresh()

    monkeypatch.setattr(service, "refresh", faulty)
    parts = AppParts(refresh_s=0.02)
    with TestClient(create_app(Router(service), parts)) as client:

        def status() -> int:
            return client.get("/readyz").status_code

        fault.set()
        until(lambda: parts.refreshing.error is not None)
        fault.clear()
        until(lambda: parts.refreshing.error is None)
        assert status() == 200
        fault.set()
        until(lambda: status() == 503)
        assert "ComputeError: expected a duration" in client.get("/readyz").json()["detail"]
        assert client.post("/v1/rank", json={"user": "1", "k": 1}).status_code == 200
        failures = re.search(r'tessera_background_failures_total\{part="items"\} (\d+)', client.get("/metrics").text)
        assert failures is not None
        assert int(failures[1]) > MOST_MISSES
        fault.clear()
        until(lambda: status() == 200)
    assert sum("could not be read" in record.message for record in caplog.records) == 2


def test_a_service_refuses_a_store_that_does_not_hold_its_bundle(world: World) -> None:
    with contextlib.closing(MemoryStore()) as store, pytest.raises(StoreError, match=world.bundle.id):
        RankService(world.bundle, store)


def test_loading_a_bundle_twice_changes_nothing(world: World, tmp_path: Path) -> None:
    store = MemoryStore()
    assert fill_store(store, world.bundle)
    rows = np.array([3], dtype=np.int64)
    store.write_rows(world.bundle.id, rows, rows, np.ones((1, world.bundle.schema.dim), dtype=np.float32))
    assert not fill_store(store, world.bundle)
    assert np.array_equal(store.read_rows(world.bundle.id, rows), np.ones((1, world.bundle.schema.dim)))
