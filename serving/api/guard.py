"""The guard in front of every route: request ids, API keys, limits of rate, size and number, and the final drain.

The guard is an ASGI middleware. It refuses a request before its body is parsed: 401 or 403 without a sufficient key,
421 if a server without keys is called by a foreign name, 408 and 413 for a body too slow or too large, 429 above a
key's rate, and 503 with Retry-After if the server is overloaded. Nothing queues: a request that cannot be answered soon
is refused at once, before more of its body is read.
"""

import asyncio
import base64
import binascii
import math
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from features import tracing as trace
from serving.api.hosts import Hosts
from serving.api.keys import Key, KeyFile, Scope
from serving.api.rate import Buckets, Rates
from serving.api.refusal import Refusal, Send
from serving.load_state import State
from serving.metrics import Metrics, Stopwatch, log_request

OPEN = frozenset({"/healthz", "/readyz"})
# Paths requested every few seconds; their traces would only hide the others.
_UNTRACED = OPEN | {"/metrics"}
_WRITES = frozenset({"/v1/events", "/v1/items", "/v1/outcomes"})
_ADMIN, _CONSOLE, _USERS = "/v1/admin/", "/console", "/v1/users/"
_SAFE = frozenset({"GET", "HEAD"})
_OVERLOADED = Refusal(503, "overloaded", "more requests than the server can answer", retry_s=1)
_CROWDED = Refusal(503, "overloaded", "more bodies are being sent than the server can read", retry_s=1, close=True)

