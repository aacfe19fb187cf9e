"""`freshness`: measures the age of an event when it can be read, in Redis and in a mirror, under steady load.

Producer, stream and reader are processes of their own, on a real broker and a real Redis server. Ages are counted from
the moment an event was due, so a late producer makes them larger and not smaller. An event can be read in Redis when
the store's position is past its delta, which a poll of the store sees, and in a mirror when the mirror has folded it.

The control is measured right after, without a stream: bare transactions of the same client and size, each read by a
reader of committed messages, and with a plain Redis write of as many values behind it.

New items are sent after the counted time; the clock runs until a server ranks them.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle import delta
from models.bundle.delta import Delta
from serving.ranking.mirror import Mirror
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.writer import position_of
from streaming.log.protocol import EventLog, ends_of
from tessera.bench.harness.floor import plain_values, transaction_ms
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, await_deltas, live_data, servers, streaming
from tessera.bench.harness.result import BenchResult, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.online.stream_rates import settings_of_run
from tessera.settings import Settings
from tessera.terminal import one_thread

RATE = 2_000
# Events are counted that are due after the first seconds and before the new items.
_WARM_S, SECONDS, _ITEMS_S = 3.0, 20.0, 5.0
_NEW_ITEMS = 5
_WAIT_MS = 20
# How often a server looks for new items; see `serving.api.app.create_app`.
_REFRESH_S = 0.25
_LOOK_S = 0.002


@dataclass
class _Seen:
    """Sightings of the readers.

    Attributes:
        folds: Time in Unix milliseconds and offset of each delta that the mirror has folded, and its first and last
            event.
        writes: Times in Unix milliseconds and the store's position in the deltas at that time.
        commits_ms: Times at which the deltas were appended.
        sizes: Bytes, and number of rows and records, of each delta.
    """

    folds: list[tuple[float, int, int, int]] = field(default_factory=list)
    writes: list[tuple[float, int]] = field(default_factory=list)
    commits_ms: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, now_ms: float, offset: int, change: Delta, events: str) -> None:
        """Adds a folded delta. A delta without events counts for none."""
        for source in change.sources:
            if source.topic == events:
                self.folds.append((now_ms, offset, source.first, source.last))

    def ages_ms(self, due_ms: NDArray[np.float64], first: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns the ages of events in the mirror and in the store, NaN for an event that was not seen.

        Args:
            due_ms: (E,) times at which the events were due, Unix milliseconds.
            first: Offset of the first event. The others follow without gaps.
        """
        mirror, store = np.full(len(due_ms), np.nan), np.full(len(due_ms), np.nan)
        times, positions = np.array(self.writes).T
        for at, offset, low, high in self.folds:
            events = slice(max(0, low - first), max(0, high + 1 - first))
            mirror[events] = at - due_ms[events]
            place = int(np.searchsorted(positions, offset, side="right"))
            store[events] = (times[place] if place < len(times) else np.nan) - due_ms[events]
        return mirror, store


