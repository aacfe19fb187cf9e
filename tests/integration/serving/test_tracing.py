"""Traces of real requests and micro-batches: which spans there are, what they say, and how they hang together."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace as api
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from features import tracing as trace
from features.errors import StoreError
from models.bundle import delta
from serving.api.app import AppParts, create_app
from serving.api.keys import KeyFile
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.writer import StoreWriter
from serving.traffic.router import Router
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.trainer import Trainer, TrainerOptions
from tessera.settings import Settings
from tessera.trace_export import recording
from tests.integration.world import World


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    with recording([SimpleSpanProcessor(exporter)], "test"):
        yield exporter


def named(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = (span for span in exporter.get_finished_spans() if span.name == name)
    return found


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def parent(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


# Requests.


def test_a_rank_request_is_a_trace_of_history_lookup_and_network(
    client: TestClient, world: World, spans: InMemorySpanExporter
) -> None:
    items = world.bundle.items["item_id"].to_list()[:20]
    answer = client.post("/v1/rank", json={"user": world.bundle.history["user_id"][0], "candidates": items, "k": 3})
    assert answer.status_code == 200
    request = named(spans, "POST /v1/rank")
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/v1/rank",
        "http.response.status_code": 200,
        "tessera.bundle": world.bundle.id,
        "tessera.candidates": 20,
        "tessera.retrieved": False,
    }
    lookup, network = named(spans, "lookup"), named(spans, "network")
    assert attributes(lookup).keys() == {"tessera.rows", "tessera.source"}
    assert attributes(lookup)["tessera.rows"] > 20
    assert attributes(lookup)["tessera.source"] == "store"
    assert attributes(network) == {"tessera.candidates": 20}
    # Handlers run in threads of a pool: the request must be current there too.
    for span in (named(spans, "history"), lookup, network):
        assert parent(span) == request.context.span_id
        assert span.context.trace_id == request.context.trace_id
        assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    assert lookup.end_time <= network.start_time
    assert len(spans.get_finished_spans()) == 4
    assert answer.headers["traceparent"][3:52] == f"{request.context.trace_id:032x}-{request.context.span_id:016x}"


def test_requests_at_the_same_time_do_not_mix_their_spans(
    client: TestClient, world: World, spans: InMemorySpanExporter
) -> None:
    items = world.bundle.items["item_id"].to_list()

    def ask(count: int) -> None:
        assert client.post("/v1/rank", json={"user": "1", "candidates": items[:count]}).status_code == 200

    threads = [threading.Thread(target=ask, args=(count,)) for count in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = spans.get_finished_spans()
    requests = {span.context.span_id: attributes(span) for span in found if span.name == "POST /v1/rank"}
    networks = [span for span in found if span.name == "network"]
    assert len(requests) == len(networks) == 12
    for span in networks:
        assert requests[parent(span)]["tessera.candidates"] == attributes(span)["tessera.candidates"]


def test_a_callers_trace_is_continued(client: TestClient, spans: InMemorySpanExporter) -> None:
    caller = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
    answer = client.post("/v1/rank", json={"user": "1"}, headers=caller)
    assert answer.headers["traceparent"].startswith("00-0af7651916cd43dd8448eb211c80319c-")
    assert f"{parent(named(spans, 'POST /v1/rank')):x}" == "b7ad6b7169203331"
    assert {f"{span.context.trace_id:032x}" for span in spans.get_finished_spans()} == {caller["traceparent"][3:35]}
    assert attributes(named(spans, "retrieve"))["tessera.plan"]


def test_no_span_says_who_asked_or_for_what(client: TestClient, world: World, spans: InMemorySpanExporter) -> None:
    item = world.bundle.items["item_id"][0]
    secret = "somebody-we-know"
    client.post("/v1/rank", json={"user": secret, "candidates": [item, f"{secret}-item"], "explain": True})
    client.post("/v1/rank", json={"user": secret, "context": {secret: 1}})
    client.post("/v1/retrieve", json={"user": secret, "k": 3})
    client.post("/v1/retrieve", json={"item": f"{secret}-item", "k": 3})
    client.get(f"/v1/items/{secret}")
    client.get(f"/{secret}", headers={"x-request-id": secret})
    found = spans.get_finished_spans()
    assert {"GET /v1/items/{item_id:path}", "GET", "explain"} <= {span.name for span in found}
    assert not [span.to_json() for span in found if secret in span.to_json()]


def test_embeddings_read_rows_in_a_lookup_and_a_mirror_says_so(world: World, spans: InMemorySpanExporter) -> None:
    store = MemoryStore()
    fill_store(store, world.bundle)
    rows = MirrorRows(
        Mirror(store, world.bundle.id, world.bundle.schema.aggregates),
        StoreRows(store, world.bundle.id),
        most_lag_s=1e9,
    )
    with TestClient(create_app(Router(RankService(world.bundle, store, rows)))) as client:
        values = world.bundle.items["item_id"].to_list()[:2]
        assert client.post("/v1/embeddings", json={"feature": "item_id", "values": values}).status_code == 200
    lookup = named(spans, "lookup")
    assert attributes(lookup)["tessera.source"] == "mirror"
    assert parent(lookup) == named(spans, "POST /v1/embeddings").context.span_id


def test_probes_leave_no_trace_and_refusals_and_failures_do(
    world: World, tmp_path: Path, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    fill_store(store, world.bundle)
    keys = KeyFile(tmp_path / "keys.json")
    key = {"x-api-key": keys.add("somebody", ["read"])}

    def refuse(*_: object) -> None:
        raise StoreError("the store does not answer")

    app = create_app(Router(RankService(world.bundle, store)), AppParts(keys=keys))
    with TestClient(app, raise_server_exceptions=False) as client:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path, headers=key).status_code == 200
        assert spans.get_finished_spans() == ()
        assert client.post("/v1/rank", json={"user": "1"}).status_code == 401
        refused = named(spans, "POST")
        assert attributes(refused)["http.response.status_code"] == 401
        assert refused.status.status_code.name == "UNSET"
        monkeypatch.setattr(store, "read_rows", refuse)
        assert client.post("/v1/rank", json={"user": "1"}, headers=key).status_code == 503
    assert named(spans, "POST /v1/rank").status.status_code.name == "ERROR"
    assert attributes(named(spans, "lookup"))["error.type"] == "StoreError"


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
def test_tracing_is_no_other_librarys(
    client: TestClient, world: World, tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    registry = Settings(home=tmp_path).open_registry()
    registry.publish(world.bundle, params={}, metrics={})
    assert client.get("/v1/version").status_code == 200
    assert [span.name for span in spans.get_finished_spans()] == ["GET /v1/version"]
    assert isinstance(api.get_tracer_provider(), api.ProxyTracerProvider)


# Micro-batches.


def test_an_event_a_delta_and_the_store_are_one_trace_across_processes(world: World, tmp_path: Path) -> None:
    topics, store = Topics("t-"), MemoryStore()
    fill_store(store, world.bundle)
    trained, stored = InMemorySpanExporter(), InMemorySpanExporter()
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        options = TrainerOptions(batch=40, lateness_s=1e9, most_bad=1.0)
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=options)) as trainer:
            log.append(topics.events, [(None, message) for message in [*world.messages(99), b"oops"]])
            with recording([SimpleSpanProcessor(trained)], "trainer"):
                while trainer.run_once(wait_s=0.1):
                    pass
        with contextlib.closing(StoreWriter(log, world.bundle.id, store, topics=topics)) as writer:
            with recording([SimpleSpanProcessor(stored)], "writer"):
                while writer.run_once():
                    pass
    batches = [span for span in trained.get_finished_spans() if span.name == "batch"]
    stores = stored.get_finished_spans()
    assert [attributes(span)["tessera.inputs"] for span in batches] == [
        ("t-events-0 0..39",),
        ("t-events-0 40..79",),
        ("t-events-0 80..99",),
    ]
    assert [(attributes(s)["tessera.messages"], attributes(s)["tessera.bad"]) for s in batches] == [
        (40, 0),
        (40, 0),
        (20, 1),
    ]
    for batch, store_span in zip(batches, stores, strict=True):
        assert store_span.name == "store"
        assert store_span.context.trace_id == batch.context.trace_id
        assert parent(store_span) == batch.context.span_id
        assert attributes(store_span)["tessera.seq"] == attributes(batch)["tessera.seq"]
        assert attributes(store_span)["tessera.rows"] > 0
        inside = [span.name for span in trained.get_finished_spans() if span.parent == batch.context]
        assert inside == ["step", "commit"]
    assert len({batch.context.trace_id for batch in batches}) == 3


def test_traces_change_no_byte_of_the_deltas(world: World, tmp_path: Path, spans: InMemorySpanExporter) -> None:
    topics, written = Topics(), []
    for name in ("on", "off"):
        if name == "off":
            trace.turn_off()
        with contextlib.closing(LocalLog(tmp_path / f"{name}.db")) as log:
            options = TrainerOptions(batch=40, lateness_s=1e9)
            with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=options)) as trainer:
                log.append(topics.events, [(None, message) for message in world.messages(80)])
                while trainer.run_once(wait_s=0.1):
                    pass
            with contextlib.closing(log.follow(topics.deltas, ())) as follower:
                written.append([_untimed(message.value) for message in follower.poll(100, 0.1)])
    assert [span.name for span in spans.get_finished_spans()] == ["step", "commit", "batch"] * 2
    assert len(written[0]) == 2
    assert written[0] == written[1]


def _untimed(value: bytes) -> object:
    found = delta.decode(value)
    return [getattr(found, name) for name in found.__struct_fields__ if name != "times_ms"]


def test_a_store_that_fails_is_a_failed_span_and_the_next_try_another(
    world: World, tmp_path: Path, spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("the store does not answer")

    topics, store = Topics(), MemoryStore()
    fill_store(store, world.bundle)
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        options = TrainerOptions(batch=40, lateness_s=1e9)
        with contextlib.closing(Trainer(log, world.bundle, topics=topics, options=options)) as trainer:
            log.append(topics.events, [(None, message) for message in world.messages(40)])
            trainer.run_once()
        with contextlib.closing(StoreWriter(log, world.bundle.id, store, topics=topics)) as writer:
            with monkeypatch.context() as patched:
                patched.setattr(store, "write_rows", refuse)
                with pytest.raises(StoreError):
                    writer.run_once()
            writer.run_once()
    failed, done = (span for span in spans.get_finished_spans() if span.name == "store")
    assert attributes(failed)["error.type"] == "StoreError"
    assert "error.type" not in attributes(done)
    assert failed.context.trace_id == done.context.trace_id
