"""`swaps`: loads a server steadily while its bundle is swapped every ten seconds and Redis restarts once.

The load is 80 % of the peak that the same server gave a few callers just before, while it swapped at the same pace: a
swap takes seconds of a processor, which a peak without swaps does not count. Both peaks are rows. Requests are due at
fixed times and timed from then, by more callers than the longest stall keeps waiting. No answer may fail, and each must
be wholly one bundle's: a few of them are compared with what that bundle says offline.
"""

import contextlib
import http.client
import itertools
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from models.bundle.bundle import Bundle
from models.registry.registry import Registry
from models.registry.release import Release
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.redis.embedded import embedded_executable
from tessera.bench.harness.load import Load
from tessera.bench.harness.result import BenchResult, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.harness.served import Caller, server
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings

_CANDIDATES, _PEAK_CALLERS, _CALLERS = 500, 4, 48
_PEAK_S, _SHARE, _SWAP_S = 10.0, 0.8, 10.0
_SWAPPING_PEAK_S = 3 * _SWAP_S
_COMPARED = 200


def swaps(dataset: Dataset, out: Path, *, seeds: int, console: Console, seconds: float = 60.0) -> BenchResult:
    """Runs once, whatever the seeds."""
    bundles = [
        _bundle(
            run(
                dataset,
                out / f"{dataset.name}-{seed}",
                load_options(dataset, [f"seed={seed}"]),
                console=console,
                registry=None,
                until="publish",
            ).bundle
        )
        for seed in (0, 1)
    ]
    rows = measured_rows()
    folder = (out / "server").absolute()
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.closing(_Redis(folder / "redis")) as redis:
        settings = Settings(home=folder / "home", redis=redis.address)
        registry = settings.open_registry()
        releases = [registry.publish(bundle, params={}, metrics={}) for bundle in bundles]
        environment = {"TESSERA_HOME": str(settings.home), "TESSERA_REDIS": redis.address, "TESSERA_KAFKA": ""}
        options = ("--mirror", "--quiet", "--follow-s", "1")
        with server(environment | {"MLFLOW_TRACKING_URI": ""}, *options, log=folder / "serve.log") as port:
            connect = partial(_connect, port, bundles[0])
            seen = _Seen()
            with console.status("peak"):
                still = Load(connect, per_second=None, callers=_PEAK_CALLERS)
                still.run(_PEAK_S)
            rows.append(still.row("peak without swaps"))
            swapper = _Swapper(registry, releases, min(_SWAP_S, seconds / 4))
            with console.status("peak with swaps"):
                peak = Load(connect, per_second=None, callers=_PEAK_CALLERS)
                swapper.during(partial(peak.run, _SWAPPING_PEAK_S))
            rows.append(peak.row("peak with swaps"))
            before = _counted(port, "tessera_swaps_total")
            rate = _SHARE * peak.rate
            load = Load(connect, per_second=rate, callers=_CALLERS, note=seen)
            with console.status(f"{rate:.0f} requests a second for {seconds:.0f} s"):
                restart = threading.Timer(seconds / 2, redis.restart)
                restart.start()
                swapper.during(partial(load.run, seconds))
                restart.join()
            done = _counted(port, "tessera_swaps_total") - before
    wrong = _compared(seen, bundles)
    rows.append(
        load.row("load")
        | {
            "stale": seen.stale,
            "swaps": done,
            "redis_restarts": 1,
            "compared": min(len(seen.answers), _COMPARED),
            "why": "; ".join(sorted(set(load.failed))[:3]),
        }
    )
    claims = [
        at_most("requests that failed", float(len(load.failed)), 0),
        at_most("answers of no one bundle", float(wrong), 0),
        at_least("swaps", done, seconds / _SWAP_S - 2),
        at_most("p99 from when a request was due over p99 of the peak's callers", _times(load, peak), 20),
    ]
    return BenchResult("swaps", dataset.name, 1, rows, claims)


class _Swapper:
    """Promotes two releases in turns while some work runs.

    Args:
        registry: Registry of the releases.
        releases: The two releases; the second is promoted first.
        every_s: Seconds between two swaps.
    """

    def __init__(self, registry: Registry, releases: list[Release], every_s: float) -> None:
        self._registry, self._every_s = registry, every_s
        self._next = itertools.cycle(releases[::-1])

    def during(self, work: Callable[[], None]) -> None:
        """Runs `work`, and swaps until the work is done."""
        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive():
            thread.join(self._every_s)
            if thread.is_alive():
                self._registry.promote(next(self._next))
        thread.join()


class _Seen:
    """Counts answers and keeps a few of them."""

    def __init__(self) -> None:
        self.answers: list[tuple[bytes, dict[str, Any]]] = []
        self.stale = 0
        self._count = itertools.count(1)

    def __call__(self, body: bytes, answer: dict[str, Any]) -> None:
        self.stale += bool(answer["stale"])
        if next(self._count) % 50 == 0:
            self.answers.append((body, answer))


def _connect(port: int, bundle: Bundle, number: int) -> Caller:
    return Caller(port, bundle, candidates=_CANDIDATES, seed=number)


def _times(load: Load, peak: Load) -> float:
    return float(np.percentile(load.ms, 99) / np.percentile(peak.ms, 99))


class _Redis:
    """Redis server of the benchmark, which can be restarted with its data."""

    def __init__(self, directory: Path) -> None:
        self._executable = shutil.which("redis-server") or embedded_executable()
        directory.mkdir(parents=True)
        self._directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = int(free.getsockname()[1])
        self.address = f"redis://127.0.0.1:{self._port}/0"
        self._process = self._start()

    def restart(self) -> None:
        self._process.terminate()  # saves
        self._process.wait(60)
        self._process = self._start()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _start(self) -> "subprocess.Popen[bytes]":
        options = {"port": self._port, "bind": "127.0.0.1", "dir": self._directory, "save": "3600 1", "logfile": "log"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        process = subprocess.Popen([self._executable, *arguments])
        give_up = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(16).startswith(b"+PONG"):
                    return process
            if time.monotonic() > give_up:
                raise TesseraError(f"the benchmark's Redis server did not start; see {self._directory / 'log'}")
            time.sleep(0.05)


def _counted(port: int, name: str) -> float:
    """Returns a number of the server's own `/metrics`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def _compared(seen: _Seen, bundles: list[Bundle]) -> int:
    """Counts the kept answers that differ from their bundle's offline answers by more than 1e-5."""
    services = {bundle.id: service for bundle in bundles for service in _offline(bundle)}
    wrong = 0
    for body, answer in seen.answers[:: max(1, len(seen.answers) // _COMPARED)]:
        asked = json.loads(body)
        if answer["bundle"] not in services:
            wrong += 1
            continue
        right = dict(
            services[answer["bundle"]].rank(asked["user"], asked["candidates"], len(asked["candidates"])).items
        )
        wrong += any(abs(right[ranked["item"]] - ranked["score"]) > 1e-5 for ranked in answer["items"])
    return wrong


def _offline(bundle: Bundle) -> Iterator[RankService]:
    store = MemoryStore()
    fill_store(store, bundle)
    yield RankService(bundle, store)


def _bundle(bundle: Bundle | None) -> Bundle:
    assert bundle is not None
    return bundle
