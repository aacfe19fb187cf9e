"""HTTP: ranking, health and metrics. Wrong input gets an RFC 9457 problem document that names the field."""

import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)
from starlette.exceptions import HTTPException

from features.error import EventError, StoreError, TesseraError
from serving.load import require_loaded
from serving.rank import MAX_CANDIDATES, RankService
from serving.rows import MirrorRows
from serving.store import OnlineStore

_PROBLEM = "application/problem+json"
_LATENCY_S = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0)
_log = logging.getLogger(__name__)


def _id(value: Any) -> Any:
    """An id as JSON gives it: text, or a whole number that is the same id."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _encodable(value: str) -> str:
    """Refuses a lone surrogate, which a JSON escape can write and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("holds half of a surrogate pair, which is not text")
    return value


Text = Annotated[StrictStr, AfterValidator(_encodable), Field(max_length=1_024)]
Id = Annotated[Text, BeforeValidator(_id), Field(min_length=1)]
Whole = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Value = Text | Whole | StrictFloat | StrictBool | list[Text] | None


class RankRequest(BaseModel):
    """Rank candidates for a user; without candidates they are retrieved by vector first."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"user": "42", "candidates": ["1", "2", "3"], "k": 2}]}
    )

    user: Id = Field(description="The user's id; an unknown user is served by defaults.")
    candidates: Annotated[list[Id], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = Field(
        default=None, description="Item ids; an unknown item is scored without item features."
    )
    k: int = Field(default=10, ge=1, le=MAX_CANDIDATES, description="How many items to return at most.")
    context: dict[str, Value] = Field(default_factory=dict, description="The events' own columns, by name.")


class RankedItem(BaseModel):
    """One item of an answer."""

    item: str
    score: float = Field(description="Probability of a positive event.")


class RankResponse(BaseModel):
    """Items, best first, and the bundle that ranked them."""

    bundle: str
    items: list[RankedItem]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool


class EmbeddingsRequest(BaseModel):
    """Values of one feature."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"feature": "item_id", "values": ["42", "43"]}]},
    )

    feature: str = Field(description="A feature of the bundle's schema.")
    values: list[Value] = Field(
        min_length=1, max_length=MAX_CANDIDATES, description="Values, or lists of them to be pooled."
    )


class EmbeddingsResponse(BaseModel):
    """Vectors in the order of the values, and the bundle that they belong to."""

    bundle: str
    feature: str
    width: int
    vectors: list[list[float]]


class Metrics:
    """What `/metrics` shows; a registry of its own, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tessera_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.latency = Histogram(
            "tessera_request_seconds", "Time to answer.", ["route"], buckets=_LATENCY_S, registry=self.registry
        )
        self.unknown_users = Counter("tessera_unknown_users", "Users served by defaults.", registry=self.registry)
        self.unknown_items = Counter("tessera_unknown_items", "Candidates nobody knows.", registry=self.registry)
        self.items = Gauge("tessera_items", "Items that can be ranked.", registry=self.registry)
        self.bundle = Gauge("tessera_bundle_info", "The bundle that answers.", ["bundle"], registry=self.registry)


def create_app(service: RankService, store: OnlineStore, *, refresh_s: float = 0.25) -> FastAPI:
    """Builds the application around one service.

    Args:
        refresh_s: how often new items are taken in from the store.
    """
    metrics = Metrics()
    metrics.bundle.labels(service.bundle.id).set(1)
    metrics.items.set(service.items)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        follower = threading.Thread(target=_follow, args=(service, metrics, refresh_s, stop), daemon=True)
        follower.start()
        yield
        stop.set()
        follower.join()

    app = FastAPI(title="Tessera", version="1", lifespan=lifespan)
    _add_problem_handlers(app)

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "other")
        metrics.requests.labels(route, response.status_code).inc()
        metrics.latency.labels(route).observe(time.perf_counter() - start)
        return response

    @app.post("/v1/rank", response_model=RankResponse)
    def rank(body: RankRequest) -> Any:
        try:
            found = service.rank(body.user, body.candidates, body.k, body.context)
        except EventError as error:
            return problem(422, "Wrong input", str(error), field="context")
        metrics.unknown_users.inc(0 if found.known_user else 1)
        metrics.unknown_items.inc(len(found.unknown_items))
        items = [RankedItem(item=item, score=score) for item, score in found.items]
        return RankResponse(
            bundle=found.bundle,
            items=items,
            known_user=found.known_user,
            unknown_items=found.unknown_items,
            retrieved=found.retrieved,
        )

    @app.post("/v1/embeddings", response_model=EmbeddingsResponse)
    def embeddings(body: EmbeddingsRequest) -> Any:
        try:
            width = service.embeddings.width(body.feature)
        except EventError as error:
            return problem(422, "Wrong input", str(error), field="feature")
        try:
            found = service.embeddings.lookup(body.feature, body.values)
        except EventError as error:
            return problem(422, "Wrong input", str(error), field="values")
        return EmbeddingsResponse(bundle=service.bundle.id, feature=body.feature, width=width, vectors=found.tolist())

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    def readyz() -> dict[str, Any]:
        require_loaded(store, service.bundle)
        ready: dict[str, Any] = {"status": "ready", "bundle": service.bundle.id}
        if isinstance(service.rows, MirrorRows):
            # A mirror that lags makes no server unready: the store answers meanwhile.
            lag_s = round(service.rows.mirror.lag_s(), 3)
            ready["mirror"] = {"lag_s": lag_s, "reads_from": "mirror" if service.rows.fresh else "store"}
        return ready

    @app.get("/v1/version")
    def version() -> dict[str, str]:
        return {"bundle": service.bundle.id, "model": service.bundle.dataset.name}

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def problem(status: int, title: str, detail: str, *, field: str | None = None) -> JSONResponse:
    """An RFC 9457 problem document; `field` names what is at fault."""
    body: dict[str, Any] = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    if field is not None:
        body["field"] = field
    return JSONResponse(body, status_code=status, media_type=_PROBLEM)


def _add_problem_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        parts = [str(part) for part in first["loc"] if part != "body"]
        # Behind a context column's name stand the types it could have had.
        field = ".".join(parts[:2] if parts[:1] == ["context"] else parts) or "body"
        if first["type"] == "json_invalid":
            field = "body"
        return problem(422, "Wrong input", f"{field}: {first['msg']}", field=field)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, "Refused", str(error.detail))

    @app.exception_handler(StoreError)
    def unavailable(_: Request, error: StoreError) -> JSONResponse:
        return problem(503, "Online store unavailable", str(error))

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> JSONResponse:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return problem(500, "Internal error", "the request failed; the server's log has the cause")


def _follow(service: RankService, metrics: Metrics, every_s: float, stop: threading.Event) -> None:
    while not stop.wait(every_s):
        try:
            service.refresh()
            metrics.items.set(service.items)
        except TesseraError as error:
            # Readiness reports it; the next round tries again.
            _log.warning("new items could not be taken in: %s", error)
