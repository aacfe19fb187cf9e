"""`operation`: measures the cost of the console and of a shadow for a server under load.

- pages: each page of the console fetched again and again, while nobody ranks and while callers do.
- shadow: callers at half of the server's peak, a challenger ranking everything in the shadow or not, turn by turn; then
  at the peak, where shadows should be shed. Answers to the same questions are compared: a shadow changes none. At half
  of the peak requests are due at fixed times and timed from then.
"""

import http.client
import json
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import Bundle
from serving.rollout.experiment import RampStep
from serving.rollout.lifecycle import running, start, stop
from tessera.bench.harness.load import Load
from tessera.bench.harness.result import BenchResult, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.harness.served import Caller, server
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings

_PAGES = ("", "/models", "/rollouts", "/ids", "/ids?q=a", "/ids?item=", "/letters", "/health")
_FETCHES, _PEAK_CALLERS, _CALLERS, _CANDIDATES = 20, 2, 32, 100
_PEAK_S, _TURN_S, _TURNS = 8.0, 8.0, 6
_QUESTIONS = 50


def operation(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Runs once, whatever the seeds."""
    bundles = [
        run(
            dataset, out / f"{dataset.name}-{seed}", load_options(dataset, [f"seed={seed}"]),
            console=console, registry=None, until="publish",
        ).bundle
        for seed in (0, 1)
    ]  # fmt: skip
    champion, challenger = bundles
    if champion is None or challenger is None:
        raise TesseraError("the runs released no bundle to serve; see their reports")
    home = (out / "home").absolute()
    shutil.rmtree(home, ignore_errors=True)
    settings = Settings(home=home)
    registry = settings.open_registry()
    for bundle in (champion, challenger):
        registry.publish(bundle, params={}, metrics={})
    environment = {"TESSERA_HOME": str(home), "TESSERA_KAFKA": "", "TESSERA_REDIS": "", "MLFLOW_TRACKING_URI": ""}
    options = ("--mirror", "--quiet", "--follow-s", "0.5")
    with server(environment, *options, log=out / "serve.log") as port:
        rows = measured_rows()
        rows += _pages(port, champion, console)
        rows += _shadowed(port, champion, lambda on: _shadow(settings, challenger.id, on=on), console)
    return BenchResult("operation", dataset.name, 1, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Any]:
    by = {row["part"]: row for row in rows}
    pages = [row["p50_ms"] for row in rows if row["part"].startswith("page")]
    return [
        at_most("slowest page of the console over a ranking without load, p50", max(pages) / by["alone"]["p50_ms"], 20),
        at_most("answers that a shadow changed", by["shadow"]["changed"], 0),
        at_most(
            "requests that failed", by["shadow"]["failed"] + by["alone"]["failed"] + by["peak, shadow"]["failed"], 0
        ),
        at_least("rankings in the shadow", by["shadow"]["ranked"], 1),
        at_least("shadows shed at the peak, share", by["peak, shadow"]["shed_share"], 0.5),
    ]


def _pages(port: int, bundle: Bundle, console: Console) -> list[dict[str, Any]]:
    item = bundle.items.drop_nulls("semantic_codes")["item_id"][0] if bundle.manifest.codebook is not None else ""
    rows: list[dict[str, Any]] = []
    for what in ("idle", "ranking"):
        with ExitStack() as stack, console.status(f"pages, {what}"):
            if what == "ranking":
                stack.enter_context(_calling(port, bundle))
            for page in _PAGES:
                path = f"/console{page}{item if page.endswith('item=') else ''}"
                _until_made(port, path)
                times = [_fetched(port, path)[1] for _ in range(_FETCHES)]
                rows.append(
                    {
                        "part": f"page {page or '/'}, {what}",
                        "items": bundle.items.height,
                        "p50_ms": float(np.median(times)),
                        "most_ms": max(times),
                    }
                )
    return rows


@contextmanager
def _calling(port: int, bundle: Bundle) -> Iterator[None]:
    load = _load(port, bundle, per_second=50.0, callers=_CALLERS)
    thread = threading.Thread(target=load.run, args=(None,))
    thread.start()
    try:
        yield
    finally:
        load.stop.set()
        thread.join()


def _shadowed(port: int, bundle: Bundle, shadow: Any, console: Console) -> list[dict[str, Any]]:
    with console.status("peak"):
        peak = _load(port, bundle, per_second=None, callers=_PEAK_CALLERS)
        peak.run(_PEAK_S)
    rate = 0.5 * peak.rate
    loads = {on: _load(port, bundle, per_second=rate, callers=_CALLERS) for on in (False, True)}
    counted = {"ranked": 0.0, "shed": 0.0, "failed": 0.0}
    questions = _questions(port, bundle)
    before = _answers(port, questions)
    changed = 0
    for turn in range(_TURNS):
        on = turn % 2 == 1
        with console.status(f"{rate:.0f} requests a second, {'with a' if on else 'no'} shadow"):
            shadow(on)
            _until_followed(port, questions[0], on)
            if on:
                changed += sum(one != other for one, other in zip(before, _answers(port, questions), strict=True))
            at = _shadows(port)
            loads[on].run(_TURN_S)
            if on:
                counted = {what: counted[what] + _shadows(port)[what] - at[what] for what in counted}
    shadow(True)
    _until_followed(port, questions[0], True)
    at = _shadows(port)
    busy = _load(port, bundle, per_second=None, callers=4 * _PEAK_CALLERS)
    with console.status("peak, with a shadow"):
        busy.run(_PEAK_S)
    shed = {what: _shadows(port)[what] - at[what] for what in at}
    shadow(False)
    return [
        peak.row("peak"),
        loads[False].row("alone"),
        loads[True].row("shadow") | counted | {"changed": changed} | _ratios(loads[True], loads[False]),
        busy.row("peak, shadow") | shed | {"shed_share": shed["shed"] / max(sum(shed.values()), 1)},
    ]


def _ratios(load: Load, alone: Load) -> dict[str, float]:
    return {f"p{q}_times": float(np.percentile(load.ms, q) / np.percentile(alone.ms, q)) for q in (50, 99)}


def _shadow(settings: Settings, challenger: str, *, on: bool) -> None:
    registry = settings.open_registry()
    runs = bool(running(registry, registry.resolve(None).model))
    if on and not runs:
        start(registry, None, challenger, [RampStep(0.0, 1.0)], name="shadow", shadow=True)
    elif runs and not on:
        stop(registry, None, "shadow", why="the turn is over")


def _load(port: int, bundle: Bundle, *, per_second: float | None, callers: int) -> Load:
    def connect(number: int) -> Caller:
        return Caller(port, bundle, candidates=_CANDIDATES, seed=number)

    return Load(connect, per_second=per_second, callers=callers)


def _questions(port: int, bundle: Bundle) -> list[bytes]:
    caller = Caller(port, bundle, candidates=_CANDIDATES, seed=99)
    return [caller.body() for _ in range(_QUESTIONS)]


def _answers(port: int, questions: Sequence[bytes]) -> list[Any]:
    answers = []
    for body in questions:
        answer = json.loads(_asked(port, "POST", "/v1/rank", body))
        answers.append((answer["bundle"], answer["items"]))
    return answers


def _until_followed(port: int, question: bytes, on: bool) -> None:
    """Waits until the server repeats rankings in the shadow, or stops to."""
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        before = sum(_shadows(port).values())
        _asked(port, "POST", "/v1/rank", question)
        time.sleep(0.3)
        if (sum(_shadows(port).values()) > before) == on:
            return
    raise TesseraError("the server did not follow the registry within a minute")


def _shadows(port: int) -> dict[str, float]:
    counts = {"ranked": 0.0, "shed": 0.0, "failed": 0.0}
    for line in _asked(port, "GET", "/metrics").decode().splitlines():
        for what in counts:
            if line.startswith(f'tessera_shadows_total{{what="{what}"}}'):
                counts[what] = float(line.split()[1])
    return counts


def _until_made(port: int, path: str) -> None:
    give_up = time.monotonic() + 120
    while b"data-again" in _fetched(port, path)[0]:
        if time.monotonic() > give_up:
            raise TesseraError(f"{path}: not made within two minutes")
        time.sleep(0.2)


def _fetched(port: int, path: str) -> tuple[bytes, float]:
    began = time.perf_counter()
    page = _asked(port, "GET", path)
    return page, 1_000 * (time.perf_counter() - began)


def _asked(port: int, method: str, path: str, body: bytes | None = None) -> bytes:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status >= 400:
            raise TesseraError(f"{method} {path}: {answer.status}: {content[:200]!r}")
        return content
