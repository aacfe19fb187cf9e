"""`stream-processes`: what partitions and processes cost a stream.

Each arm drains the same events from a real broker, in processes of its own that have loaded everything before:

- one partition, one process: the default.
- four partitions in one, two and four processes.

The cores are shared by all processes, so the measure is processor time of the trainers for an event, and not the time
on the clock. That no bit depends on the number of processes is a test's matter: here the broker cuts the batches.
"""

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import load_bundle
from streaming.log.topics import Topics
from streaming.ranks.gloo import Card, GlooPeers
from streaming.ranks.peers import NoPeers
from streaming.trainer import Trainer, TrainerOptions
from tessera.bench.harness.live_data import NEVER_LATE_S, LiveData, live_data, servers
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.settings import Settings
from tessera.terminal import one_thread

_EVENTS, _WARM = 20_000, 2_048
_BATCHES = (256, 1_024)
_PARTITIONS = 4
_ARMS = ((1, 1), (_PARTITIONS, 1), (_PARTITIONS, 2), (_PARTITIONS, 4))
_HOST, _PATIENCE_S = "127.0.0.1", 300.0


@dataclass(frozen=True)
class _Place:
    """Place of one process of an arm."""

    settings: Settings
    bundle: Path
    batch: int
    rank: int
    processes: int
    port: int


def stream_processes(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures each arm at each batch size `seeds` times, the arms in turn."""
    settings = servers("stream-processes")
    one_thread()
    data = live_data(dataset, out, console)
    rows = measured_rows()
    for seed in range(seeds):
        for batch in _BATCHES:
            for partitions, processes in _ARMS if seed % 2 else _ARMS[::-1]:
                with console.status(f"seed {seed}: batch {batch}, {partitions} partitions, {processes} processes"):
                    rows.append(_arm(settings, data, out, seed, batch, partitions, processes))
    return BenchResult("stream-processes", dataset.name, seeds, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    def rate(batch: int, partitions: int, processes: int) -> float:
        wanted = (batch, partitions, processes)
        found = [row for row in rows if (row["batch"], row["partitions"], row["processes"]) == wanted]
        return float(np.median([row["events_per_cpu_s"] for row in found]))

    return [
        at_least(
            f"{_PARTITIONS} partitions in one process over one partition, events a CPU-second, batch {batch}",
            rate(batch, _PARTITIONS, 1) / rate(batch, 1, 1),
            0.9,
        )
        for batch in _BATCHES
    ]


def _arm(
    settings: Settings, data: LiveData, out: Path, seed: int, batch: int, partitions: int, processes: int
) -> dict[str, Any]:
    name = f"{settings.topics.prefix}{seed}-{batch}-{partitions}-{processes}-"
    own = replace(settings, topics=Topics(name, partitions), home=(out / "homes" / name).absolute())
    with contextlib.closing(own.open_log()) as log:
        log.create_topics(own.topics.partitions())
        rng, count = np.random.default_rng(seed), len(data.messages)
        places = (rng.integers(count) + np.arange(_WARM + _EVENTS)) % count
        # The number as key spreads the events evenly, as the keys of many users do.
        log.append(own.topics.events, [(b"%d" % number, data.messages[place]) for number, place in enumerate(places)])
    spawn, port = multiprocessing.get_context("spawn"), _free_port()
    pipes: list[Connection] = []
    with contextlib.ExitStack() as stack:
        for rank in range(processes):
            mine, theirs = spawn.Pipe()
            place = _Place(own, data.bundle.directory, batch, rank, processes, port)
            process = spawn.Process(target=_train, args=(place, theirs), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(process.terminate)
            pipes.append(mine)
        found = [_received(pipe, rank) for rank, pipe in enumerate(pipes)]
        for ended in multiprocessing.active_children():
            ended.join()
    cpu_s = sum(one["cpu_s"] for one in found)
    return {
        "part": f"{partitions} partitions, {processes} processes",
        "seed": seed,
        "batch": batch,
        "partitions": partitions,
        "processes": processes,
        "events_per_cpu_s": found[0]["events"] / cpu_s,
        "events_per_s": found[0]["events"] / found[0]["wall_s"],
        "largest_share_of_cpu": max(one["cpu_s"] for one in found) / cpu_s,
    }


def _received(pipe: Connection, rank: int) -> Mapping[str, float]:
    if not pipe.poll(_PATIENCE_S):
        raise TesseraError(f"process {rank} of the benchmark did not answer within {_PATIENCE_S:.0f} s")
    found: Mapping[str, float] | str = pipe.recv()
    if isinstance(found, str):
        raise TesseraError(f"process {rank} of the benchmark: {found}")
    return found


def _train(place: _Place, pipe: Connection) -> None:
    """Trains one process's share until the topics are drained, and sends what it cost."""
    one_thread()
    try:
        pipe.send(_drained(place))
    except TesseraError as error:
        pipe.send(str(error))


def _drained(place: _Place) -> dict[str, float]:
    bundle, topics = load_bundle(place.bundle), place.settings.topics
    card = Card(place.rank, place.processes, bundle.id, topics.prefix, "")
    peers = GlooPeers(card, _HOST, place.port) if place.processes > 1 else NoPeers()
    options = TrainerOptions(batch=place.batch, wait_s=0.5, lateness_s=NEVER_LATE_S, peers=peers, most_bad=1)
    with contextlib.closing(place.settings.open_log()) as log:
        trainer = Trainer(log, bundle, topics=topics, options=options)
        with contextlib.closing(trainer):
            if place.rank > 0:
                # The leader's first batches are warm-up for all: a follower counts from the same step on.
                for _ in range(-(-_WARM // place.batch)):
                    trainer.follow()
                began = time.process_time()
                while trainer.follow():
                    pass
                return {"cpu_s": time.process_time() - began}
            taken = 0
            while taken < _WARM:
                taken += trainer.run_once()
            events, cpu, wall = 0, time.process_time(), time.perf_counter()
            while events < _EVENTS + _WARM - taken:
                events += trainer.run_once()
            found = {"events": events, "cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            trainer.end()
            return found


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((_HOST, 0))
        port: int = listening.getsockname()[1]
        return port
