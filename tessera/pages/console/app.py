"""Routes of the console, under `/console`: pages rendered here from the samples in memory.

The pages need no other site, no build and no script; their one script renews the live parts. The guard
(`serving.api.guard`) decides who may see them: a key of scope `console` shows them, and with `write` it replays
letters.
"""

import contextlib
import time
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined

from features.errors import TesseraError
from models.insight.table_report import insight
from serving.api.guard import secret_of
from serving.api.keys import KeyFile
from serving.metrics import Metrics
from serving.traffic.router import Router
from streaming.dead_letter import put_back, waiting
from tessera.pages.console import encoders, served, view
from tessera.pages.console.catalogue import CodedItems
from tessera.pages.console.later import Later
from tessera.pages.console.sampler import Sampler
from tessera.pages.console.sources import candidate_sources
from tessera.settings import Settings

_PAGES = (
    ("", "Overview"),
    ("/models", "Models"),
    ("/rollouts", "Rollouts"),
    ("/ids", "Semantic IDs"),
    ("/encoder", "Encoder"),
    ("/upgrades", "Upgrades"),
    ("/concepts", "Concepts"),
    ("/skew", "Skew and drift"),
    ("/aggregates", "Aggregates"),
    ("/letters", "Dead letters"),
    ("/forgotten", "Forgotten users"),
    ("/health", "Features and table"),
)
# Nothing is fetched from other sites, and no other site may frame a page or send a form to it.
_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_LETTERS = 50
_NEIGHBOURS = 12


