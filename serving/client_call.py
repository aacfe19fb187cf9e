"""Calls of the Python client: the request of each route, and the type of its answer."""

import math
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx
import msgspec

T = TypeVar("T")
BACKOFF_S = 0.1
"""First pause before another try, seconds. The pause doubles with each try."""
_LONGEST_S = 2.0


class ApiError(Exception):
    """Refusal by the server, read from the problem document.

    Attributes:
        status: HTTP status.
        title, detail: Fault and remedy.
        field: Field of the request that is at fault, or None.
        request_id: Id of the request in the server's log.
    """

    def __init__(self, status: int, title: str, detail: str, field: str | None, request_id: str) -> None:
        super().__init__(f"{status} {title}: {detail}")
        self.status, self.title, self.detail, self.field, self.request_id = status, title, detail, field, request_id


class ShownBy(TypedDict, total=False):
    """Fields of a request about what is shown. A server refuses others by name.

    Attributes:
        policy: Policy of the dataset that arranges the items. None: their scores do.
        shown_to: Id of the user to whom retrieved items are shown.
    """

    policy: str | None
    shown_to: str | None


class RankedItem(msgspec.Struct, frozen=True):
    """Ranked item.

    Attributes:
        item: Id of the item.
        score: Probability of a positive event; of several tasks, the value of the dataset's formula.
        reasons: Contribution of each feature to the log-odds. None unless the request asked for reasons.
        concepts: Concepts shared most with the items that the user liked, each with `concept`, `share` and `predicted`;
            None unless the request asked for reasons.
        moved: How the policy gave the item its place: `place` by relevance alone, `times` by boosts, `pinned`, `drawn`,
            `propensity` and `similarity`; None without a policy, or unless the request asked for reasons.
        tasks: Probability of each task by its name. None for one label.
        source: Source of a retrieved item, as in `RetrievedItem`; None if the request gave the candidates.
        ranks: Rank of a retrieved item in each source that found it; None unless the request asked for reasons.
    """

    item: str
    score: float
    reasons: dict[str, float] | None = None
    concepts: list[dict[str, Any]] | None = None
    moved: dict[str, Any] | None = None
    tasks: dict[str, float] | None = None
    source: str | None = None
    ranks: dict[str, int] | None = None


class Ranking(msgspec.Struct, frozen=True):
    """Ranked items and the bundle that ranked them; see `RankResponse` of the API.

    Attributes:
        bundle: Id of the bundle.
        items: Ranked items, best first.
        known_user: False if the user is unknown.
        unknown_items: Candidates that are unknown.
        retrieved: True if retrieval chose the candidates.
        stale: True if the store did not answer, so that rows or history may be old.
        impression: Id of the recorded impression, for outcomes. None if none was recorded.
        as_of: Time as of which aggregates were answered, as ISO 8601 text, or a position if the dataset has no clock.
            None without aggregates.
        as_of_source: `request` if the request gave the time, `stream` if the time is that of the newest event.
        policy: Policy that arranged the items; None without one.
        left_out: Candidates that the policy left out, by `consumed` and `cap`; None unless the request asked for
            reasons.
    """

    bundle: str
    items: list[RankedItem]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool
    stale: bool
    impression: str | None = None
    as_of: str | int | None = None
    as_of_source: str | None = None
    policy: str | None = None
    left_out: dict[str, list[str]] | None = None


class RetrievedItem(msgspec.Struct, frozen=True):
    """Retrieved item.

    Attributes:
        item: Id of the item.
        score: Cosine similarity; BM25 of the words alone; the sum of reciprocal ranks of two channels or sources.
        ranks: Rank in each channel or source that found the item, from 1; None if an item asked.
        concepts: Concepts shared most with the query, each with `concept`, `share` and `predicted`; None unless asked.
        moved: How the policy gave the item its place, as in `RankedItem`; None without a policy, or unless asked.
        source: Source that found the item for a user: `towers`, `content`, `both`, or `popular`, which is the
            fallback; None unless a user asked.
    """

    item: str
    score: float
    concepts: list[dict[str, Any]] | None = None
    ranks: dict[str, int] | None = None
    moved: dict[str, Any] | None = None
    source: str | None = None


class Plan(msgspec.Struct, frozen=True):
    """Search plan of a retrieval.

    Attributes:
        method: Name of the search method.
        why: Reason for the method.
        share: Approximate share of items that meet the filter.
        matches: Number of items that meet the filter, if they were counted.
    """

    method: str
    why: str
    share: float
    matches: int | None = None


class Retrieval(msgspec.Struct, frozen=True):
    """Retrieved items and the search plan.

    Attributes:
        bundle: Id of the bundle.
        items: Retrieved items, nearest first.
        plan: Search plan.
        view: View in which the items are nearest.
        aspect: Aspect in which they are nearest, if one was asked for.
        channels: Channels that were searched; None unless a text asked.
        space: Id of the space whose vectors were compared; None if none were.
        policy: Policy that arranged the items; None without one.
        sources: Sources that ranked items, fused if there are two; None unless a user asked.
    """

    bundle: str
    items: list[RetrievedItem]
    plan: Plan
    view: str = "base"
    aspect: str | None = None
    channels: list[str] | None = None
    space: str | None = None
    policy: str | None = None
    sources: list[str] | None = None


class Embeddings(msgspec.Struct, frozen=True):
    """Embeddings of values.

    Attributes:
        bundle: Id of the bundle.
        feature: Name of the feature.
        width: Numbers in a vector.
        vectors: Vectors in the order of the values.
    """

    bundle: str
    feature: str
    width: int
    vectors: list[list[float]]


