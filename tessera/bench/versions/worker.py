"""Measures one version of Tessera: `python worker.py PART OUT BATCH SEED`, run by the version's own Python.

The bench `streaming` runs this file with the Python of each version, so it names only what both have. It prints one
JSON object. `python worker.py prepare OUT DESCRIPTOR [OVERRIDE…]` first does the offline job.

- step: CPU seconds of one thread for messages that become deltas in memory.
- items: the same for messages about items whose text did not change; beside it, without the seconds of the encoder.
- pipeline: seconds until all messages that wait in Kafka are visible in Redis.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "MKL_NUM_THREADS": "1"}
NEVER_LATE_S = 1e9
_WARM, _STEP, _PIPELINE, _ITEMS = 5_120, 20_480, 30_000, 1_024


def named(*places: str) -> Any:
    """Returns the first of some objects, `module:name`, that this version has."""
    for place in places:
        module, _, name = place.partition(":")
        with contextlib.suppress(ImportError, AttributeError):
            return getattr(importlib.import_module(module), name)
    raise ImportError(f"this version has none of {', '.join(places)}")


class LivePart(NamedTuple):
    """Bundle of the version, and messages that the bundle has not seen, in order of time."""

    bundle: Any
    messages: list[bytes]


def prepare(out: Path, descriptor: Path, overrides: list[str]) -> None:
    """Makes a bundle and its messages."""
    from rich.console import Console

    load = named("features.dataset.descriptor:load_dataset", "features.dataset:load_dataset")
    make = named("tessera.bench.harness.live_data:live_data", "tessera.bench.live_data:live_data")
    data = make(load(descriptor), out, Console(quiet=True), *([overrides] if overrides else []))
    (out / "messages.jsonl").write_bytes(b"\n".join(data.messages))
    table = named("features.dataset.tables:load_items", "features.table:load_items")(load(descriptor)).frame
    rows = named("features.jobs.messages:encode_rows")(table)
    (out / "items.jsonl").write_bytes(b"\n".join(rows))
    (out / "bundle.txt").write_text(str(Path(data.bundle.directory).absolute()))


def prepared(out: Path) -> LivePart:
    """Returns what `prepare` made."""
    load = named("models.bundle.bundle:load_bundle", "models.bundle:load_bundle")
    return LivePart(load(Path((out / "bundle.txt").read_text())), (out / "messages.jsonl").read_bytes().splitlines())


def messages_of(topic: str, values: list[bytes], first: int = 0) -> list[Any]:
    """Returns messages of one partition, as a log returns them."""
    kind = named("streaming.log.protocol:Message", "streaming.log:Message")
    now = time.time_ns() // 1_000_000
    return [kind(topic, 0, first + number, None, value, now) for number, value in enumerate(values)]


def applied(step: Any, messages: list[Any], batch: int) -> int:
    """Applies messages in batches. Returns the size of their deltas in bytes."""
    encode = named("models.bundle.delta:encode", "models.delta:encode")
    size = 0
    for start in range(0, len(messages), batch):
        outcome = step.apply(messages[start : start + batch])
        payloads = getattr(outcome, "payloads", None) or [encode(change) for change in outcome.deltas]
        size += sum(map(len, payloads))
    return size


def new_step(bundle: Any) -> Any:
    """Returns a step of the bundle, at which no event is late."""
    return named("streaming.step:Step")(bundle, topics(), lateness_s=NEVER_LATE_S)


def topics(*prefix: str) -> Any:
    """Returns the names of topics."""
    return named("streaming.log.topics:Topics", "streaming.topic:Topics")(*prefix)


def measured_step(data: LivePart, batch: int, seed: int) -> dict[str, float]:
    """Measures messages that become deltas. The seed decides where in the messages the run begins."""
    lines = data.messages
    start = random.Random(seed).randrange(len(lines))
    values = [lines[(start + number) % len(lines)] for number in range(_WARM + _STEP)]
    step, sent = new_step(data.bundle), messages_of("events", values)
    applied(step, sent[:_WARM], batch)
    # Objects of the bundle are not searched for garbage while events are measured, in both versions.
    gc.collect()
    gc.freeze()
    began = time.process_time()
    size = applied(step, sent[_WARM:], batch)
    seconds = time.process_time() - began
    return {"events_per_cpu_s": _STEP / seconds, "delta_bytes_per_event": size / _STEP}


def measured_items(data: LivePart, batch: int, seed: int, out: Path) -> dict[str, float]:
    """Measures messages about items whose text the stream has read before: a new price, not a new description."""
    spent = encoding_seconds(data.bundle)
    rows = (out / "items.jsonl").read_bytes().splitlines()
    random.Random(seed).shuffle(rows)
    rows = rows[:_ITEMS]
    step, sent = new_step(data.bundle), messages_of("items", 2 * rows)
    applied(step, sent[: len(rows)], batch)
    gc.collect()
    gc.freeze()
    spent[0], began = 0.0, time.process_time()
    applied(step, sent[len(rows) :], batch)
    whole = time.process_time() - began
    return {"items_per_cpu_s": len(rows) / whole, "items_beside_encoding_per_cpu_s": len(rows) / (whole - spent[0])}


def encoding_seconds(bundle: Any) -> list[float]:
    """Returns a list of one number, to which the CPU seconds of the bundle's encoder and codebook are added."""
    spent = [0.0]

    def timed(part: Any) -> None:
        encode = type(part).encode

        def measured(*arguments: Any) -> Any:
            began = time.process_time()
            try:
                return encode(*arguments)
            finally:
                spent[0] += time.process_time() - began

        type(part).encode = measured

    for part in (bundle.encoder, bundle.codebook):
        timed(part)
    return spent