class Console:
    """Parts that the pages share.

    Args:
        settings: Addresses of log, store and registry.
        current: Router of the bundles that serve.
        metrics: Metrics of the server.
        keys: Permissions of callers; None if every caller may do everything.
    """

    def __init__(self, settings: Settings, current: Router, metrics: Metrics, keys: KeyFile | None) -> None:
        self.settings = settings
        self.current = current
        self.keys = keys
        self.metrics = metrics
        self.sampler = Sampler(settings, current, metrics)
        self.items = Later(CodedItems)
        self.insight = Later(insight)
        self.concepts = Later(encoders.ConceptPage)
        self._pages = Environment(
            loader=PackageLoader("tessera.pages.console"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
            lstrip_blocks=True,
        )  # fmt: skip
        self._pages.filters |= {"moment": view.moment, "ago": view.ago, "count": view.count, "ratio": view.ratio}

    def close(self) -> None:
        """Stops the sampler."""
        self.sampler.close()

    def page(self, name: str, here: str, /, status: int = 200, **content: Any) -> HTMLResponse:
        """Returns a page, or only its live part."""
        bundle = self.current.service.bundle
        html = self._pages.get_template(f"{name}.html").render(
            pages=_PAGES, here=here, bundle=bundle.id, model=bundle.dataset.name, away=self.sampler.seen.away,
            now=time.time(), **content,
        )  # fmt: skip
        return HTMLResponse(html, status, headers={"content-security-policy": _POLICY, "cache-control": "no-store"})

    def may_write(self, request: Request) -> bool:
        """Returns whether the caller's key may put letters back."""
        if self.keys is None:
            return True
        key = self.keys.find(secret_of(dict(request.scope["headers"])))
        return key is not None and key.may("write")


def add_console(app: FastAPI, console: Console) -> None:
    """Gives an app the console's routes."""
    router = APIRouter(prefix="/console", include_in_schema=False)
    parts = (_overview, _models, _rollouts, _ids, _encoders, _skew, _aggregates, _letters, _forgotten, _health, _files)
    for part in parts:
        part(router, console)
    app.include_router(router)


def _overview(router: APIRouter, console: Console) -> None:
    def content() -> dict[str, Any]:
        return view.overview(console.sampler.seen, console.settings.topics, console.current)

    @router.get("")
    @router.get("/")
    def overview() -> HTMLResponse:
        return console.page("overview", "", **content())

    @router.get("/live")
    def live() -> HTMLResponse:
        return console.page("live", "", **content())


def _models(router: APIRouter, console: Console) -> None:
    @router.get("/models")
    def models() -> HTMLResponse:
        return console.page("models", "/models", **view.lineage(console.sampler.seen.versions))


def _rollouts(router: APIRouter, console: Console) -> None:
    @router.get("/rollouts")
    def rollouts() -> HTMLResponse:
        return console.page("rollouts", "/rollouts", **view.rollouts(console.sampler.seen))

    @router.get("/rollouts/{experiment}")
    def rollout(experiment: str) -> HTMLResponse:
        found = view.rollout(console.sampler.seen, experiment)
        if found is None:
            return _missing(console, "/rollouts", f"There is no experiment {experiment!r}.")
        return console.page("rollout", "/rollouts", **found)


def _ids(router: APIRouter, console: Console) -> None:
    @router.get("/ids")
    def ids(
        path: str = Query("", max_length=200), q: str = Query("", max_length=200), item: str = Query("", max_length=500)
    ) -> HTMLResponse:
        with console.current.pinned() as service:
            if service.bundle.manifest.codebook is None:
                return console.page("ids", "/ids", state="none", why="")
            items = console.items.get(service.bundle)
            if items is None:
                state = "failed" if console.items.failed else "later"
                return console.page("ids", "/ids", state=state, why=console.items.failed)
            chosen = items.item(item) if item else None
            if item and chosen is None:
                return _missing(console, "/ids", f"No item {item!r} of this bundle has a Semantic ID.")
            near: list[tuple[Any, float]] = []
            if chosen is not None:
                path = chosen.code
                near = [(items.name(name), score) for name, score in service.similar(chosen.id, _NEIGHBOURS)]
        codes = tuple(int(code) for code in path.split(".") if code.isdecimal() and len(code) < 8)
        return console.page(
            "ids", "/ids", state="ready", why="", q=q, found=items.search(q) if q else [], total=len(items),
            chosen=chosen, near=near, twins=items.same_code(chosen.id) if chosen else [], path=path,
            branches=items.branches(codes),
        )  # fmt: skip


def _encoders(router: APIRouter, console: Console) -> None:
    @router.get("/encoder")
    def encoder() -> HTMLResponse:
        return console.page("encoder", "/encoder", **encoders.report(console.sampler.seen.encoder_report))

    @router.get("/upgrades")
    def upgrades() -> HTMLResponse:
        return console.page("upgrades", "/upgrades", **encoders.upgrades(console.sampler.seen.upgrades))

    @router.get("/concepts")
    def concepts() -> HTMLResponse:
        with console.current.pinned() as service:
            found = console.concepts.get(service.bundle)
        return console.page("concepts", "/concepts", found=found, why=console.concepts.failed)


def _skew(router: APIRouter, console: Console) -> None:
    @router.get("/skew")
    def skew() -> HTMLResponse:
        return console.page("skew", "/skew", **served.report(console.sampler.seen.skew))


def _aggregates(router: APIRouter, console: Console) -> None:
    @router.get("/aggregates")
    def aggregates(user: str = Query("", max_length=1_024), item: str = Query("", max_length=1_024)) -> HTMLResponse:
        with console.current.pinned() as service:
            content = view.aggregates(service, user, item)
        return console.page("aggregates", "/aggregates", user=user, item=item, **content)


def _letters(router: APIRouter, console: Console) -> None:
    @router.get("/letters")
    def letters(
        request: Request, cause: str = Query("", max_length=80), page: int = Query(1, ge=1, le=1_000_000),
        done: str = Query("", max_length=20),
    ) -> HTMLResponse:  # fmt: skip
        letters = console.sampler.seen.letters
        chosen = [one for one in reversed(letters.newest) if not cause or one.letter.cause == cause]
        return console.page(
            "letters", "/letters", causes=letters.waiting, total=letters.total, held=len(letters.newest), cause=cause,
            page=page, pages_of=max(1, -(-len(chosen) // _LETTERS)), done=int(done) if done.isdecimal() else None,
            shown=[view.letter(one) for one in chosen[(page - 1) * _LETTERS : page * _LETTERS]],
            may_write=console.may_write(request),
        )  # fmt: skip

    @router.post("/letters")
    async def replay(request: Request) -> Response:
        # A browser sends its key along with any site's form, so only the console's own forms are accepted.
        origin = urlsplit(request.headers.get("origin", ""))
        if not origin.netloc or origin.netloc != request.headers.get("host"):
            raise HTTPException(403, "this form was not sent by a page of the console")
        form = parse_qs((await request.body()).decode("utf-8", errors="replace"))
        return await run_in_threadpool(put, form.get("number", []), form.get("cause", [""])[0])

    def put(numbers: list[str], cause: str) -> Response:
        chosen = {int(number) for number in numbers if number.isdecimal()}
        try:
            with contextlib.closing(console.settings.open_log()) as log:
                if cause:
                    chosen |= waiting(log, console.settings.topics, cause)
                done = put_back(log, console.settings.topics, chosen, {})
        except TesseraError as error:
            return console.page("problem", "/letters", 409, title="Nothing was put back", why=str(error))
        console.sampler.look()
        return RedirectResponse(f"/console/letters?done={len(done)}", 303)


def _forgotten(router: APIRouter, console: Console) -> None:
    @router.get("/forgotten")
    def forgotten() -> HTMLResponse:
        return console.page("forgotten", "/forgotten", lines=console.sampler.seen.forgotten[::-1])


def _health(router: APIRouter, console: Console) -> None:
    @router.get("/health")
    def health() -> HTMLResponse:
        with console.current.pinned() as service:
            found = console.insight.get(service.bundle)
            facts = view.quality(service.bundle.manifest.metrics) | view.placement(service.bundle)
            facts |= view.tasks(service.bundle)
            facts["declared"] = view.declared_features(service.bundle.dataset)
            facts["policies"] = view.declared_policies(service.bundle.dataset)
            facts["sources"] = candidate_sources(service.index_bytes, console.metrics.found_by())
        return console.page("health", "/health", insight=found, why=console.insight.failed, **facts)


def _files(router: APIRouter, console: Console) -> None:
    def read(name: str) -> str:
        return resources.files("tessera").joinpath(name).read_text(encoding="utf-8")

    style = read("pages/report.css") + read("pages/console/static/console.css")
    script = read("pages/console/static/console.js")

    @router.get("/console.css")
    def css() -> Response:
        return Response(style, media_type="text/css", headers={"cache-control": "max-age=3600"})

    @router.get("/console.js")
    def js() -> Response:
        return Response(script, media_type="text/javascript", headers={"cache-control": "max-age=3600"})


def _missing(console: Console, here: str, why: str) -> HTMLResponse:
    return console.page("problem", here, 404, title="Not here", why=why)
