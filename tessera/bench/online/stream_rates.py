"""`stream`: measures the rates of the stream, part by part, on a real broker and a real Redis server.

- loop: decode, shape, look up, step, read back and pack, without the log and the store, at three batch sizes. Floor:
  the forward and backward pass of the same batches alone.
- end to end: messages that wait in Kafka → step → deltas in transactions → pages in Redis, trainer and writer as
  `tessera stream` runs them; events a second, transactions a second and how long one takes.
- pages: ordered writes of random rows, 1,000 a call, 16 dimensions in float16, and the bytes that a row takes. Floor:
  one MSET of plain values a call.
- race: two writers of the same rows under a barrier, one a step behind; how many rows end on the older value. Feast
  runs the same schedule in an environment of its own.
"""

import contextlib
import json
import multiprocessing
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset
from models.bundle import delta
from models.table.batch import Batch
from serving.store.redis.store import RedisStore
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.metrics import StreamMetrics
from streaming.step import Step
from streaming.step_result import StepResult
from streaming.trainer import TrainerOptions
from tessera.bench.harness.floor import plain_values
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, live_data, servers
from tessera.bench.harness.needs import FEAST, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tessera.terminal import one_thread

_BATCHES = (64, 256, 1_024)
_LOOP_EVENTS, _WARM = 40_000, 4_096
_PAGE_ROWS, _DIM, _CALL, _PAGE_WRITES = 200_000, 16, 1_000, 200
_END_TO_END = 30_000
_RACE_KEYS, _RACE_ROUNDS = 200, 100