class Item(msgspec.Struct, frozen=True):
    """Item as the bundle and the stream know it.

    Attributes:
        bundle: Id of the bundle.
        item: Id of the item.
        encoder: Id of the encoder of the vector, or "".
        codebook: Id of the codebook of the Semantic ID, or "".
        semantic_id: Codes, empty without content.
        vector: Content vector, empty without content.
        attributes: Values of the item's columns, by column.
    """

    bundle: str
    item: str
    encoder: str
    codebook: str
    semantic_id: list[int]
    vector: list[float]
    attributes: dict[str, Any]


class Version(msgspec.Struct, frozen=True):
    """Bundle that answers.

    Attributes:
        bundle: Id of the bundle.
        model: Name of the model.
        encoder: Id of the encoder, or None.
        codebook: Id of the codebook, or None.
    """

    bundle: str
    model: str
    encoder: str | None
    codebook: str | None


class _Accepted(msgspec.Struct, frozen=True):
    accepted: int


class Call(Generic[T]):
    """Request and the type of its answer.

    Attributes:
        method: HTTP method.
        path: Path of the route.
        content: Body of the request, or None.
        writes: True if the request appends to the log.

    Args:
        kind: Type of the answer.
        method: HTTP method.
        path: Path of the route.
        body: Fields of the body. Fields with None are omitted.
    """

    def __init__(self, kind: type[T], method: str, path: str, body: dict[str, Any] | None = None) -> None:
        self.kind, self.method, self.path = kind, method, path
        fields = {name: value for name, value in (body or {}).items() if value is not None}
        self.content = msgspec.json.encode(fields) if body is not None else None
        self.writes = path in ("/v1/events", "/v1/items", "/v1/outcomes")

    def retry_after_s(self, response: httpx.Response) -> float | None:
        """Returns the pause before another try, seconds, or None for no other try."""
        if response.status_code == 429 or (response.status_code == 503 and not self.writes):
            pause = response.headers.get("retry-after", "")
            return min(float(pause) if pause.isdigit() else BACKOFF_S, _LONGEST_S)
        return None

    def answer(self, response: httpx.Response) -> T:
        """Decodes a response.

        Raises:
            ApiError: The server refused the request.
        """
        if response.is_success:
            return msgspec.json.decode(response.content, type=self.kind)
        try:
            problem = msgspec.json.decode(response.content, type=dict[str, Any])
        except msgspec.DecodeError:
            problem = {}
        raise ApiError(
            response.status_code,
            str(problem.get("title", response.reason_phrase)),
            str(problem.get("detail", response.text[:500])),
            problem.get("field"),
            response.headers.get("x-request-id", ""),
        )


def rank_call(
    user: str,
    candidates: Sequence[str | Mapping[str, Any]] | None,
    k: int,
    context: Mapping[str, Any] | None,
    filter: Mapping[str, Any] | None,
    explain: bool,
    at: datetime | None,
    meaning: Mapping[str, Any] | None,
) -> Call[Ranking]:
    """Returns the call of `Client.rank`.

    Raises:
        ValueError: A value of the context or of a candidate is no finite number, which JSON cannot carry.
    """
    for place, candidate in enumerate(candidates or ()):
        if not isinstance(candidate, str):
            _refuse_not_finite(f"candidates.{place}", candidate)
    _refuse_not_finite("context", context or {})
    body = {"user": user, "candidates": candidates, "k": k, "context": context, "filter": filter, "explain": explain}
    if at is not None:
        body["at"] = at.isoformat()
    return Call(Ranking, "POST", "/v1/rank", body | dict(meaning or {}))


def _refuse_not_finite(where: str, values: Mapping[str, Any]) -> None:
    """Refuses NaN and infinity, which JSON would carry as a missing value."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}.{name}: {value} is no finite number; leave the field out if there is no value")


def retrieve_call(
    item: str | None,
    user: str | None,
    text: str | None,
    k: int,
    filter: Mapping[str, Any] | None,
    view: str | None,
    meaning: Mapping[str, Any] | None,
) -> Call[Retrieval]:
    """Returns the call of `Client.retrieve`."""
    body: dict[str, Any] = {"item": item, "user": user, "text": text, "k": k, "filter": filter} | dict(meaning or {})
    return Call(Retrieval, "POST", "/v1/retrieve", body if view is None else body | {"view": view})


def embeddings_call(feature: str, values: Sequence[Any]) -> Call[Embeddings]:
    """Returns the call of `Client.embeddings`."""
    return Call(Embeddings, "POST", "/v1/embeddings", {"feature": feature, "values": list(values)})


def send_call(kind: str, rows: Sequence[Mapping[str, Any]]) -> Call[_Accepted]:
    """Returns the call that appends rows of a kind: events, items or outcomes."""
    return Call(_Accepted, "POST", f"/v1/{kind}", {kind: list(rows)})


def item_call(item: str) -> Call[Item]:
    """Returns the call of `Client.item`."""
    return Call(Item, "GET", f"/v1/items/{quote(item, safe='')}")


VERSION_CALL = Call(Version, "GET", "/v1/version")


def request_headers(key: str | None) -> dict[str, str]:
    """Returns the headers of every request of a client with an API key."""
    return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})


def trace_headers() -> dict[str, str]:
    """Returns the current span as W3C's headers, if the calling program uses OpenTelemetry.

    OpenTelemetry is not imported here, since a client without tracing does not need the package.
    """
    api = sys.modules.get("opentelemetry.trace")
    span = api.get_current_span().get_span_context() if api is not None else None
    if span is None or not span.is_valid:
        return {}
    state = span.trace_state.to_header()
    parent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    return {"traceparent": parent} | ({"tracestate": state} if state else {})
