"""The online half of the demo: serves a bundle, ranks new items, and streams the held-back events as if live.

The log and the store are those of the settings, and HTTP goes over loopback.
"""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import uvicorn
from rich.console import Console
from rich.text import Text

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
from tessera.demo.new_items import NewItemPlan, encode_row, measure_ranks, new_items
from tessera.demo.newcomer import Newcomer
from tessera.pages.demo_page import CountedRates, StreamFigures
from tessera.pages.new_items import NewItem, NewItemRanks
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService

_BULK, _LIVE, _LIVE_RATE = 20_000, 4_000, 500
_LIVE_SHARE = 4
_REQUESTS, _WARMUP, _CANDIDATES = 300, 20, 100
_READY_S = 30.0
_STREAMED = (
    "continues on a log that holds events: the held-back events are not streamed again, and their figures are missing; "
    "for all figures unset TESSERA_HOME and the addresses of servers"
)


@dataclass(frozen=True)
class LiveInput:
    """Input of the online half.

    Attributes:
        bundle: Bundle to serve and to train on.
        held_back: Events of the test part as messages, in time order.
        plan: New items and the users who rank them; None if the dataset allows none.
        newcomer: Item that is added while the events are streamed; None if the dataset allows none.
        titles: Titles by item id; an item without a title is shown by its id.
    """

    bundle: Bundle
    held_back: Sequence[bytes]
    plan: NewItemPlan | None
    newcomer: Newcomer | None
    titles: Mapping[str, str]

    @property
    def items(self) -> list[str]:
        """Ids of the bundle's items."""
        ids: list[str] = self.bundle.items["item_id"].to_list()
        return ids


def go_live(settings: Settings, given: LiveInput, console: Console) -> dict[str, Any]:
    """Returns the online figures by their names in `DemoSummary`.

    If the log holds events already, nothing is streamed, because the held-back events may be among them.
    """
    bundle, newcomer = given.bundle, given.newcomer
    with contextlib.closing(settings.open_store()) as store, contextlib.closing(settings.open_log()) as log:
        fill_store(store, bundle)
        stream = StreamService(bundle, StreamConnections.shared(log, store, topics=settings.topics))
        with stream, http_server(bundle, store) as (client, service):
            online = _Online(stream, log, settings.topics, client, service)
            is_new = not any(log.end_offsets(settings.topics.events).values())
            if not is_new:
                console.print(Text(_STREAMED, "yellow"))
            # Held-back events may decide who likes an item. The ranker must not have read them.
            plan = given.plan if given.plan and (is_new or not given.plan.before_events) else None
            figures: dict[str, Any] = {"new_items": _rank_new_items(online, plan, console) if plan else None}
            pair = _counted_pair(given)
            before = _rates(service, pair) if pair else {}
            if newcomer:
                figures["top_before"] = _top(client, newcomer.user, given.titles)
            if is_new:
                figures |= _stream(online, given, console)
            if pair and before and is_new:
                item = given.titles.get(pair[1], pair[1])
                figures["counted"] = CountedRates(pair[0], item, before, _rates(service, pair))
            if newcomer:
                figures["serving_ms"] = _measure(client, bundle.users["user_id"].to_list(), given.items, console)
            if newcomer and is_new:
                figures["top_after"] = _top(client, newcomer.user, given.titles)
    return figures


def _counted_pair(given: LiveInput) -> tuple[str, str] | None:
    """Returns the user and the item with the most held-back events; None for events without users or items."""
    events = given.bundle.dataset.events
    if events.user is None or events.item is None or not given.held_back:
        return None
    rows = [json.loads(message) for message in given.held_back]
    user, item = (Counter(str(row[name]) for row in rows).most_common(1)[0][0] for name in (events.user, events.item))
    return user, item


def _rates(service: RankService, pair: tuple[str, str]) -> dict[str, tuple[float, float]]:
    """Returns the rates of all time that a ranking reads, and the events behind them, by the entities they are by."""
    found, _ = service.aggregates(*pair)
    return {
        " × ".join(one.by): (one.value, one.count)
        for one in found
        if one.kind == "rate" and one.horizon == "all" and one.value is not None and one.count is not None
    }


@dataclass(frozen=True)
class _Online:
    """Running parts: the stream and its log, a server, and a client of the server."""

    stream: StreamService
    log: EventLog
    topics: Topics
    client: httpx.Client
    service: RankService


