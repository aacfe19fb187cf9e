"""The HTTP application: ranking, retrieval, embeddings, writes to the log, health and metrics.

Every request is pinned to one bundle. Wrong input gets an RFC 9457 problem document that names the field.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from features.errors import StoreError
from features.shown.declared import SURFACE
from features.shown.message import Outcome
from serving.api.bodies import (
    Accepted,
    EmbeddingsRequest,
    EmbeddingsResponse,
    EventsRequest,
    ItemResponse,
    ItemsRequest,
    OutcomesRequest,
    Problem,
    RankRequest,
    RankResponse,
    ReadyResponse,
    RetrieveRequest,
    RetrieveResponse,
    VersionResponse,
    microseconds,
)
from serving.api.guard import Guard, Limits
from serving.api.hosts import Hosts
from serving.api.ingest import Intake
from serving.api.keys import KeyFile
from serving.api.problems import add_problem_handlers, blamed
from serving.api.rate import Rates
from serving.api.responses import item_response, rank_response, retrieve_response
from serving.background import Background, Rounds
from serving.load_state import State
from serving.metrics import CONTENT_TYPE, Metrics
from serving.ranking.answer import RankingAnswer
from serving.ranking.rows import MirrorRows
from serving.ranking.service import RankService
from serving.retrieval.fusion import source_of
from serving.retrieval.meaning import Meant, PolicyRequest
from serving.skew.sample import SkewSampler
from serving.traffic.accounting import accounted
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from serving.traffic.shadow import Shadows

_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in (
        (400, "The body cannot be read."),
        (401, "No API key, or an unknown one."),
        (403, "The key's scopes do not cover this."),
        (413, "The body is too large."),
        (421, "A server without keys is called by a name that is not its own."),
        (422, "The input is wrong; `field` says the field at fault."),
        (429, "Too many requests."),
        (503, "Overloaded, draining, or a server behind this one does not answer."),
    )
}


@dataclass
class AppParts:
    """Parts of an application, beside the bundle that answers.

    Attributes:
        metrics: Counters; may be shared with the code that swaps bundles.
        limits: Limits of requests.
        keys: API keys; None admits every caller that addresses the server by one of `hosts`.
        hosts: Host names of the server; the loopback names by default.
        intake: Appends events and items; None without a log.
        recorder: Records impressions; None records none.
        sampler: Samples answers and logs what they read; None samples none.
        shadows: Rank shown candidates by the challengers of shadow experiments.
        reload: Checks for another bundle at once; returns the bundle's id.
        state: Says when the server drains.
        rates: Rates of the callers, if several processes share them; by default those of `limits`.
        refresh_s: Seconds between two reads of new items from the store.
        refreshing: Record of these reads.
    """

    metrics: Metrics = field(default_factory=Metrics)
    limits: Limits = field(default_factory=Limits)
    keys: KeyFile | None = None
    hosts: Hosts = field(default_factory=Hosts)
    intake: Intake | None = None
    recorder: Recorder | None = None
    sampler: SkewSampler | None = None
    shadows: Shadows | None = None
    reload: Callable[[], str] | None = None
    state: State = field(default_factory=State)
    rates: Rates | None = None
    refresh_s: float = 0.25
    refreshing: Rounds = field(init=False)

    def __post_init__(self) -> None:
        self.refreshing = Rounds("items", "new items could not be read", self.metrics)


def create_app(current: Router, parts: AppParts | None = None) -> FastAPI:
    """Builds the application.

    Args:
        current: Router of the requests.
        parts: Other parts of the application. Default: no keys, no log and no recording.
    """
    known = parts or AppParts()
    current.watch(lambda service: _note(known.metrics, service))

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with contextlib.closing(_refreshing(current, known)):
            yield

    # The application serves the scripts of /docs, so that the page works without access to other hosts.
    app = FastAPIOffline(
        title="Tessera",
        version="1",
        redoc_url=None,
        lifespan=lifespan,
        description="Feature embeddings for recommenders. Every answer names its bundle.",
    )
    app.add_middleware(
        Guard,
        metrics=known.metrics,
        limits=known.limits,
        keys=known.keys,
        state=known.state,
        hosts=known.hosts,
        rates=known.rates,
    )
    add_problem_handlers(app)
    # The guard checks keys; this only documents that keys exist.
    keyed = [Depends(HTTPBearer(auto_error=False))] if known.keys is not None else []
    app.include_router(_reads(current, known), responses=_REFUSED, dependencies=keyed)
    app.include_router(_writes(current, known.intake), responses=_REFUSED, dependencies=keyed)
    app.include_router(_operation(current, known), responses={503: _REFUSED[503]})
    return app


def _reads(current: Router, parts: "AppParts") -> APIRouter:
    router = APIRouter(tags=["reads"])
    metrics = parts.metrics

    @router.post("/v1/rank", response_model_exclude_none=True)
    def rank(body: RankRequest, request: Request, after: BackgroundTasks) -> RankResponse:
        """Ranks the candidates, or the items that retrieval finds, by the probability of a positive event."""

        drawn_by = uuid.uuid4().hex

        def ask(service: RankService) -> RankingAnswer:
            if body.filter is not None:
                body.filter.check_size()
            return service.rank(
                body.user,
                body.candidates,
                body.k,
                body.context,
                wanted=body.filter,
                explain=body.explain,
                at=None if body.at is None else microseconds(body.at),
                meant=Meant(
                    avoid=tuple(body.avoid),
                    without=tuple(body.without),
                    sources=tuple(body.sources or ()),
                    policy=PolicyRequest(body.policy, drawn_by) if body.policy is not None else None,
                ),
            )

        with current.pinned_for(body.user) as pinned, blamed("context"):
            request.state.bundle = pinned.service.bundle.id
            surface = body.context.get(SURFACE, "")
            answer, shown = accounted(
                current,
                pinned,
                body.user,
                parts.recorder,
                ask,
                request=drawn_by,
                surface=surface if isinstance(surface, str) else "",
                sample=parts.sampler.offer if parts.sampler is not None else None,
            )
        if shown is not None and pinned.shadows and parts.shadows is not None:
            after.add_task(parts.shadows.offer, pinned.shadows, shown)
        metrics.unknown_users.inc(0 if answer.known_user else 1)
        metrics.unknown_items.inc(len(answer.unknown_items))
        metrics.stale.inc(1 if answer.stale else 0)
        metrics.found(answer.sources)
        return rank_response(answer, shown, clock=pinned.service.has_clock)

    @router.post("/v1/retrieve")
    def retrieve(body: RetrieveRequest, request: Request) -> RetrieveResponse:
        """Finds the items nearest to an item or a text, or the candidates for a user, among the items that match."""
        with current.pinned() as service, blamed("filter"):
            request.state.bundle = service.bundle.id
            answer = service.retrieve(
                item=body.item,
                user=body.user,
                text=body.text,
                k=body.k,
                wanted=body.filter,
                view=body.view,
                meant=Meant(
                    body.aspect,
                    tuple(body.avoid),
                    tuple(body.without),
                    body.explain,
                    tuple(body.channels or ()),
                    tuple(body.sources or ()),
                    PolicyRequest(body.policy, uuid.uuid4().hex, body.shown_to) if body.policy is not None else None,
                ),
            )
        metrics.plans.labels(answer.plan.method).inc()
        if answer.sources is not None:
            metrics.found([source_of(ranks) for ranks in answer.ranks])
        return retrieve_response(answer, explain=body.explain)

    @router.post("/v1/embeddings")
    def embeddings(body: EmbeddingsRequest, request: Request) -> EmbeddingsResponse:
        """Looks up values of a feature in the table, for rankers that run elsewhere."""
        with current.pinned() as service:
            request.state.bundle = service.bundle.id
            with blamed("feature"):
                width = service.embeddings.width(body.feature)
            with blamed("values"):
                vectors = service.embeddings.lookup(body.feature, body.values)
            return EmbeddingsResponse(
                bundle=service.bundle.id, feature=body.feature, width=width, vectors=vectors.tolist()
            )

    @router.get(
        "/v1/items/{item_id:path}",
        responses={404: {"model": Problem, "description": "The item is unknown."}},
    )
    def item(item_id: str, request: Request) -> ItemResponse:
        """Returns an item as the bundle and the stream know it."""
        with current.pinned() as service:
            request.state.bundle = service.bundle.id
            view = service.item(item_id)
        if view is None:
            raise HTTPException(404, f"item {item_id!r} is unknown, or was deleted")
        return item_response(view)

    return router


def _writes(current: Router, intake: Intake | None) -> APIRouter:
    router = APIRouter(tags=["writes"])

    def open_intake() -> Intake:
        if intake is None:
            raise StoreError("this server has no log to append to; start it by `tessera serve`")
        return intake

    @router.post("/v1/events", status_code=202)
    def events(body: EventsRequest, request: Request) -> Accepted:
        """Appends the events to the log. If any event is invalid, none is appended."""
        with current.pinned() as service, blamed("events"):
            request.state.bundle = service.bundle.id
            return Accepted(accepted=open_intake().events(service.bundle, body.events))

    @router.post("/v1/outcomes", status_code=202)
    def outcomes(body: OutcomesRequest) -> Accepted:
        """Appends outcomes of shown items to the log. The judge quarantines outcomes that match no impression."""
        now = time.time_ns() // 1_000_000
        outcomes = [
            Outcome(sent.impression, sent.item, now if sent.time_ms is None else sent.time_ms, sent.what)
            for sent in body.outcomes
        ]
        return Accepted(accepted=open_intake().outcomes(outcomes))

    @router.delete("/v1/users/{user_id:path}", status_code=202)
    def forget(user_id: str, request: Request) -> Accepted:
        """Appends a request to forget a user. The stream removes the user, and leaves the user's older events out."""
        with blamed("user"):
            open_intake().forget(user_id, by=getattr(request.state, "key", ""))
        return Accepted(accepted=1)

    @router.post("/v1/items", status_code=202)
    def items(body: ItemsRequest, request: Request) -> Accepted:
        """Appends the items to the log. If any item is invalid, none is appended."""
        with current.pinned() as service, blamed("items"):
            request.state.bundle = service.bundle.id
            return Accepted(accepted=open_intake().items(service.bundle, service.item_types, body.items))

    return router