Scope_ = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
App = Callable[[Scope_, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: Largest body of one request.
        body_s: Seconds until the whole body must have arrived.
        in_flight: Requests answered at a time; as many more may be sending a body that does not arrive at once.
        per_second: Requests of one key per second, on average; 0 is without a limit.
        burst_s: Seconds' worth of requests that may arrive at once.
    """

    body_bytes: int = 1 << 20
    body_s: float = 10.0
    in_flight: int = 64
    per_second: float = 0.0
    burst_s: float = 2.0


class Guard:
    """Middleware that guards an app.

    Args:
        app: App that gets the admitted requests.
        metrics: Counters.
        limits: Limits of requests.
        keys: API keys; None admits every caller that addresses the server by one of its host names.
        state: Tells if the server drains, and the requests in hand.
        hosts: Host names of the server, which count only without keys; the loopback names by default.
        rates: Rates of the callers, if other processes share them; by default those of `limits`.
    """

    def __init__(
        self,
        app: App,
        *,
        metrics: Metrics,
        limits: Limits,
        keys: KeyFile | None,
        state: State,
        hosts: Hosts | None = None,
        rates: Rates | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._limits = limits
        self._keys = keys
        self._state = state
        self._hosts = hosts or Hosts()
        self._buckets = rates or Buckets(limits.per_second, limits.burst_s)

    async def __call__(self, scope: Scope_, receive: Receive, send: Send) -> None:
        """Handles a request; see ASGI."""
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
                added = ((b"x-request-id", request_id.encode()), *span.headers)
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        key: Key | None = None
        route = "other"
        try:
            refusal, key = self._admit(scope, headers)
            if refusal is not None:
                await refusal.send(send_marked)
                return
            scope.setdefault("state", {})["key"] = key.name if key else ""
            if scope["path"] in OPEN:
                await self._app(scope, receive, send_marked)
                return
            body = await self._body(receive, headers) if self._has_room() else _OVERLOADED
            if not isinstance(body, Refusal) and not self._has_room():
                body = _OVERLOADED
            if isinstance(body, Refusal):
                self._metrics.refused.labels(body.why).inc()
                await body.send(send_marked)
                return
            self._state.in_flight += 1
            self._metrics.in_flight.set(self._state.in_flight)
            try:
                await self._app(scope, _replayed(body, receive), send_marked)
            finally:
                self._state.in_flight -= 1
                self._metrics.in_flight.set(self._state.in_flight)
        finally:
            template = getattr(scope.get("route"), "path", None)
            route = template or "other"
            bundle = scope.get("state", {}).get("bundle")
            seconds = watch.seconds()
            span.answered(template, answer["status"])
            if bundle is not None:
                span.note(bundle=bundle)
            self._metrics.requests.labels(route, answer["status"]).inc()
            self._metrics.latency.labels(route).observe(seconds)
            log_request(
                request_id=request_id,
                method=scope["method"],
                # The path of a user ends with the id, which no log may keep.
                path=_USERS if scope["path"].startswith(_USERS) else scope["path"],
                status=answer["status"],
                ms=round(1_000 * seconds, 3),
                key=key.name if key else None,
                bundle=bundle,
                trace=span.trace_id,
            )

    def _admit(self, scope: Scope_, headers: dict[bytes, bytes]) -> "tuple[Refusal | None, Key | None]":
        path = scope["path"]
        if path in OPEN:
            return None, None
        key = None
        if self._keys is not None:
            secret = secret_of(headers)
            key = self._keys.find(secret) if secret else None
            missing = [
                scope_name
                for scope_name in scopes_of(path, scope["method"])
                if key is not None and not key.may(scope_name)
            ]
            if key is None:
                self._metrics.refused.labels("no key").inc()
                detail = "this API key is not known" if secret else "an API key is needed: Authorization: Bearer KEY"
                return Refusal(401, "no key", detail, challenge=True), None
            if missing:
                self._metrics.refused.labels("scope").inc()
                detail = f"the key {key.name!r} has no scope {missing[0]!r}; give it to another key: `tessera keys add`"
                return Refusal(403, "scope", detail), key
        elif (host := headers.get(b"host", b"").decode("latin-1")) and not self._hosts.know(host):
            # A browser always names a host. A caller without the header is no browser.
            self._metrics.refused.labels("host").inc()
            detail = (
                f"this server has no API keys and does not answer to the host {host!r}; call it by its own name, or "
                "start it with --allow-host NAME, or make a key: `tessera keys add NAME`"
            )
            return Refusal(421, "host", detail), None
        wait_s = self._buckets.take(key.name if key else _address(scope))
        if wait_s > 0:
            self._metrics.refused.labels("rate").inc()
            limit = f"at most {self._limits.per_second:g} requests a second are accepted from one caller"
            return Refusal(429, "rate", limit, retry_s=math.ceil(wait_s)), key
        return None, key

    def _has_room(self) -> bool:
        return self._state.in_flight < self._limits.in_flight

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> "bytes | Refusal":
        """Reads a body, or the part of it that decides a refusal.

        A caller whose body does not arrive at once keeps its parts in memory. Such callers take no place of requests
        that are being answered, and their number is limited to the same count.
        """
        most = self._limits.body_bytes
        too_large = Refusal(413, "size", f"a body of at most {most:,} bytes is accepted; send less at a time")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            return too_large
        parts: list[bytes] = []
        size, receiving = 0, False
        deadline = time.monotonic() + self._limits.body_s
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
                except TimeoutError:
                    return Refusal(408, "slow", f"the body did not come within {self._limits.body_s:g} s")
                if message["type"] == "http.disconnect":
                    return Refusal(400, "gone", "the caller disconnected")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    return too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
                if not receiving:
                    if self._state.receiving >= self._limits.in_flight:
                        return _CROWDED
                    self._state.receiving += 1
                    receiving = True
        finally:
            self._state.receiving -= receiving


def scopes_of(path: str, method: str) -> tuple[Scope, ...]:
    """Returns the scopes that a request needs; a key must have all of them.

    The console shows dead letters, which hold events as they came, so it has a scope of its own. Its forms append to
    the log and need `write` as well. A user is forgotten with a key that has the scope `forget` alone.
    """
    if path.startswith(_ADMIN):
        return ("admin",)
    if path.startswith(_USERS):
        return ("forget",)
    if path == _CONSOLE or path.startswith(_CONSOLE + "/"):
        return ("console",) if method in _SAFE else ("console", "write")
    return ("write",) if method not in _SAFE and path in _WRITES else ("read",)


def secret_of(headers: dict[bytes, bytes]) -> str:
    """Returns the key in a request: from a bearer token, x-api-key, or the password of Basic."""
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


def _request_id(header: bytes | None) -> str:
    """Returns the caller's request id if it is a plain word, else a new id."""
    word = (header or b"").decode("latin-1")
    plain = 0 < len(word) <= 64 and all(c.isascii() and (c.isalnum() or c in "-_.") for c in word)
    return word if plain else uuid.uuid4().hex


def _address(scope: Scope_) -> str:
    client = scope.get("client")
    return str(client[0]) if client else ""


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Replays the body that was read already, then receives the rest."""
    replayed = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal replayed
        if not replayed:
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again
