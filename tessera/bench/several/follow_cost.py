"""`follow`: what the second bundle of a stream that follows the releases costs.

Each arm drains the same events from a real broker, in a process of its own that has loaded everything before:

- read: the shared read alone, without a step.
- plain: a trainer with readers of its own, as `tessera stream` has. The control.
- one, two: trainers of one and of two bundles over one shared read, as `tessera stream --follow` has.

Each arm runs on one processor. It is shared with other processes, so the measure is processor time. The cost of the
second bundle is two less one. Its own step is plain less read.
"""

import contextlib
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import Bundle, load_bundle, write_manifest
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from streaming.shared.reads import SharedReads
from streaming.trainer import Trainer, TrainerOptions
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, live_data, servers
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.settings import Settings
from tessera.terminal import one_thread

_EVENTS, _WARM = 20_000, 8_192
_BATCHES = (256, 1_024)
_ARMS = ("read", "plain", "one", "two")
_PATIENCE_S = 300.0


@dataclass(frozen=True)
class _FollowArm:
    """Work of one process of the benchmark."""

    settings: Settings
    bundles: tuple[Path, ...]
    batch: int
    arm: str


def follow(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures each arm at each batch size `seeds` times, the arms in turn."""
    settings = servers("follow")
    one_thread()
    data = live_data(dataset, out, console)
    second = _second(data.bundle, out / "second")
    rows = measured_rows()
    for seed in range(seeds):
        for batch in _BATCHES:
            found = {}
            for arm in _ARMS if seed % 2 else _ARMS[::-1]:
                with console.status(f"seed {seed}: batch {batch}, {arm}"):
                    found[arm] = _measured(settings, data, (data.bundle.directory, second), out, seed, batch, arm)
            rows += (_row(seed, batch, arm, found) for arm in _ARMS)
    return BenchResult("follow", dataset.name, seeds, rows, _claims(rows))


def _second(bundle: Bundle, directory: Path) -> Path:
    """Returns a bundle of the same content and of another id."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(bundle.directory, directory)
    write_manifest(directory, msgspec.structs.replace(bundle.manifest, metrics={"copy": True}))
    return directory


def _row(seed: int, batch: int, arm: str, found: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    cpu = {name: one["cpu_s"] for name, one in found.items()}
    row = {"part": arm, "seed": seed, "batch": batch, "us_per_event": 1e6 * cpu[arm] / _EVENTS}
    row["events_per_s"] = found[arm]["events"] / found[arm]["wall_s"]
    if arm == "two":
        row["second_over_own_step"] = (cpu["two"] - cpu["one"]) / (cpu["plain"] - cpu["read"])
        row["wall_over_one"] = found["two"]["wall_s"] / found["one"]["wall_s"]
    if arm == "one":
        row["over_plain"] = cpu["plain"] / cpu["one"]
    return row


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    def median(column: str, batch: int) -> float:
        return float(np.median([row[column] for row in rows if row["batch"] == batch and column in row]))

    return [
        claim
        for batch in _BATCHES
        for claim in (
            at_most(
                f"the second bundle over its own step, processor time, batch {batch}",
                median("second_over_own_step", batch),
                1.2,
            ),
            at_least(
                f"following one bundle over a plain trainer, events a CPU-second, batch {batch}",
                median("over_plain", batch),
                0.9,
            ),
        )
    ]


def _measured(
    settings: Settings, data: LiveData, bundles: tuple[Path, ...], out: Path, seed: int, batch: int, arm: str
) -> Mapping[str, float]:
    name = f"{settings.topics.prefix}{seed}-{batch}-{arm}-"
    own = replace(settings, topics=Topics(name), home=(out / "homes" / name).absolute())
    with contextlib.closing(own.open_log()) as log:
        log.create_topics(own.topics.partitions())
        rng, count = np.random.default_rng(seed), len(data.messages)
        places = (rng.integers(count) + np.arange(_WARM + _EVENTS)) % count
        log.append(own.topics.events, [(None, data.messages[place]) for place in places])
    mine, theirs = multiprocessing.get_context("spawn").Pipe()
    work = _FollowArm(own, bundles[: 2 if arm == "two" else 1], batch, arm)
    process = multiprocessing.get_context("spawn").Process(target=_send, args=(work, theirs), daemon=True)
    process.start()
    try:
        if not mine.poll(_PATIENCE_S):
            raise TesseraError(f"the arm {arm} of the benchmark did not answer within {_PATIENCE_S:.0f} s")
        found: Mapping[str, float] | str = mine.recv()
    finally:
        process.terminate()
        process.join()
    if isinstance(found, str):
        raise TesseraError(f"the arm {arm} of the benchmark: {found}")
    return found


def _send(work: _FollowArm, pipe: Connection) -> None:
    """Does the work of an arm on one processor, and sends what it cost."""
    one_thread()
    if hasattr(os, "sched_setaffinity"):
        # Threads of two trainers on two processors of one core would slow each other down.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        pipe.send(_read(work) if work.arm == "read" else _trained(work))
    except TesseraError as error:
        pipe.send(str(error))


def _read(work: _FollowArm) -> dict[str, float]:
    topic = work.settings.topics.events
    with contextlib.closing(work.settings.open_log()) as log:
        reads = SharedReads(lambda: contextlib.nullcontext(log))
        with contextlib.closing(reads), contextlib.closing(reads.reader(log, topic, {})) as reader:

            def take() -> int:
                return len(reader.poll(work.batch, 0.5))

            return _timed([take])


def _trained(work: _FollowArm) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        reads: SharedReads | None = None
        if work.arm != "plain":
            reads = stack.enter_context(
                contextlib.closing(SharedReads(lambda: contextlib.closing(work.settings.open_log())))
            )
        options = TrainerOptions(batch=work.batch, wait_s=0.5, lateness_s=NEVER_LATE_S, most_bad=1, reads=reads)
        trainers = []
        for directory in work.bundles:
            log: EventLog = stack.enter_context(contextlib.closing(work.settings.open_log()))
            trainer = Trainer(log, load_bundle(directory), topics=work.settings.topics, options=options)
            trainers.append(stack.enter_context(contextlib.closing(trainer)))
        return _timed([trainer.run_once for trainer in trainers])


def _timed(steps: list[Any]) -> dict[str, float]:
    """Takes each step's warm-up, then all events in a thread of each step, and returns what that cost."""

    def until(step: Any, count: int) -> None:
        while count > 0:
            count -= step()

    warm = []
    for step in steps:
        done = 0
        while done < _WARM:
            done += step()
        warm.append(done)
    threads = [
        threading.Thread(target=until, args=(step, _WARM + _EVENTS - done))
        for step, done in zip(steps, warm, strict=True)
    ]
    cpu, wall = time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = _WARM + _EVENTS - warm[0]
    return {
        "cpu_s": (time.process_time() - cpu) * _EVENTS / events,
        "wall_s": time.perf_counter() - wall,
        "events": events,
    }
