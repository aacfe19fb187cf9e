"""Exports finished spans: to a collector over OTLP, into a file as JSON lines, or both.

The only module that imports OpenTelemetry's SDK, and it is imported only when traces are asked for. The provider is
one of our own and never the process's global one, which MLflow and FastAPI would use too. Sampling, batching, and what
the resource says are set by the SDK's own variables, `OTEL_TRACES_SAMPLER` and the like.
"""

import contextlib
import random
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import StatusCode, format_span_id, format_trace_id

from features import tracing as trace
from features.errors import TesseraError

_PROTOCOL = "http/protobuf"
# A collector that is away must not hold up the end of a server.
_LAST_S = 3.0


@contextlib.contextmanager
def traced(service: str, *, endpoint: str = "", protocol: str = "", file: Path | None = None) -> Iterator[None]:
    """Records spans while the body runs, and sends what is left at its end.

    Args:
        service: the resource's `service.name`, unless OTEL_SERVICE_NAME says another.
        endpoint: of an OTLP collector, with its path; empty is none.
        protocol: what OTEL_EXPORTER_OTLP_PROTOCOL asks for.
        file: gets a span a line; what it holds already stays.

    Raises:
        TesseraError: the exporter is not installed, does not speak the protocol, or the file cannot be written.
    """
    exporters: list[SpanExporter] = []
    if endpoint:
        exporters.append(_otlp(endpoint, protocol))
    if file is not None:
        exporters.append(JsonLinesExporter(file))
    with recording([BatchSpanProcessor(exporter) for exporter in exporters], service):
        yield


@contextlib.contextmanager
def recording(processors: Sequence[SpanProcessor], service: str) -> Iterator[None]:
    """Gives spans to these processors while the body runs, and shuts them down after."""
    provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False, id_generator=_Ids())
    for processor in processors:
        provider.add_span_processor(processor)
    trace.turn_on(provider.get_tracer("tessera"))
    try:
        yield
    finally:
        trace.turn_off()
        closing = threading.Thread(target=provider.shutdown, name="last traces", daemon=True)
        closing.start()
        closing.join(_LAST_S)


class JsonLinesExporter(SpanExporter):
    """Appends spans to a file, each a line: service, name, time and milliseconds, ids in hexadecimal, attributes.

    Lines of our own: the SDK's take eight times as long to make, in the process that is measured.

    Args:
        file: made where absent, in a directory that exists.

    Raises:
        TesseraError: it cannot be written.
    """

    def __init__(self, file: Path) -> None:
        try:
            # Unbuffered: a batch of lines is one write, and processes that share the file do not tear each other's.
            self._file = file.open("ab", buffering=0)
        except OSError as error:
            raise TesseraError(f"TESSERA_TRACES={file}: {error.strerror}; name a file that can be written") from error

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes them; raises OSError, which the SDK logs, when the disk does not take them."""
        self._file.write(b"".join(msgspec.json.encode(_line(span)) + b"\n" for span in spans))
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the file."""
        self._file.close()


class _Ids(IdGenerator):
    """Random ids, but for a micro-batch's.

    Of a generator of their own: the process's may be seeded, and two servers must not draw the same ids.
    """

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def generate_trace_id(self) -> int:
        chosen = trace.chosen_ids()
        return chosen[0] if chosen is not None else self._random.getrandbits(128) or 1

    def generate_span_id(self) -> int:
        chosen = trace.chosen_ids()
        return chosen[1] if chosen is not None else self._random.getrandbits(64) or 1

    def is_trace_id_random(self) -> bool:
        # A digest's bits are spread as evenly.
        return True


def _line(span: ReadableSpan) -> dict[str, Any]:
    own, parent, began, ended = span.context, span.parent, span.start_time or 0, span.end_time or 0
    assert own is not None
    return {
        "time": datetime.fromtimestamp(began / 1e9, UTC).isoformat(timespec="microseconds"),
        "service": span.resource.attributes[SERVICE_NAME],
        "name": span.name,
        "ms": (ended - began) / 1e6,
        "trace_id": format_trace_id(own.trace_id),
        "span_id": format_span_id(own.span_id),
        "parent_id": format_span_id(parent.span_id) if parent is not None else None,
        "error": span.status.status_code is StatusCode.ERROR,
        "attributes": dict(span.attributes or {}),
    }


def _otlp(endpoint: str, protocol: str) -> SpanExporter:
    if protocol not in ("", _PROTOCOL):
        raise TesseraError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol}: traces are sent by {_PROTOCOL} alone; set it for "
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, with an endpoint that takes it, or OTEL_TRACES_EXPORTER=none"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TesseraError(
            f"traces are to be sent to {endpoint}, and opentelemetry-exporter-otlp-proto-http is not installed; "
            "install it, or tessera[traces], or set OTEL_TRACES_EXPORTER=none"
        ) from error
    return OTLPSpanExporter(endpoint)


def _resource(service: str) -> Resource:
    """Returns the process's attributes from the environment; the default name is Tessera's."""
    found = Resource.create()
    named = not str(found.attributes[SERVICE_NAME]).startswith("unknown_service")
    return found if named else found.merge(Resource({SERVICE_NAME: service}))