def _operation(current: Router, parts: AppParts) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/healthz")
    def healthz() -> dict[str, str]:
        """Returns a fixed answer while the process runs."""
        return {"status": "alive"}

    @router.get("/readyz", response_model_exclude_none=True)
    def readyz() -> ReadyResponse:
        """Returns whether the server is ready for requests."""
        if parts.state.draining:
            raise HTTPException(503, "the server is draining; send requests elsewhere")
        with current.pinned() as service:
            return _readiness(service, parts.refreshing)

    @router.get("/v1/version")
    def version() -> VersionResponse:
        """Returns the bundle that answers."""
        bundle = current.service.bundle
        manifest = bundle.manifest
        return VersionResponse(
            bundle=bundle.id, model=bundle.dataset.name, encoder=manifest.encoder, codebook=manifest.codebook
        )

    @router.post("/v1/admin/reload")
    def reload() -> VersionResponse:
        """Checks the registry now. The bundle that the alias names serves before this call returns."""
        if parts.reload is None:
            raise HTTPException(409, "this server serves one bundle; it follows no alias")
        parts.reload()
        return version()

    @router.get("/metrics", response_class=Response)
    def prometheus() -> Response:
        """Returns the metrics in Prometheus' text format."""
        return Response(parts.metrics.page(), media_type=CONTENT_TYPE)

    return router


