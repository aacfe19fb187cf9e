"""Spans: nothing while they are off, W3C's headers to and from a caller, and ids that two processes work out alike."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from features import tracing as trace
from tessera.trace_export import recording

CALLER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-%02d"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    with recording([SimpleSpanProcessor(exporter)], "test"):
        yield exporter


def finished(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def in_another_process(batches: range) -> list[ReadableSpan]:
    """Returns the spans of a writer for these batches of `b`, with a tracer of its own."""
    exporter = InMemorySpanExporter()
    with recording([SimpleSpanProcessor(exporter)], "writer"):
        with trace.in_batches("store", "b", "deltas", {seq: {"rows": seq} for seq in batches}):
            pass
    return list(exporter.get_finished_spans())


def test_off_every_span_is_the_one_that_does_nothing() -> None:
    assert not trace.is_on()
    made = [
        trace.span("lookup", rows=3),
        trace.request("GET", {b"traceparent": CALLER % 1}),
        trace.batch("b", "deltas", 1),
        trace.in_batches("store", "b", "deltas", {1: {}}),
    ]
    assert all(span is trace.OFF for span in made)
    trace.note(rows=3)
    with trace.OFF as span:
        span.note(rows=3)
        span.answered("/v1/rank", 200)
    assert (span.trace_id, span.headers) == (None, ())


def test_off_the_sdk_is_not_imported() -> None:
    program = (
        "import sys\nfrom features import tracing as trace\nfrom tessera.settings import Settings\n"
        "with Settings.from_environment({}).traced('x'), trace.request('GET', {}), trace.span('y'): pass\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    root = Path(__file__).parents[3]
    found = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_span_outside_a_request_or_batch_is_not_made(spans: InMemorySpanExporter) -> None:
    with trace.span("lookup", rows=3):
        trace.note(more=1)
    assert spans.get_finished_spans() == ()


def test_a_request_continues_its_callers_trace_and_says_so(spans: InMemorySpanExporter) -> None:
    with trace.request("POST", {b"traceparent": CALLER % 1, b"tracestate": b"vendor=x"}) as request:
        with trace.span("lookup", rows=3):
            pass
        request.answered("/v1/rank", 200)
        ((name, value),) = request.headers
    lookup, root = spans.get_finished_spans()
    assert (root.name, root.kind.name) == ("POST /v1/rank", "SERVER")
    assert root.parent is not None
    assert lookup.parent is not None
    assert root.parent.is_remote
    assert f"{root.parent.span_id:x}" == "b7ad6b7169203331"
    assert request.trace_id == "0af7651916cd43dd8448eb211c80319c" == f"{lookup.context.trace_id:032x}"
    assert lookup.parent.span_id == root.context.span_id
    assert lookup.attributes == {"tessera.rows": 3}
    assert (name, value[:53]) == (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-%016x-" % root.context.span_id)
    assert root.context.trace_state.to_header() == "vendor=x"


def test_what_the_caller_does_not_sample_is_not_recorded_and_keeps_its_trace(spans: InMemorySpanExporter) -> None:
    with trace.request("POST", {b"traceparent": CALLER % 0}) as request:
        assert trace.span("lookup") is trace.OFF
        ((_, value),) = request.headers
    assert request.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert value.endswith(b"-00")
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("header", [b"", b"00-xyz", b"\xff\xfe", CALLER % 1 + b"-more", b"00-" + b"0" * 32 + b"-1-01"])
def test_a_malformed_traceparent_begins_a_new_trace(spans: InMemorySpanExporter, header: bytes) -> None:
    with trace.request("GET", {b"traceparent": header}):
        pass
    (root,) = spans.get_finished_spans()
    assert root.parent is None


def test_a_method_that_http_does_not_know_names_no_span(spans: InMemorySpanExporter) -> None:
    with trace.request("user-42", {}) as request:
        request.answered(None, 405)
    (root,) = spans.get_finished_spans()
    assert (root.name, dict(root.attributes or {})) == (
        "HTTP",
        {"http.request.method": "_OTHER", "http.response.status_code": 405},
    )


def test_an_error_is_noted_by_its_type_and_never_by_its_message(spans: InMemorySpanExporter) -> None:
    with pytest.raises(KeyError), trace.batch("b", "deltas", 1), trace.span("step"):
        raise KeyError("user 42")
    for span in spans.get_finished_spans():
        assert span.status.status_code.name == "ERROR"
        assert (span.attributes or {})["error.type"] == "KeyError"
        assert "user 42" not in span.to_json()


def test_a_writer_in_another_process_finds_the_batchs_trace(spans: InMemorySpanExporter) -> None:
    with trace.request("POST", {}), trace.batch("b", "deltas", 7), trace.span("step"):
        pass
    batch, step = finished(spans)["batch"], finished(spans)["step"]
    six, seven = in_another_process(range(6, 8))
    assert batch.parent is None
    assert seven.parent is not None
    assert step.context.trace_id == seven.context.trace_id == batch.context.trace_id != six.context.trace_id
    assert seven.parent.span_id == batch.context.span_id
    assert len({span.context.span_id for span in (batch, step, six, seven)}) == 4
    assert seven.attributes == {"tessera.bundle": "b", "tessera.seq": 7, "tessera.rows": 7}


def test_a_batchs_ids_follow_from_bundle_topic_and_number() -> None:
    made = []
    for bundle, topic, seq in (("b", "deltas", 1), ("b", "deltas", 1), ("c", "deltas", 1), ("b", "x-deltas", 1)):
        exporter = InMemorySpanExporter()
        with recording([SimpleSpanProcessor(exporter)], "test"), trace.batch(bundle, topic, seq):
            pass
        made.append(exporter.get_finished_spans()[0].context)
    assert len({context.trace_id for context in made}) == 3 == len({context.span_id for context in made})
    assert made[0].trace_id == made[1].trace_id


def test_a_sampler_keeps_the_same_batches_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
    exporter = InMemorySpanExporter()
    with recording([SimpleSpanProcessor(exporter)], "trainer"):
        for seq in range(1, 101):
            with trace.batch("b", "deltas", seq):
                pass
    trained = {span.context.trace_id for span in exporter.get_finished_spans()}
    stored = {span.context.trace_id for span in in_another_process(range(1, 101))}
    assert stored == trained
    assert 25 < len(trained) < 75


def test_two_processes_that_are_seeded_alike_draw_different_ids(spans: InMemorySpanExporter) -> None:
    for _ in range(2):
        random.seed(0)
        with trace.request("GET", {}):
            pass
    one, other = spans.get_finished_spans()
    assert one.context.trace_id != other.context.trace_id
    assert one.context.span_id != other.context.span_id
