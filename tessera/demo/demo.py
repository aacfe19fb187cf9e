"""The whole path on one machine: run, serve, rank new items, stream the held-back events as if live, report.

Everything is real, embedded or not: the log and the store that the settings point at, HTTP over loopback, the
bundle from the registry.
"""

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import polars as pl
import uvicorn
from rich.console import Console
from rich.text import Text

from features.dataset.descriptor import Dataset, load_dataset
from features.dataset.profile import profile
from features.dataset.tables import read_table
from models.bundle.bundle import Bundle
from serving.api.app import create_app
from serving.client import Client
from serving.ranking.service import MAX_CANDIDATES, RankService
from serving.store.fill import fill_store
from serving.store.protocol import OnlineStore
from serving.traffic.router import Router
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.trainer import Totals
from tessera.demo import synthetic
from tessera.demo.new_items import NewItemPlan, encode_row, measure_ranks, new_items, plan_new_items
from tessera.demo.newcomer import Newcomer, choose_newcomer
from tessera.pages.demo_page import DemoSummary, StreamFigures, render_summary, write_report
from tessera.pages.new_items import NewItem, NewItemRanks
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService

_BULK, _LIVE, _LIVE_RATE = 20_000, 4_000, 500
_LIVE_SHARE = 4
_REQUESTS, _CANDIDATES = 300, 100
_READY_S = 30.0


def demo(
    descriptor: Path | None, out: Path, settings: Settings, *, small: bool, console: Console, seed: int = 0
) -> Path:
    """Runs it all and returns the path of the report.

    Args:
        descriptor: of the dataset, or None for the synthetic one.
        out: directory of the run and the report.
        small: a synthetic dataset of fewer users, items and events.
        seed: of the synthetic dataset, the training, the new items, and the users who rank them.
    """
    if descriptor is None:
        size = {"users": 100, "items": 400, "events": 20_000} if small else {}
        descriptor = synthetic.write_synthetic(out / "synthetic", seed=seed, **size)
        console.print(Text(f"a synthetic dataset, generated: {descriptor}", "dim"))
    dataset = load_dataset(descriptor)
    found = profile(dataset)
    registry = settings.open_registry()
    options = load_options(dataset, [f"seed={seed}"])
    result = run(dataset, out / "run", options, console=console, registry=registry, until="publish")
    assert result.bundle is not None
    held_back = _held_back(dataset, out / "run")
    chosen = choose_newcomer(dataset, result.bundle)
    plan = plan_new_items(dataset, result.bundle, out / "run", seed=seed)
    live = _go_live(settings, result.bundle, dataset, held_back, chosen, plan, console)
    epochs = msgspec.json.decode((out / "run" / "train" / "ranker" / "epochs.json").read_bytes())
    summary = DemoSummary(
        title="Tessera demo",
        dataset=dataset.name,
        synthetic=synthetic.is_synthetic(dataset.directory),
        bundle=result.bundle.id,
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        profile=_profile_lines(found.to_json()),
        quality=result.metrics["quality"],
        semantic_ids=result.metrics.get("semantic_ids"),
        stage_seconds=dict(result.executed),
        validation_log_loss=epochs["validation_log_loss"],
        **live,
    )
    report = out / "report.html"
    write_report(report, summary)
    render_summary(console, summary)
    return report