def _note(metrics: Metrics, service: RankService) -> None:
    metrics.answers(service.bundle.id)
    metrics.items.set(service.items)
    metrics.holds(service.index_bytes)


def _readiness(service: RankService, refreshing: Rounds) -> ReadyResponse:
    """Returns the sources of a server's answers. Raises an error if the server should get no requests."""
    error = refreshing.error
    # While the store is unavailable or empty, a mirror answers, and the response names the store's error.
    excused = service.rows.outlasts_store and isinstance(error, StoreError)
    if error is not None and refreshing.broken and not excused:
        raise HTTPException(503, f"new items cannot be read: {type(error).__name__}: {error}; see the server's log")
    ready = ReadyResponse(status="ready", bundle=service.bundle.id, store=str(error) if excused else None)
    if not isinstance(service.rows, MirrorRows):
        service.check_ready()
        return ready
    # A server with a lagging mirror is ready, since rows then come from the store, or from the mirror without a store.
    lag_s = round(service.rows.mirror.lag_s(), 3)
    ready.mirror = {"lag_s": lag_s, "reads_from": "mirror" if service.rows.fresh else "store"}
    return ready


def _refreshing(current: Router, parts: AppParts) -> Background:
    """Starts a thread that reads new items from the store, for the champion and the challengers, until it is closed."""
    trials = Rounds("challenger", "new items could not be read for a challenger", parts.metrics)

    def refresh(_: threading.Event) -> None:
        try:
            with current.pinned() as service:
                service.refresh()
                parts.metrics.items.set(service.items)
                parts.metrics.holds(service.index_bytes)
                parts.metrics.unreadable.set(len(service.unreadable))
                if isinstance(service.rows, MirrorRows):
                    parts.metrics.mirror_lag.set(service.rows.mirror.lag_s())
        finally:
            for challenger in current.challengers.values():
                with trials.round():
                    challenger.refresh()

    return Background("items", refresh, parts.refreshing, every_s=parts.refresh_s)
