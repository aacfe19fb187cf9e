"""Spans for traces: they time the parts of a request or a micro-batch.

This is the only module that imports OpenTelemetry's API, since serving and streaming both ask it for spans. Until
`tessera.trace_export` turns spans on, asking for one costs a call and returns a span that does nothing.

A root span is a request or a micro-batch. Other spans are made only inside a recorded root, so work outside a root,
such as a refresh, leaves no traces. No span holds ids of users or items, nor messages of errors, which may name them.
"""

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Self

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Value = str | int | float | bool | list[str]
Header = tuple[bytes, bytes]
Batches = Mapping[int, Mapping[str, Value]]

_W3C = TraceContextTextMapPropagator()
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
_tracer: Tracer | None = None
_chosen: ContextVar[tuple[int, int] | None] = ContextVar("tessera.trace.chosen", default=None)


class Span:
    """Timer of a with-block. This class does nothing; its instance `OFF` is used when tracing is off."""

    __slots__ = ()

    @property
    def trace_id(self) -> str | None:
        """Id of the trace: 32 hexadecimal digits."""
        return None

    @property
    def headers(self) -> tuple[Header, ...]:
        """Headers that pass this span to the next service: W3C's `traceparent`."""
        return ()

    def note(self, **attributes: Value) -> None:
        """Adds attributes, under `tessera.`."""

    def answered(self, route: str | None, status: int) -> None:
        """Records the answer to a request.

        Args:
            route: Template of the path, not the path, which may hold an id; None if there is no such route.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the span; an error is recorded by its type."""


OFF = Span()


class _Timed(Span):
    """Span that is current in its block; the sampler decides whether it is recorded."""

    __slots__ = ("_method", "_span", "_token")

    def __init__(self, span: trace.Span, method: str = "") -> None:
        self._span = span
        self._method = method
        self._token: Token[Context] | None = None

    @property
    def trace_id(self) -> str | None:
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    @property
    def headers(self) -> tuple[Header, ...]:
        own = self._span.get_span_context()
        value = f"00-{trace.format_trace_id(own.trace_id)}-{trace.format_span_id(own.span_id)}-{own.trace_flags:02x}"
        return ((b"traceparent", value.encode()),)

    def note(self, **attributes: Value) -> None:
        self._span.set_attributes(_named(attributes))

    def answered(self, route: str | None, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if route is not None:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)

    def __enter__(self) -> Self:
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        contexts.detach(self._token)
        _end(self._span, kind)


class _Several(Span):
    """Spans of several traces over one block; none of them is current."""

    __slots__ = ("_spans",)

    def __init__(self, spans: list[trace.Span]) -> None:
        self._spans = spans

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for span in self._spans:
            _end(span, kind)


def turn_on(tracer: Tracer) -> None:
    """Makes spans by this tracer from now on; the tracer's ids must follow `chosen_ids`."""
    global _tracer
    _tracer = tracer


def turn_off() -> None:
    """Stops making spans. Open spans end normally."""
    global _tracer
    _tracer = None


def is_on() -> bool:
    """Returns whether spans are made. Callers ask before they count something for a span."""
    return _tracer is not None


def span(name: str, **attributes: Value) -> Span:
    """Returns a span inside the current one, with attributes under `tessera.`; `OFF` if no span is recorded."""
    if _tracer is None or not trace.get_current_span().is_recording():
        return OFF
    return _Timed(_tracer.start_span(name, attributes=_named(attributes)))


def note(**attributes: Value) -> None:
    """Adds attributes to the current span, if any."""
    if _tracer is not None:
        trace.get_current_span().set_attributes(_named(attributes))


def request(method: str, headers: Mapping[bytes, bytes]) -> Span:
    """Returns the span of an HTTP request, named by `Span.answered`.

    The span continues the caller's trace: the current span of this process, or else `traceparent`.
    """
    if _tracer is None:
        return OFF
    within = None
    if not trace.get_current_span().get_span_context().is_valid:
        names = [name for name in ("traceparent", "tracestate") if name.encode() in headers]
        within = _W3C.extract({name: headers[name.encode()].decode("latin-1") for name in names})
    known = method if method in _METHODS else "HTTP"
    attributes = {"http.request.method": method if method in _METHODS else "_OTHER"}
    return _Timed(_tracer.start_span(known, within, SpanKind.SERVER, attributes), known)


def batch(bundle: str, topic: str, seq: int) -> Span:
    """Returns the root span of a micro-batch; its ids follow from bundle, deltas' topic and sequence number."""
    if _tracer is None:
        return OFF
    found = _Timed(_root(_tracer, bundle, topic, seq))
    found.note(bundle=bundle, seq=seq)
    return found


def in_batches(name: str, bundle: str, topic: str, batches: Batches) -> Span:
    """Returns spans of one piece of work inside several micro-batches, wherever those were made.

    Args:
        batches: Attributes by sequence number.
    """
    if _tracer is None:
        return OFF
    spans = []
    for seq, attributes in batches.items():
        # Each root is made again with the same ids and never ended, so it is not sent twice; the sampler decides as
        # before.
        parent = _root(_tracer, bundle, topic, seq)
        if parent.is_recording():
            named = _named({"bundle": bundle, "seq": seq, **attributes})
            spans.append(_tracer.start_span(name, trace.set_span_in_context(parent, Context()), attributes=named))
    return _Several(spans)


def chosen_ids() -> tuple[int, int] | None:
    """Returns the trace id and span id that the span being started must have; None: any."""
    return _chosen.get()


def _root(tracer: Tracer, bundle: str, topic: str, seq: int) -> trace.Span:
    digest = hashlib.sha256("\0".join((bundle, topic, str(seq))).encode()).digest()
    # An id must not be zero.
    token = _chosen.set((int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1))
    try:
        return tracer.start_span("batch", Context(), SpanKind.CONSUMER)
    finally:
        _chosen.reset(token)


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"tessera.{name}": value for name, value in attributes.items()}


def _end(span: trace.Span, kind: type[BaseException] | None) -> None:
    if kind is not None:
        span.set_attribute("error.type", kind.__qualname__)
        span.set_status(StatusCode.ERROR)
    span.end()
