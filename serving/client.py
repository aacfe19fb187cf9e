"""The Python client of a Tessera server, sync and async, typed; it needs httpx and msgspec alone.

    with Client("http://127.0.0.1:8000", key="tsr_…") as tessera:
        for found in tessera.rank("42", k=5).items:
            print(found.item, found.score)

A read is tried again if it meets 429 or 503 or finds no server, after the time that the server asks for. A write is
tried again only after 429, when the server has not processed it; after other failures it may have been appended. A
refusal by the server is an `ApiError`, and a server that does not answer a `ConnectionError`.
"""

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec

T = TypeVar("T")
_BACKOFF_S, _LONGEST_S = 0.1, 2.0


class ApiError(Exception):
    """Refusal by the server, from its problem document.

    Attributes:
        status: HTTP status.
        title, detail: Fault and remedy.
        field: Field of the request that is at fault, or None.
        request_id: Id of the request in the server's log.
    """

    def __init__(self, status: int, title: str, detail: str, field: str | None, request_id: str) -> None:
        super().__init__(f"{status} {title}: {detail}")
        self.status, self.title, self.detail, self.field, self.request_id = status, title, detail, field, request_id


class RankedItem(msgspec.Struct, frozen=True):
    """Item and its probability of a positive event; with `explain`, each feature's contribution to its log-odds."""

    item: str
    score: float
    reasons: dict[str, float] | None = None


class Ranking(msgspec.Struct, frozen=True):
    """Items, best first, and the bundle that ranked them; see `RankResponse` of the API."""

    bundle: str
    items: list[RankedItem]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool
    stale: bool
    impression: str | None = None


class RetrievedItem(msgspec.Struct, frozen=True):
    """Item and its cosine similarity."""

    item: str
    score: float


class Plan(msgspec.Struct, frozen=True):
    """Search plan of a retrieval, with its reason."""

    method: str
    why: str
    share: float
    matches: int | None = None


class Retrieval(msgspec.Struct, frozen=True):
    """Items, nearest first, and the search plan."""

    bundle: str
    items: list[RetrievedItem]
    plan: Plan


class Embeddings(msgspec.Struct, frozen=True):
    """Vectors in the order of the values, `width` numbers each."""

    bundle: str
    feature: str
    width: int
    vectors: list[list[float]]


class Item(msgspec.Struct, frozen=True):
    """Item as the bundle and the stream know it."""

    bundle: str
    item: str
    encoder: str
    codebook: str
    semantic_id: list[int]
    vector: list[float]
    attributes: dict[str, Any]


class Version(msgspec.Struct, frozen=True):
    """Bundle that answers."""

    bundle: str
    model: str
    encoder: str | None
    codebook: str | None


class _Accepted(msgspec.Struct, frozen=True):
    accepted: int


class _Call(Generic[T]):
    """Request and the type of its answer."""

    def __init__(self, kind: type[T], method: str, path: str, body: dict[str, Any] | None = None) -> None:
        self.kind, self.method, self.path = kind, method, path
        given = {name: value for name, value in (body or {}).items() if value is not None}
        self.content = msgspec.json.encode(given) if body is not None else None
        self.writes = path in ("/v1/events", "/v1/items", "/v1/outcomes")

    def again_s(self, response: httpx.Response) -> float | None:
        """Returns the seconds until another try, or None for no other try."""
        if response.status_code == 429 or (response.status_code == 503 and not self.writes):
            asked = response.headers.get("retry-after", "")
            return min(float(asked) if asked.isdigit() else _BACKOFF_S, _LONGEST_S)
        return None

    def answer(self, response: httpx.Response) -> T:
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


def _rank(
    user: str,
    candidates: Sequence[str] | None,
    k: int,
    context: Mapping[str, Any] | None,
    filter: Mapping[str, Any] | None,
    explain: bool,
) -> _Call[Ranking]:
    body = {"user": user, "candidates": candidates, "k": k, "context": context, "filter": filter, "explain": explain}
    return _Call(Ranking, "POST", "/v1/rank", body)


def _retrieve(
    item: str | None, user: str | None, text: str | None, k: int, filter: Mapping[str, Any] | None
) -> _Call[Retrieval]:
    return _Call(
        Retrieval, "POST", "/v1/retrieve", {"item": item, "user": user, "text": text, "k": k, "filter": filter}
    )


def _embeddings(feature: str, values: Sequence[Any]) -> _Call[Embeddings]:
    return _Call(Embeddings, "POST", "/v1/embeddings", {"feature": feature, "values": list(values)})


def _send(kind: str, rows: Sequence[Mapping[str, Any]]) -> _Call[_Accepted]:
    return _Call(_Accepted, "POST", f"/v1/{kind}", {kind: list(rows)})


def _item(item: str) -> _Call[Item]:
    return _Call(Item, "GET", f"/v1/items/{quote(item, safe='')}")


_VERSION = _Call(Version, "GET", "/v1/version")


def _headers(key: str | None) -> dict[str, str]:
    return {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})


def _traceparent() -> dict[str, str]:
    """Returns the current span as W3C's headers, if the calling program uses OpenTelemetry.

    OpenTelemetry is looked up and not imported, since this module does not need it.
    """
    api = sys.modules.get("opentelemetry.trace")
    span = api.get_current_span().get_span_context() if api is not None else None
    if span is None or not span.is_valid:
        return {}
    state = span.trace_state.to_header()
    found = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    return {"traceparent": found} | ({"tracestate": state} if state else {})