def measured_pipeline(data: LivePart, batch: int, seed: int, out: Path) -> dict[str, float]:
    """Measures messages that wait in Kafka until their rows are in Redis."""
    from dataclasses import replace

    settings = named("tessera.settings:Settings").from_environment()
    prefix = f"bench-{os.getpid()}-{time.time_ns() % 10**9}-"
    settings = replace(settings, topics=topics(prefix), home=(out / "homes" / prefix).absolute(), storage="float16")
    gauges = named("streaming.metrics:StreamMetrics", "tessera.gauges:Gauges")()
    stop, times = threading.Event(), list[tuple[float, float, int]]()

    def tick() -> None:
        times.append((time.perf_counter(), time.process_time(), gauges.made_visible))
        if gauges.made_visible >= _PIPELINE or gauges.counts["outages"]:
            stop.set()

    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        store.drop(data.bundle.id)
        log.create_topics(settings.topics.partitions())
        start, lines = random.Random(seed).randrange(len(data.messages)), data.messages
        log.append(settings.topics.events, [(None, lines[(start + n) % len(lines)]) for n in range(_PIPELINE)])
        options = named("streaming.trainer:TrainerOptions")(
            batch=batch, lateness_s=NEVER_LATE_S, snapshot_every_s=3_600
        )
        service(settings, data.bundle, options, gauges).run(stop, on_tick=tick)
        store.drop(data.bundle.id)
    if gauges.counts["outages"]:
        # A part that starts again counts some messages never, so the run has no figure and would not end.
        raise RuntimeError(f"a part of the stream started again, measure on a less busy machine: {gauges.last_error}")
    first = next(place for place, (_, _, seen) in enumerate(times) if seen)
    (began, spent, seen), (ended, total, all_seen) = times[first], times[-1]
    events = all_seen - seen
    transactions = sorted(gauges.transaction_ms)
    return {
        "events_per_s": events / (ended - began),
        "events_per_cpu_s": events / (total - spent),
        "transaction_p50_ms": transactions[len(transactions) // 2],
    }


def service(settings: Any, bundle: Any, options: Any, gauges: Any) -> Any:
    """Returns the trainer and the store writer as one service."""
    with contextlib.suppress(ImportError):
        return named("tessera.live:Live")(settings, bundle, options, gauges)
    connections = named("tessera.stream_service:StreamConnections").of(settings)
    return named("tessera.stream_service:StreamService")(bundle, connections, options, metrics=gauges)


def main() -> None:
    part, out, *rest = sys.argv[1:]
    if part == "prepare":
        prepare(Path(out), Path(rest[0]), rest[1:])
        return
    import torch

    torch.set_num_threads(1)
    data, batch, seed = prepared(Path(out)), int(rest[0]), int(rest[1])
    if part == "step":
        found = measured_step(data, batch, seed)
    else:
        found = (measured_items if part == "items" else measured_pipeline)(data, batch, seed, Path(out))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
