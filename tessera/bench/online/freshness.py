"""`freshness`: measures the age of an event when it can be read, in Redis and in a mirror, under steady load.

Producer, stream and reader are processes of their own, on a real broker and a real Redis server. Ages are counted from
the moment a message was appended; `sender_late_most_ms` says how far the producer fell behind its rate. A new item
is sent now and then; the clock runs until a server ranks it.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle import delta
from serving.ranking.mirror import Mirror
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from streaming.log.protocol import EventLog, ends_of
from tessera.bench.harness.floor import round_trip_ms
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, await_deltas, live_data, servers, streaming
from tessera.bench.harness.result import BenchResult, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.online.stream_rates import settings_of_run
from tessera.settings import Settings
from tessera.terminal import one_thread

RATE = 2_000
SECONDS = 20.0
_NEW_ITEMS = 5
_WAIT_MS = 20
# How often a server looks for new items; see `serving.api.app.create_app`.
_REFRESH_S = 0.25


def freshness(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures `seeds` runs; claims are judged from the worst."""
    settings = servers("freshness")
    one_thread()
    data = live_data(dataset, out, console)
    rows = measured_rows()
    for seed in range(seeds):
        with console.status(f"seed {seed}: {RATE:,} events a second for {SECONDS:.0f} s"):
            rows.append(_run(settings_of_run(settings, out, f"fresh-{seed}"), data, dataset, out, seed))
    claims = [
        at_most(
            f"{place} {name} over a message's round trip through the log and the batch's wait",
            max(row[f"{place}_{name}_ms"] / (row["floor_ms"] + _WAIT_MS) for row in rows),
            target,
        )
        for place in ("redis", "mirror")
        for name, target in (("p50", 4), ("p99", 12))
    ]
    if dataset.items is not None:
        refreshes = max(row["new_item_s"] for row in rows) / _REFRESH_S
        claims.append(at_most("new item rankable, slowest, in refreshes of a server", refreshes, 4))
    return BenchResult("freshness", dataset.name, seeds, rows, claims)


def _run(settings: Settings, data: LiveData, dataset: Dataset, out: Path, seed: int) -> dict[str, Any]:
    bundle = data.bundle
    file, report = out / "messages.jsonl", out / f"stream-{seed}.json"
    file.write_bytes(b"\n".join(data.messages))
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        store.drop(bundle.id)
        log.create_topics(settings.topics.partitions())
        fill_store(store, bundle, storage=settings.storage)
        mirror, service = Mirror(store, bundle.id, bundle.schema.aggregates), RankService(bundle, store)
        options = ("--batch", "256", "--wait-ms", str(_WAIT_MS), "--lateness-s", str(NEVER_LATE_S))
        with streaming(settings, bundle, *options, report=report):
            log.append(settings.topics.events, [(None, data.messages[0])])
            await_deltas(log, settings.topics.deltas, above=0)
            stop, ages = threading.Event(), list[float]()
            follower = threading.Thread(target=_follow, args=(settings, mirror, ages, stop))
            follower.start()
            environment = os.environ | {"TESSERA_TOPIC_PREFIX": settings.topics.prefix}
            command = [sys.executable, "-m", "tessera.bench.harness.pace", str(file), str(RATE), str(SECONDS)]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as producer:
                time.sleep(SECONDS / 4)
                items = _items(settings, log, service, dataset) if dataset.items is not None else []
                sent = producer.communicate()[0].split()
            time.sleep(1)
            stop.set()
            follower.join()
        store.drop(bundle.id)
        floor = round_trip_ms(log, f"{settings.topics.prefix}floor")
    document = msgspec.json.decode(report.read_bytes(), type=dict[str, Any])
    p50, p99 = np.percentile(np.array(ages), [50, 99])
    return {
        "seed": seed,
        "floor_ms": floor,
        "events": document["events"],
        "redis_p50_ms": document["freshness_ms"][0],
        "redis_p99_ms": document["freshness_ms"][1],
        "mirror_p50_ms": float(p50),
        "mirror_p99_ms": float(p99),
        "sender_late_most_ms": float(sent[1]),
        "new_item_s": max(items, default=float("nan")),
    }


def _follow(settings: Settings, mirror: Mirror, ages: list[float], stop: threading.Event) -> None:
    with contextlib.closing(settings.open_log()) as log:
        follower = log.follow(settings.topics.deltas, ends_of(log, settings.topics.deltas))
        with contextlib.closing(follower):
            while not stop.is_set():
                for message in follower.poll(256, 0.1):
                    change = delta.decode(message.value)
                    mirror.fold(change)
                    now = time.time() * 1_000
                    ages += [now - at for at in change.times_ms]


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