def freshness(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures `seeds` runs; claims are judged from the worst."""
    settings = servers("freshness")
    one_thread()
    data = live_data(dataset, out, console)
    rows = measured_rows()
    for seed in range(seeds):
        with console.status(f"seed {seed}: {RATE:,} events a second for {SECONDS:.0f} s"):
            rows.append(_run(settings_of_run(settings, out, f"fresh-{seed}"), data, dataset, out, seed))
    claims = []
    for place, control in (("redis", "bare_redis_ms"), ("mirror", "bare_ms")):
        bounds = [row["interval_ms"] / 2 + 1.5 * row[control] for row in rows]
        over = [row[f"{place}_p50_ms"] / bound for row, bound in zip(rows, bounds, strict=True)]
        name = "half the commit interval and 1.5 bare transactions"
        claims.append(at_most(f"{place} p50 over {name}", max(over), 1))
        tail = max(row[f"{place}_p99_ms"] / row[f"{place}_p50_ms"] for row in rows)
        claims.append(at_most(f"{place} p99 over its p50", tail, 3))
    if dataset.items is not None:
        refreshes = max(row["new_item_s"] for row in rows) / _REFRESH_S
        claims.append(at_most("new item rankable, slowest, in refreshes of a server", refreshes, 4))
    return BenchResult("freshness", dataset.name, seeds, rows, claims)


def _run(settings: Settings, data: LiveData, dataset: Dataset, out: Path, seed: int) -> dict[str, Any]:
    bundle = data.bundle
    file, report = out / "messages.jsonl", out / f"stream-{seed}.json"
    file.write_bytes(b"\n".join(data.messages[seed:] + data.messages[:seed]))
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        store.drop(bundle.id)
        log.create_topics(settings.topics.partitions())
        fill_store(store, bundle, storage=settings.storage)
        service = RankService(bundle, store)
        options = ("--batch", "256", "--wait-ms", str(_WAIT_MS), "--lateness-s", str(NEVER_LATE_S))
        with streaming(settings, bundle, *options, report=report):
            log.append(settings.topics.events, [(None, data.messages[0])])
            await_deltas(log, settings.topics.deltas, above=0)
            (first,) = ends_of(log, settings.topics.events)
            with _readers(settings, data) as seen:
                environment = os.environ | {"TESSERA_TOPIC_PREFIX": settings.topics.prefix}
                seconds = _WARM_S + SECONDS + _ITEMS_S
                command = [sys.executable, "-m", "tessera.bench.harness.pace", str(file), str(RATE), str(seconds)]
                with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as producer:
                    time.sleep(_WARM_S + SECONDS + 1)
                    items = _items(settings, log, service, dataset) if dataset.items is not None else []
                    sent = producer.communicate()[0].split()
                time.sleep(1)
        store.drop(bundle.id)
        bare = _bare(settings, log, seen)
    due_ms = float(sent[2]) + 1_000 * (np.arange(int(sent[0])) + 1) / RATE
    ages = seen.ages_ms(due_ms, first)
    return (
        {"seed": seed}
        | _figures(seen, ages)
        | bare
        | {
            "sender_late_most_ms": float(sent[1]),
            "new_item_s": max(items, default=float("nan")),
        }
    )


def _figures(seen: _Seen, ages: tuple[NDArray[np.float64], NDArray[np.float64]]) -> dict[str, Any]:
    """Returns the commit interval, and the percentiles of the ages of the counted events."""
    low, high = int(_WARM_S * RATE), int((_WARM_S + SECONDS) * RATE)
    figures: dict[str, Any] = {"interval_ms": float(np.mean(np.diff(seen.commits_ms)))}
    for place, found in zip(("mirror", "redis"), ages, strict=True):
        counted = found[low:high]
        if np.isnan(counted).any():
            raise TesseraError(f"{int(np.isnan(counted).sum())} events were not readable in {place} at the end")
        p50, p99, most = np.percentile(counted, [50, 99, 100])
        figures |= {f"{place}_p50_ms": float(p50), f"{place}_p99_ms": float(p99), f"{place}_most_ms": float(most)}
        figures[f"{place}_p99_with_items_ms"] = float(np.nanpercentile(found[high:], 99))
    return figures


def _bare(settings: Settings, log: EventLog, seen: _Seen) -> dict[str, float]:
    """Returns the round trips of bare transactions of the deltas' size, alone and with a Redis write behind."""
    size, values = (int(value) for value in np.median(np.array(seen.sizes), axis=0))
    alone = transaction_ms(log, f"{settings.topics.prefix}bare", size_bytes=size)
    with plain_values(settings.redis, rows=values, size_bytes=4 * (size // max(1, values) // 4)) as plain:
        rows = np.arange(values)
        behind = transaction_ms(
            log, f"{settings.topics.prefix}bare-redis", size_bytes=size, behind=lambda: plain.write(rows)
        )
    return {"delta_bytes": size, "bare_ms": alone[0], "bare_p99_ms": alone[1], "bare_redis_ms": behind[0]}


@contextlib.contextmanager
def _readers(settings: Settings, data: LiveData) -> Iterator[_Seen]:
    """Reads mirror and store from two threads while the body runs. Yields what they see."""
    seen, stop = _Seen(), threading.Event()
    threads = [threading.Thread(target=work, args=(settings, data, seen, stop)) for work in (_follow, _look)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _follow(settings: Settings, data: LiveData, seen: _Seen, stop: threading.Event) -> None:
    bundle = data.bundle
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        mirror = Mirror(store, bundle.id, bundle.schema.aggregates)
        follower = log.follow(settings.topics.deltas, ends_of(log, settings.topics.deltas))
        with contextlib.closing(follower):
            while not stop.is_set():
                for message in follower.poll(256, 0.1):
                    change = delta.decode(message.value)
                    mirror.fold(change)
                    seen.add(1_000 * time.time(), message.offset, change, settings.topics.events)
                    if change.sources:
                        seen.commits_ms.append(message.timestamp_ms)
                    seen.sizes.append((len(message.value), len(change.rows) // 4 + len(change.records)))


def _look(settings: Settings, data: LiveData, seen: _Seen, stop: threading.Event) -> None:
    with contextlib.closing(settings.open_store()) as store:
        while not stop.is_set():
            position = position_of(store, data.bundle.id, settings.topics.deltas)
            now = 1_000 * time.time()
            if position and (not seen.writes or position[0] > seen.writes[-1][1]):
                seen.writes.append((now, position[0]))
            time.sleep(_LOOK_S)


def _items(settings: Settings, log: EventLog, service: RankService, dataset: Dataset) -> list[float]:
    """Returns the seconds until each of some new items is ranked, by a server with Tessera's refresh interval."""
    assert dataset.items is not None
    waits = []
    text = dict.fromkeys(dataset.items.text, "a new arrival in the catalogue")
    for number in range(_NEW_ITEMS):
        name = f"new-{os.getpid()}-{number}"
        log.append(settings.topics.items, [(None, msgspec.json.encode(text | {dataset.items.id: name}))])
        began = time.monotonic()
        _until_ranked(name, service)
        waits.append(time.monotonic() - began)
    return waits


def _until_ranked(name: str, service: RankService) -> None:
    give_up = time.monotonic() + 30
    while service.rank("anyone", [name], 1).unknown_items:
        if time.monotonic() > give_up:
            raise TesseraError("a new item was not rankable within 30 s")
        time.sleep(_REFRESH_S)
        service.refresh()