class Client:
    """Client of a server, one request after another; may be shared by threads.

    Args:
        url: Address of the server.
        key: API key.
        timeout_s: Seconds that one try may take.
        retries: Most repetitions of a request.

    Example:
        >>> with Client(url) as client:
        ...     items = [ranked.item for ranked in client.rank("r00001", k=3).items]
        >>> len(items)
        3
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10.0, retries: int = 3) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=timeout_s)
        self._retries = retries

    def rank(
        self,
        user: str,
        candidates: Sequence[str] | None = None,
        *,
        k: int = 10,
        context: Mapping[str, Any] | None = None,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
    ) -> Ranking:
        """Ranks the candidates for a user, or the items that retrieval finds.

        Args:
            user: Id. An unknown user has no history.
            candidates: Item ids, at most 2,000; None lets the server retrieve candidates.
            k: Most items to return.
            context: Values of the events' own columns, null where absent.
            filter: Condition on the items' filterable columns that retrieved candidates must meet.
            explain: Whether to return what each feature adds to an item's log-odds.

        Returns:
            Items with their probabilities, best first, and the bundle that ranked them.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer.

        Example:
            >>> client.rank("r00001", ["a00001", "a00002"], k=1).known_user
            True
        """
        return self._do(_rank(user, candidates, k, context, filter, explain))

    def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
    ) -> Retrieval:
        """Finds the items nearest to an item, to a user's liked items, or to a text.

        Args:
            item, user, text: Exactly one of the three.
            k: Most items to return.
            filter: Condition on the items' filterable columns.

        Returns:
            Items with their cosine similarity, nearest first.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer.

        Example:
            >>> len(client.retrieve(item="a00001", k=4).items)
            4
        """
        return self._do(_retrieve(item, user, text, k, filter))

    def embeddings(self, feature: str, values: Sequence[Any]) -> Embeddings:
        """Looks up values of a feature in the table.

        Args:
            feature: Name of a feature of the bundle.
            values: Values, or lists of values, which are pooled.

        Returns:
            A vector for each value; zeros for an unknown value of an exact feature, or a value seen too rarely.

        Raises:
            ApiError: The server refused the request.
            ConnectionError: The server does not answer.

        Example:
            >>> len(client.embeddings("item_id", ["a00001"]).vectors[0])
            16
        """
        return self._do(_embeddings(feature, values))

    def send_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """Appends events to the log; if any is invalid, none is appended. Returns their number. Raises ApiError."""
        return self._do(_send("events", events)).accepted

    def send_items(self, items: Sequence[Mapping[str, Any]]) -> int:
        """Appends items to the log; if any is invalid, none is appended. Returns their number. Raises ApiError."""
        return self._do(_send("items", items)).accepted

    def send_outcomes(self, outcomes: Sequence[Mapping[str, Any]]) -> int:
        """Appends outcomes of shown items: `impression`, `item`, and `what`. Returns their number. Raises ApiError."""
        return self._do(_send("outcomes", outcomes)).accepted

    def item(self, item: str) -> Item:
        """Returns an item as the server knows it; raises ApiError, with status 404 for an unknown item."""
        return self._do(_item(item))

    def version(self) -> Version:
        """Returns the bundle that answers; raises ApiError."""
        return self._do(_VERSION)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, call: _Call[T]) -> T:
        for tried in range(self._retries + 1):
            try:
                response = self._http.request(call.method, call.path, content=call.content, headers=_traceparent())
            except httpx.TransportError as error:
                if call.writes or tried == self._retries:
                    raise ConnectionError(f"no answer from {self._http.base_url}: {error}") from error
                time.sleep(_BACKOFF_S * 2**tried)
                continue
            wait_s = call.again_s(response)
            if wait_s is None or tried == self._retries:
                break
            time.sleep(wait_s)
        return call.answer(response)


class AsyncClient:
    """Client for asyncio; see `Client`."""

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = 10.0, retries: int = 3) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout_s)
        self._retries = retries

    async def rank(
        self,
        user: str,
        candidates: Sequence[str] | None = None,
        *,
        k: int = 10,
        context: Mapping[str, Any] | None = None,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
    ) -> Ranking:
        """See `Client.rank`."""
        return await self._do(_rank(user, candidates, k, context, filter, explain))

    async def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
    ) -> Retrieval:
        """See `Client.retrieve`."""
        return await self._do(_retrieve(item, user, text, k, filter))

    async def embeddings(self, feature: str, values: Sequence[Any]) -> Embeddings:
        """See `Client.embeddings`."""
        return await self._do(_embeddings(feature, values))

    async def send_events(self, events: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_events`."""
        return (await self._do(_send("events", events))).accepted

    async def send_items(self, items: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_items`."""
        return (await self._do(_send("items", items))).accepted

    async def send_outcomes(self, outcomes: Sequence[Mapping[str, Any]]) -> int:
        """See `Client.send_outcomes`."""
        return (await self._do(_send("outcomes", outcomes))).accepted

    async def item(self, item: str) -> Item:
        """See `Client.item`."""
        return await self._do(_item(item))

    async def version(self) -> Version:
        """See `Client.version`."""
        return await self._do(_VERSION)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _do(self, call: _Call[T]) -> T:
        for tried in range(self._retries + 1):
            try:
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers=_traceparent()
                )
            except httpx.TransportError as error:
                if call.writes or tried == self._retries:
                    raise ConnectionError(f"no answer from {self._http.base_url}: {error}") from error
                await asyncio.sleep(_BACKOFF_S * 2**tried)
                continue
            wait_s = call.again_s(response)
            if wait_s is None or tried == self._retries:
                break
            await asyncio.sleep(wait_s)
        return call.answer(response)
