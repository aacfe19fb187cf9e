"""Traces go to a collector over HTTP, into a file, to the server that a client calls, or nowhere."""

import asyncio
import contextlib
import gzip
import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from features import tracing as trace
from features.errors import TesseraError
from serving.client import AsyncClient, Client
from tessera.cli.serve import serve
from tessera.cli.stream import stream
from tessera.settings import Settings
from tessera.trace_export import recording
from tests.integration.world import World
from tests.servers import free_port, until


class Collector:
    """An HTTP server that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        kept = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                kept.append((self.path, self._headers(), gzip.decompress(body) if packed else body))
                self.send_response(200)
                self.end_headers()

            def do_GET(self) -> None:
                kept.append((self.path, self._headers(), b""))
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"bundle": "b", "model": "m", "encoder": null, "codebook": null}')

            def _headers(self) -> dict[str, str]:
                return {name.lower(): value for name, value in self.headers.items()}

            def log_message(self, *_: object) -> None:
                """Tests print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    with contextlib.closing(Collector()) as found:
        yield found


def test_the_client_tells_the_server_the_span_that_is_current(collector: Collector) -> None:
    async def ask() -> None:
        async with AsyncClient(collector.url) as tessera:
            await tessera.version()

    exporter = InMemorySpanExporter()
    with recording([SimpleSpanProcessor(exporter)], "test"), Client(collector.url) as tessera:
        tessera.version()
        with trace.request("GET", {b"traceparent": b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"}):
            tessera.version()
            asyncio.run(ask())
    (span,) = exporter.get_finished_spans()
    told = [headers.get("traceparent") for _, headers, _ in collector.requests]
    assert told[0] is None
    assert told[1] == told[2]
    assert str(told[1])[:53] == f"00-{'1' * 32}-{span.context.span_id:016x}-"


def test_a_collector_gets_the_spans_over_http_as_protobuf(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20x")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging")
    settings = Settings.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": f"{collector.url}/"})
    with settings.traced("tessera-serve"), trace.request("GET", {}) as request:
        request.answered("/v1/version", 200)
    ((path, headers, body),) = collector.requests
    found = ExportTraceServiceRequest.FromString(body).resource_spans[0]
    span = found.scope_spans[0].spans[0]
    resource = {one.key: one.value.string_value for one in found.resource.attributes}
    assert (path, headers["authorization"], headers["content-type"]) == (
        "/v1/traces",
        "Bearer x",
        "application/x-protobuf",
    )
    assert (span.name, span.trace_id.hex()) == ("GET /v1/version", request.trace_id)
    assert resource["service.name"] == "tessera-serve"
    assert resource["deployment.environment.name"] == "staging"
    assert not trace.is_on()


def test_a_collector_that_is_away_does_not_hold_up_the_end() -> None:
    with Settings(home=Path(), otlp=f"http://127.0.0.1:{free_port()}/v1/traces").traced("test"):
        with trace.request("GET", {}):
            pass
        ending = time.monotonic()
    assert time.monotonic() - ending < 5


def test_a_file_gets_a_line_a_span_behind_what_it_holds(tmp_path: Path) -> None:
    file = tmp_path / "traces.jsonl"
    for _ in range(2):
        with Settings.from_environment({"TESSERA_TRACES": str(file)}).traced("tessera-stream"):
            with trace.batch("b", "deltas", 1), trace.span("step"):
                pass
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["step", "batch"] * 2
    assert lines[0]["parent_id"] == lines[1]["span_id"]
    assert lines[0]["trace_id"] == lines[1]["trace_id"]
    assert 0 <= lines[0]["ms"] <= lines[1]["ms"] < 1_000
    assert abs(datetime.fromisoformat(lines[1]["time"]).timestamp() - time.time()) < 60
    assert (lines[1]["parent_id"], lines[1]["error"], lines[1]["service"]) == (None, False, "tessera-stream")
    assert lines[1]["attributes"] == {"tessera.bundle": "b", "tessera.seq": 1}


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
def test_the_commands_write_traces_where_the_setting_says(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, file, stop = Settings(home=tmp_path), tmp_path / "traces.jsonl", threading.Event()
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        log.append(settings.topics.events, [(None, message) for message in world.messages(30)])
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path))
    monkeypatch.setenv("TESSERA_TRACES", str(file))
    # The handlers of signals and of logs are the process's, and this one is the tests'.
    monkeypatch.setattr("tessera.stream_service.until_stopped", lambda: stop)
    monkeypatch.setattr("tessera.cli.serve.log_lines", lambda **_: None)
    url = f"http://127.0.0.1:{(port := free_port())}"

    def ask() -> None:
        try:
            until(lambda: stop.is_set() or _answers(f"{url}/readyz"), 60)
            assert httpx.post(f"{url}/v1/rank", json={"user": "1"}).status_code == 200
        finally:
            stop.set()

    stream(bundle=world.bundle.directory, once=True, lateness_s=1e9)
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        serve(bundle=world.bundle.directory, port=port, drain_s=0)
    finally:
        stop.set()
        asking.join()
    traces: dict[str, set[tuple[str, str]]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        traces.setdefault(line["trace_id"], set()).add((line["service"], line["name"]))
    assert list(traces.values()) == [
        {("tessera-stream", name) for name in ("batch", "step", "commit", "store")},
        {("tessera-serve", name) for name in ("POST /v1/rank", "history", "retrieve", "lookup", "network")},
    ]


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code == 200
    return False


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("", "", None)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ("http://c:4318/v1/traces", "", None)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/x"}, ("http://c:4318/x", "", None)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318", "OTEL_TRACES_EXPORTER": "none"}, ("", "", None)),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ("http://c:4317/v1/traces", "grpc", None),
        ),
        ({"TESSERA_TRACES": "t.jsonl", "OTEL_TRACES_EXPORTER": "none"}, ("", "", Path("t.jsonl"))),
        ({"TESSERA_TRACES": "t.jsonl", "OTEL_SDK_DISABLED": "true"}, ("", "", None)),
    ],
)
def test_the_environment_says_where_spans_go(environment: dict[str, str], expected: object) -> None:
    found = Settings.from_environment(environment)
    assert (found.otlp, found.otlp_protocol, found.trace_file) == expected


def test_what_cannot_be_set_up_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, otlp="http://127.0.0.1:4317/v1/traces", otlp_protocol="grpc")
    with pytest.raises(TesseraError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc"), settings.traced("test"):
        pass
    with pytest.raises(TesseraError, match=r"TESSERA_TRACES=.*nowhere"):
        with Settings(home=tmp_path, trace_file=tmp_path / "nowhere" / "t.jsonl").traced("test"):
            pass
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(TesseraError, match=r"install it, or tessera\[traces\]"):
        with Settings(home=tmp_path, otlp="http://127.0.0.1:4318/v1/traces").traced("test"):
            pass
    assert not trace.is_on()