def stream(dataset: Dataset, out: Path, *, seeds: int, console: Console, peers: Peers) -> BenchResult:
    """Measures each part `seeds` times; claims are judged from the medians.

    Args:
        peers: may lack Feast; then the race is Tessera's alone.
    """
    settings = servers("stream")
    one_thread()
    data = live_data(dataset, out, console)
    rows = measured_rows()
    for seed in range(seeds):
        with console.status(f"seed {seed}: the loop"):
            rows += (_loop(data, batch, seed) for batch in _BATCHES)
        with console.status(f"seed {seed}: end to end"):
            rows += (_end_to_end(settings, data, batch, seed, out) for batch in (64, 256))
        with console.status(f"seed {seed}: pages"):
            rows.append(_pages(settings, seed))
    with console.status("two writers racing"):
        rows.append(_race(settings))
        if (python := peers.python(FEAST)) is not None:
            rows.append(_feast_race(settings, out, python))
    rows += peers.rows("part")
    return BenchResult("stream", dataset.name, seeds, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    def median(part: str, column: str, **where: Any) -> float:
        values = [r[column] for r in rows if r["part"] == part and all(r.get(k) == v for k, v in where.items())]
        return float(np.median(values))

    of_gradient = median("loop", "events_per_s", batch=256) / median("loop", "gradient_events_per_s", batch=256)
    pages = median("pages", "rows_per_s") / median("pages", "floor_rows_per_s")
    race = {row["part"]: row for row in rows if row["part"].startswith("race")}
    return [
        at_least("loop over the gradient alone, events a second at batch 256", of_gradient, 0.5),
        *(
            at_least(
                f"end to end over the loop, events a second at batch {batch}",
                median("end to end", "events_per_s", batch=batch) / median("loop", "events_per_s", batch=batch),
                0.2,
            )
            for batch in (64, 256)
        ),
        at_least("pages over MSET of plain values, rows a second", pages, 0.4),
        at_most("pages, bytes a row", median("pages", "bytes_per_row"), 42),
        at_most("race, stale rows of 20,000", race["race: tessera"]["stale"], 0),
    ]


class _Recorded(Step):
    """Step that keeps its training batches, to time their gradients alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.batches: list[Batch] = []

    def _train_whole(self, batch: Batch, outcome: StepResult) -> NDArray[np.int64]:
        self.batches.append(batch)
        return super()._train_whole(batch, outcome)

    def gradient_s(self) -> float:
        """Returns the seconds of the forward and backward pass of all batches; the floor of the loop."""
        began = time.perf_counter()
        for batch in self.batches:
            pooled = self.ranker.table(batch)
            pooled.backward(self._gradient(pooled.detach(), batch, self.bundle.manifest.training.batch)[1])
        return time.perf_counter() - began


def _loop(data: LiveData, batch: int, seed: int) -> dict[str, Any]:
    step = _Recorded(data.bundle, Topics(), lateness_s=NEVER_LATE_S)
    now = time.time_ns() // 1_000_000
    count = len(data.messages)
    sent = [Message("events", 0, n, None, data.messages[n % count], now) for n in range(_WARM + _LOOP_EVENTS)]
    for start in range(0, _WARM, batch):
        step.apply(sent[start : start + batch])
    step.batches.clear()
    packed = 0
    began = time.perf_counter()
    for start in range(_WARM, len(sent), batch):
        packed += sum(len(delta.encode(change)) for change in step.apply(sent[start : start + batch]).deltas)
    seconds = time.perf_counter() - began
    schema = data.bundle.schema
    return {
        "part": "loop",
        "seed": seed,
        "batch": batch,
        "events_per_s": (len(sent) - _WARM) / seconds,
        "gradient_events_per_s": (len(sent) - _WARM) / step.gradient_s(),
        "lookups": len(schema.keys),
        "delta_bytes_per_event": packed / (len(sent) - _WARM),
    }


def _end_to_end(settings: Settings, data: LiveData, batch: int, seed: int, out: Path) -> dict[str, Any]:
    bundle = data.bundle
    own = settings_of_run(settings, out, f"e2e-{batch}-{seed}")
    with contextlib.closing(own.open_log()) as log, contextlib.closing(own.open_store()) as store:
        store.drop(bundle.id)
        log.create_topics(own.topics.partitions())
        count = len(data.messages)
        sent = [(None, data.messages[n % count]) for n in range(_END_TO_END)]
        log.append(own.topics.events, sent)
        gauges, stop = StreamMetrics(), threading.Event()
        times: list[tuple[float, int]] = []

        def tick() -> None:
            times.append((time.perf_counter(), gauges.made_visible))
            if gauges.made_visible >= _END_TO_END:
                stop.set()

        options = TrainerOptions(batch=batch, lateness_s=NEVER_LATE_S, snapshot_every_s=3_600)
        StreamService(bundle, StreamConnections.of(own), options, metrics=gauges).run(stop, on_tick=tick)
        store.drop(bundle.id)
    first = next(place for place, (_, seen) in enumerate(times) if seen)
    seconds = times[-1][0] - times[first][0]
    p50, p99 = np.percentile(np.array(gauges.transaction_ms), [50, 99])
    return {
        "part": "end to end",
        "seed": seed,
        "batch": batch,
        "events_per_s": (times[-1][1] - times[first][1]) / seconds,
        "transactions_per_s": (times[-1][1] - times[first][1]) / batch / seconds,
        "transaction_p50_ms": float(p50),
        "transaction_p99_ms": float(p99),
    }


def settings_of_run(settings: Settings, out: Path, name: str) -> Settings:
    """Returns the same servers, with topics and a home of one run alone."""
    from dataclasses import replace

    prefix = f"{settings.topics.prefix}{name}-"
    return replace(settings, topics=Topics(prefix), home=(out / "homes" / prefix).absolute())


def _pages(settings: Settings, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    bundle = f"bench-pages-{os.getpid()}"
    with contextlib.closing(RedisStore(settings.redis)) as store:
        store.drop(bundle)
        store.create_table(bundle, rows=_PAGE_ROWS, dim=_DIM, storage="float16")
        store.load_rows(bundle, rng.normal(size=(_PAGE_ROWS, _DIM)).astype(np.float32), seq=0)
        calls = [rng.choice(_PAGE_ROWS, _CALL, replace=False) for _ in range(_PAGE_WRITES)]
        vectors = rng.normal(size=(_CALL, _DIM)).astype(np.float32)
        began = time.perf_counter()
        for number, rows in enumerate(calls, start=1):
            store.write_rows(bundle, rows, np.full(_CALL, number), vectors)
        seconds = time.perf_counter() - began
        size = store.bytes_per_row(bundle)
        store.drop(bundle)
    with plain_values(settings.redis, rows=_PAGE_ROWS, size_bytes=2 * _DIM) as plain:
        began = time.perf_counter()
        for rows in calls:
            plain.write(rows)
        floor = time.perf_counter() - began
    written = _CALL * _PAGE_WRITES
    row = {"part": "pages", "seed": seed, "rows_per_s": written / seconds, "floor_rows_per_s": written / floor}
    return row | {"bytes_per_row": size}


def race_writer(which: int, address: str, bundle: str, barrier: Any, stale: Any) -> None:
    """One of two writers; the writer with `which` 1 is a step ahead, and counts rows that end on the older value."""
    with contextlib.closing(RedisStore(address)) as store:
        rows = np.arange(_RACE_KEYS)
        for number in range(_RACE_ROUNDS):
            seq = 2 * number + 1 + which
            barrier.wait()
            store.write_rows(bundle, rows, np.full(len(rows), seq), np.full((len(rows), _DIM), seq, dtype=np.float32))
            barrier.wait()
            if which == 1:
                stale.value += int((store.read_rows(bundle, rows)[:, 0] != seq).sum())
            barrier.wait()


def _race(settings: Settings) -> dict[str, Any]:
    bundle = f"bench-race-{os.getpid()}"
    context = multiprocessing.get_context("spawn")
    barrier, stale = context.Barrier(2), context.Value("l", 0)
    with contextlib.closing(RedisStore(settings.redis)) as store:
        store.drop(bundle)
        store.create_table(bundle, rows=_RACE_KEYS, dim=_DIM, storage="float16")
        both = [
            context.Process(target=race_writer, args=(which, settings.redis, bundle, barrier, stale))
            for which in (0, 1)
        ]
        for process in both:
            process.start()
        for process in both:
            process.join()
        store.drop(bundle)
    if any(process.exitcode for process in both):
        raise RuntimeError("a writer of the race ended in an error; see above")
    return {"part": "race: tessera", "stale": stale.value, "of": _RACE_KEYS * _RACE_ROUNDS}


def _feast_race(settings: Settings, out: Path, python: Path) -> dict[str, Any]:
    repository = out / "feast-repo"
    repository.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(PEER_FOLDER / "feast_race.py"), str(repository), settings.redis]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"part": "race: Feast", **json.loads(done.stdout.splitlines()[-1])}