def _go_live(
    settings: Settings,
    bundle: Bundle,
    dataset: Dataset,
    held_back: list[bytes],
    chosen: Newcomer | None,
    plan: NewItemPlan | None,
    console: Console,
) -> dict[str, Any]:
    """Runs the online half and returns its figures: new items, the stream, freshness and latency."""
    with contextlib.closing(settings.open_store()) as store, contextlib.closing(settings.open_log()) as log:
        fill_store(store, bundle)
        titles = _titles(dataset, chosen)
        stream = StreamService(bundle, StreamConnections.shared(log, store, topics=settings.topics))
        with stream, _serving(bundle, store) as (client, service):
            users = bundle.users["user_id"].to_list()
            ranks = _rank_new_items(client, log, stream, settings.topics, plan, console) if plan else None
            before = _top(client, chosen.user, titles) if chosen else []
            live = min(_LIVE, len(held_back) // _LIVE_SHARE)
            bulk = held_back[: len(held_back) - live][:_BULK]
            with console.status(f"streaming {len(bulk):,} held-back events"):
                log.append(settings.topics.events, [(None, message) for message in bulk])
                stream.trainer.totals = Totals()
                start = time.perf_counter()
                stream.drain()
                seconds = time.perf_counter() - start
            totals = stream.trainer.totals
            figures = StreamFigures(
                totals.events, totals.items, totals.bad, seconds, totals.messages / max(seconds, 1e-9), totals.batches
            )
            stream.metrics.ages_ms.clear()
            with console.status("streaming live, one event after another"), _running(stream):
                _send_live(log, settings.topics.events, held_back[len(bulk) : len(bulk) + live])
                added = (
                    _add(client, log, settings.topics.items, chosen, bundle.items["item_id"].to_list())
                    if chosen
                    else None
                )
            serving_ms = _measure(client, users, bundle.items["item_id"].to_list(), console) if chosen else []
            after = _top(client, chosen.user, titles) if chosen else []
            if chosen and added:
                near = [(item, titles.get(item, item), score) for item, score in service.similar(chosen.item, 5)]
                added = replace(added, neighbours=near)
    return {
        "stream": figures,
        "freshness_ms": list(stream.metrics.ages_ms),
        "serving_ms": serving_ms,
        "new_items": ranks,
        "new_item": added,
        "top_before": before,
        "top_after": after,
    }


def _rank_new_items(
    client: httpx.Client, log: EventLog, stream: StreamService, topics: Topics, plan: NewItemPlan, console: Console
) -> NewItemRanks | None:
    """Ranks the planned items; returns None where the log holds the events that decide who likes an item."""
    if plan.before_events and any(log.end_offsets(topics.events)):
        console.print("new items are not ranked: this home has streamed the held-back events; use a new --out")
        return None
    with console.status(f"ranking {len(plan.with_content)} new items for {len(plan.users)} users"):
        with contextlib.closing(Client(str(client.base_url))) as typed, new_items(log, stream, topics, plan):
            return measure_ranks(typed, plan)


@contextlib.contextmanager
def _serving(bundle: Bundle, store: OnlineStore) -> Iterator[tuple[httpx.Client, RankService]]:
    """The HTTP server in a thread, on a port of its own, a client of it, and the service behind it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    service = RankService(bundle, store)
    app = create_app(Router(service))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0) as client:
        deadline = time.monotonic() + _READY_S
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        client.get("/readyz").raise_for_status()
        try:
            yield client, service
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _running(stream: StreamService) -> Iterator[None]:
    """The stream in a thread; leaves when all that was sent is in the store."""
    stop = threading.Event()
    failure: list[BaseException] = []

    def loop() -> None:
        try:
            while not stop.is_set():
                stream.run_once()
            stream.drain()
        except BaseException as error:
            failure.append(error)
            raise

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]


def _send_live(log: EventLog, topic: str, messages: list[bytes]) -> None:
    """Sends at a steady rate, in groups of ten."""
    start = time.perf_counter()
    for sent in range(0, len(messages), 10):
        ahead = sent / _LIVE_RATE - (time.perf_counter() - start)
        if ahead > 0:
            time.sleep(ahead)
        log.append(topic, [(None, message) for message in messages[sent : sent + 10]])


def _add(client: httpx.Client, log: EventLog, topic: str, chosen: Newcomer, items: list[str]) -> NewItem:
    """Adds the new item, waits until a ranker knows it, and ranks it among the catalogue (at most 2,000 of it)."""
    start = time.perf_counter()
    log.append(topic, [(None, encode_row(chosen.message))])
    while _rank(client, chosen.user, candidates=[chosen.item])["unknown_items"]:
        if time.perf_counter() - start > _READY_S:
            raise TimeoutError(f"item {chosen.item} was not rankable within {_READY_S:.0f} s")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    others = [name for name in items if name != chosen.item]
    if len(others) >= MAX_CANDIDATES:
        drawn = np.random.default_rng(0).choice(len(others), size=MAX_CANDIDATES - 1, replace=False)
        others = [others[place] for place in drawn]
    candidates = [chosen.item, *others]
    ranked = [item["item"] for item in _rank(client, chosen.user, k=MAX_CANDIDATES, candidates=candidates)["items"]]
    return NewItem(
        id=chosen.item,
        title=chosen.title,
        user=chosen.user,
        rank=ranked.index(chosen.item) + 1,
        of=len(ranked),
        seconds_to_rankable=seconds,
    )


def _measure(client: httpx.Client, users: list[str], items: list[str], console: Console) -> list[float]:
    """Milliseconds of /v1/rank over HTTP, one client, a hundred candidates a request; the first ones warm up."""
    rng = np.random.default_rng(0)
    found = []
    with console.status("measuring /v1/rank"):
        for number in range(_REQUESTS + 20):
            chosen = rng.choice(len(items), size=min(_CANDIDATES, len(items)), replace=False)
            user = users[int(rng.integers(len(users)))]
            start = time.perf_counter()
            _rank(client, user, candidates=[items[place] for place in chosen])
            if number >= 20:
                found.append((time.perf_counter() - start) * 1_000)
    return found


def _rank(client: httpx.Client, user: str, *, k: int = 10, candidates: list[str] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"user": user, "k": k} | ({"candidates": candidates} if candidates else {})
    response = client.post("/v1/rank", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def _top(client: httpx.Client, user: str, titles: Mapping[str, str]) -> list[tuple[str, str, float]]:
    found = _rank(client, user)["items"]
    return [(item["item"], titles.get(item["item"], item["item"]), item["score"]) for item in found]


def _held_back(dataset: Dataset, run_directory: Path) -> list[bytes]:
    """The test part's events as messages, in time order: rows of the dataset's own events table."""
    examples = pl.read_parquet(run_directory / "frame" / "examples.parquet")
    test = examples.filter(pl.col("split") == "test").unique("event", keep="first").sort("time", "event")
    raw = read_table(dataset.events, dataset.directory, table="events")
    return [encode_row(row) for row in raw[test["event"].to_numpy()].iter_rows(named=True)]


def _titles(dataset: Dataset, chosen: Newcomer | None) -> dict[str, str]:
    if dataset.items is None or not dataset.items.text:
        return {}
    raw = read_table(dataset.items, dataset.directory, table="items")
    ids = raw[dataset.items.id].cast(pl.String).to_list()
    texts = [str(text or "")[:80] for text in raw[dataset.items.text[0]].to_list()]
    return dict(zip(ids, texts, strict=True)) | ({chosen.item: chosen.title} if chosen else {})


def _profile_lines(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    for name, value in found.items():
        if isinstance(value, bool | int | float | str):
            lines.append((name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value)))
    return lines