def _stream(online: _Online, given: LiveInput, console: Console) -> dict[str, Any]:
    """Streams events at once, then live with the newcomer between them; returns rate, freshness and the newcomer."""
    live = min(_LIVE, len(given.held_back) // _LIVE_SHARE)
    bulk = given.held_back[: len(given.held_back) - live][:_BULK]
    with console.status(f"streaming {len(bulk):,} held-back events"):
        figures = _stream_bulk(online, bulk)
    added, newcomer = None, given.newcomer
    online.stream.metrics.ages_ms.clear()
    with console.status("streaming live, one event after another"), _running(online.stream):
        _send_live(online.log, online.topics.events, given.held_back[len(bulk) : len(bulk) + live])
        if newcomer:
            added = _add(online, newcomer, given.items)
    if newcomer and added:
        near = online.service.similar(newcomer.item, 5)
        added = replace(added, neighbours=[(item, given.titles.get(item, item), score) for item, score in near])
    return {"stream": figures, "freshness_ms": list(online.stream.metrics.ages_ms), "new_item": added}


def _stream_bulk(online: _Online, bulk: Sequence[bytes]) -> StreamFigures:
    online.log.append(online.topics.events, [(None, message) for message in bulk])
    online.stream.trainer.totals = Totals()
    start = time.perf_counter()
    online.stream.drain()
    seconds = time.perf_counter() - start
    totals = online.stream.trainer.totals
    rate = totals.messages / max(seconds, 1e-9)
    return StreamFigures(totals.events, totals.items, totals.bad, seconds, rate, totals.batches)


def _rank_new_items(online: _Online, plan: NewItemPlan, console: Console) -> NewItemRanks:
    with console.status(f"ranking {len(plan.with_content)} new items for {len(plan.users)} users"):
        with (
            contextlib.closing(Client(str(online.client.base_url))) as client,
            new_items(online.log, online.stream, online.topics, plan),
        ):
            return measure_ranks(client, plan)


@contextlib.contextmanager
def http_server(bundle: Bundle, store: OnlineStore) -> Iterator[tuple[httpx.Client, RankService]]:
    """Serves a bundle over HTTP in a thread, on a free port; yields a client of it and the service behind it."""
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
    """Runs the stream in a thread; returns when all messages that were sent are in the store."""
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


def _send_live(log: EventLog, topic: str, messages: Sequence[bytes]) -> None:
    """Sends at a steady rate, in groups of ten."""
    start = time.perf_counter()
    for sent in range(0, len(messages), 10):
        ahead = sent / _LIVE_RATE - (time.perf_counter() - start)
        if ahead > 0:
            time.sleep(ahead)
        log.append(topic, [(None, message) for message in messages[sent : sent + 10]])


def _add(online: _Online, newcomer: Newcomer, items: list[str]) -> NewItem:
    """Adds the new item, waits until a ranker knows it, and ranks it among the catalogue (at most 2,000 items)."""
    start = time.perf_counter()
    online.log.append(online.topics.items, [(None, encode_row(newcomer.message))])
    while _rank(online.client, newcomer.user, candidates=[newcomer.item])["unknown_items"]:
        if time.perf_counter() - start > _READY_S:
            raise TimeoutError(f"item {newcomer.item} was not rankable within {_READY_S:.0f} s")
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    others = [name for name in items if name != newcomer.item]
    if len(others) >= MAX_CANDIDATES:
        drawn = np.random.default_rng(0).choice(len(others), size=MAX_CANDIDATES - 1, replace=False)
        others = [others[index] for index in drawn]
    answer = _rank(online.client, newcomer.user, k=MAX_CANDIDATES, candidates=[newcomer.item, *others])
    ranked = [item["item"] for item in answer["items"]]
    return NewItem(
        id=newcomer.item,
        title=newcomer.title,
        user=newcomer.user,
        rank=ranked.index(newcomer.item) + 1,
        of=len(ranked),
        seconds_to_rankable=seconds,
    )


def _measure(client: httpx.Client, users: list[str], items: list[str], console: Console) -> list[float]:
    """Returns milliseconds of /v1/rank over HTTP, by one client, a hundred candidates a request, after a warm-up."""
    rng = np.random.default_rng(0)
    latencies_ms = []
    with console.status("measuring /v1/rank"):
        for number in range(_REQUESTS + _WARMUP):
            drawn = rng.choice(len(items), size=min(_CANDIDATES, len(items)), replace=False)
            user = users[int(rng.integers(len(users)))]
            start = time.perf_counter()
            _rank(client, user, candidates=[items[index] for index in drawn])
            if number >= _WARMUP:
                latencies_ms.append((time.perf_counter() - start) * 1_000)
    return latencies_ms


def _rank(client: httpx.Client, user: str, *, k: int = 10, candidates: list[str] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {"user": user, "k": k} | ({"candidates": candidates} if candidates else {})
    response = client.post("/v1/rank", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def _top(client: httpx.Client, user: str, titles: Mapping[str, str]) -> list[tuple[str, str, float]]:
    ranked = _rank(client, user)["items"]
    return [(item["item"], titles.get(item["item"], item["item"]), item["score"]) for item in ranked]
