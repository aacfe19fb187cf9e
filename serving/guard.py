"""What stands before every route: request ids, API keys, limits of rate, size and number, and the drain at the end.

An ASGI middleware. A request is turned away before its body is parsed: 401 or 403 without a key that may, 408 and 413
for a body too slow or too large, 429 above a key's rate, and 503 with Retry-After where more are being answered than
the server is good for. Nothing queues: what cannot be answered soon is refused at once.
"""

import asyncio
import base64
import binascii
import math
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from features import trace
from serving.access import Key, KeyFile, Scope
from serving.metrics import Metrics, Stopwatch, log_request

PROBLEM = "application/problem+json"
OPEN = frozenset({"/healthz", "/readyz"})
# Asked every few seconds; their traces would only hide the others.
_UNTRACED = OPEN | {"/metrics"}
_WRITES = frozenset({"/v1/events", "/v1/items", "/v1/outcomes"})
_ADMIN, _CONSOLE = "/v1/admin/", "/console/"
_MOST_KEYS = 10_000

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope_, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body_bytes: of one request.
        body_s: until all of it has come.
        in_flight: requests answered at a time.
        per_second: requests of one key, on average; 0 is without a limit.
        burst_s: how many seconds' worth may come at once.
    """

    body_bytes: int = 1 << 20
    body_s: float = 10.0
    in_flight: int = 64
    per_second: float = 0.0
    burst_s: float = 2.0


class Guard:
    """Wraps an app.

    Args:
        app: gets what is let through.
        metrics: counts.
        limits: see `Limits`.
        keys: None lets everybody in.
    """

    def __init__(self, app: App, *, metrics: Metrics, limits: Limits, keys: KeyFile | None, state: "State") -> None:
        self._app = app
        self._metrics = metrics
        self._limits = limits
        self._keys = keys
        self._state = state
        self._buckets = _Buckets(limits)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        with trace.OFF if scope["path"] in _UNTRACED else trace.request(scope["method"], headers) as span:
            await self._answer(scope, receive, send, headers, span)

    async def _answer(
        self, scope: Scope_, receive: Receive, send: Send, headers: dict[bytes, bytes], span: trace.Span
    ) -> None:
        watch = Stopwatch()
        request_id = _request_id(headers.get(b"x-request-id"))
        answer = {"status": 500}

        async def send_marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
                own = ((b"x-request-id", request_id.encode()), *span.headers)
                message["headers"] = [*message.get("headers", ()), *own]
            await send(message)

        key: Key | None = None
        route = "other"
        try:
            refusal, key = self._admit(scope, headers)
            if refusal is not None:
                await refusal.send(send_marked)
                return
            if scope["path"] in OPEN:
                await self._app(scope, receive, send_marked)
                return
            body = await self._body(receive, headers)
            if isinstance(body, _Refusal):
                self._metrics.refused.labels(body.why).inc()
                await body.send(send_marked)
                return
            if self._state.in_flight >= self._limits.in_flight:
                refusal = _Refusal(503, "overloaded", "more requests than the server is good for", retry_s=1)
                self._metrics.refused.labels(refusal.why).inc()
                await refusal.send(send_marked)
                return
            self._state.in_flight += 1
            self._metrics.in_flight.set(self._state.in_flight)
            try:
                await self._app(scope, _replayed(body, receive), send_marked)
            finally:
                self._state.in_flight -= 1
                self._metrics.in_flight.set(self._state.in_flight)
        finally:
            found = getattr(scope.get("route"), "path", None)
            route = found or "other"
            bundle = scope.get("state", {}).get("bundle")
            seconds = watch.seconds()
            span.answered(found, answer["status"])
            if bundle is not None:
                span.note(bundle=bundle)
            self._metrics.requests.labels(route, answer["status"]).inc()
            self._metrics.latency.labels(route).observe(seconds)
            log_request(
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=answer["status"],
                ms=round(1_000 * seconds, 3),
                key=key.name if key else None,
                bundle=bundle,
                trace=span.trace_id,
            )

    def _admit(self, scope: Scope_, headers: dict[bytes, bytes]) -> "tuple[_Refusal | None, Key | None]":
        path = scope["path"]
        if path in OPEN:
            return None, None
        key = None
        if self._keys is not None:
            secret = secret_of(headers)
            key = self._keys.find(secret) if secret else None
            needed = scope_of(path, scope["method"])
            if key is None:
                self._metrics.refused.labels("no key").inc()
                detail = "this API key is not known" if secret else "an API key is needed: Authorization: Bearer KEY"
                return _Refusal(401, "no key", detail, challenge=True), None
            if not key.may(needed):
                self._metrics.refused.labels("scope").inc()
                return _Refusal(403, "scope", f"the key {key.name!r} has no scope {needed!r}"), key
        wait_s = self._buckets.take(key.name if key else _address(scope))
        if wait_s > 0:
            self._metrics.refused.labels("rate").inc()
            limit = f"at most {self._limits.per_second:g} requests a second are taken of one caller"
            return _Refusal(429, "rate", limit, retry_s=math.ceil(wait_s)), key
        return None, key

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> "bytes | _Refusal":
        most = self._limits.body_bytes
        too_large = _Refusal(413, "size", f"a body of at most {most:,} bytes is taken; send less at a time")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            return too_large
        parts: list[bytes] = []
        size = 0
        deadline = time.monotonic() + self._limits.body_s
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                return _Refusal(408, "slow", f"the body did not come within {self._limits.body_s:g} s")
            if message["type"] == "http.disconnect":
                return _Refusal(400, "gone", "the caller went away")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                return too_large
            if not message.get("more_body", False):
                return b"".join(parts)


class State:
    """Whether a server takes new work, which `/readyz` says, and how much it has in hand."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0


@dataclass(frozen=True)
class _Refusal:
    """An answer that no route made."""

    status: int
    why: str
    detail: str
    retry_s: int = 0
    challenge: bool = False

    async def send(self, send: Send) -> None:
        title = {401: "Unauthorized", 403: "Forbidden", 408: "Too slow", 413: "Too large", 429: "Too many requests"}
        body = {
            "type": "about:blank",
            "title": title.get(self.status, "Refused" if self.status < 500 else "Overloaded"),
            "status": self.status,
            "detail": self.detail,
        }
        data = msgspec.json.encode(body)
        headers = [(b"content-type", PROBLEM.encode()), (b"content-length", str(len(data)).encode())]
        if self.retry_s:
            headers.append((b"retry-after", str(self.retry_s).encode()))
        if self.challenge:
            # Basic too: a browser then asks for the key, and can show /docs.
            headers += [(b"www-authenticate", b"Bearer"), (b"www-authenticate", b'Basic realm="tessera"')]
        if self.status in (408, 413):
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": data})


class _Buckets:
    """A bucket of tokens for each caller, filled at the rate and no deeper than the burst."""

    def __init__(self, limits: Limits) -> None:
        self._rate = limits.per_second
        self._depth = max(1.0, limits.per_second * limits.burst_s)
        self._lock = threading.Lock()
        self._held: dict[str, tuple[float, float]] = {}

    def take(self, caller: str) -> float:
        """Takes a token; returns how many seconds to wait where there is none, else 0."""
        if not self._rate:
            return 0.0
        now = time.monotonic()
        with self._lock:
            tokens, then = self._held.pop(caller, (self._depth, now))
            tokens = min(self._depth, tokens + (now - then) * self._rate)
            enough = tokens >= 1
            if len(self._held) >= _MOST_KEYS:
                self._held.pop(next(iter(self._held)))
            self._held[caller] = (tokens - 1 if enough else tokens, now)
            return 0.0 if enough else (1 - tokens) / self._rate


def scope_of(path: str, method: str) -> Scope:
    """What a key must be allowed to do for a request."""
    if path.startswith(_ADMIN):
        return "admin"
    return "write" if method == "POST" and (path in _WRITES or path.startswith(_CONSOLE)) else "read"


def secret_of(headers: dict[bytes, bytes]) -> str:
    """The key that a caller shows: as a bearer token, as x-api-key, or as the password of Basic."""
    if b"x-api-key" in headers:
        return headers[b"x-api-key"].decode("latin-1").strip()
    kind, _, value = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() == b"bearer":
        return value.decode("latin-1").strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _request_id(given: bytes | None) -> str:
    """The caller's own id where it is a plain word, else a new one."""
    word = (given or b"").decode("latin-1")
    plain = 0 < len(word) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_.") for c in word)
    return word if plain else uuid.uuid4().hex


def _address(scope: Scope_) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already, then whatever comes."""
    given = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
