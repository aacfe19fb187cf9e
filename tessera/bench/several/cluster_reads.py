"""Part `cluster` of `serving`: reads of rows from a Redis Cluster of three nodes, beside one server and one MGET.

The benchmark starts one server and three nodes of the same program on this machine. The readers take turns, so that
each meets the same load. Three nodes on one machine show what spreading costs, and not what more machines give.
"""

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import TesseraError
from serving.store.redis.embedded import embedded_executable
from serving.store.redis.store import RedisStore
from tessera.bench.harness.floor import plain_values
from tessera.bench.harness.result import Claim, at_most

NODES = 3
_SHAPES = ((10_000, 64, 500), (200_000, 16, 4_000))
_BUNDLE = "bench-cluster"
_START_S = 30.0
_Read = Callable[[np.ndarray], np.ndarray]


def cluster_rows(seed: int, out: Path, *, rounds: int, warm: int) -> list[dict[str, Any]]:
    """Returns a row for each reader and shape, and a row of the pages that each node has.

    Args:
        seed: Of the rows.
        out: Directory of the servers' data, which is removed first.
        rounds: Timed reads of each reader.
        warm: Reads before them.

    Raises:
        TesseraError: A server does not start.
    """
    shutil.rmtree(out, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        single = f"redis://127.0.0.1:{stack.enter_context(_server(out / 'single'))}/0"
        ports = [stack.enter_context(_server(out / f"node{n}", "--cluster-enabled", "yes")) for n in range(NODES)]
        _cli(ports[0], "--cluster", "create", *(f"127.0.0.1:{port}" for port in ports), "--cluster-yes")
        for port in ports:
            _await_cluster(port)
        stores = {
            "one server": stack.enter_context(contextlib.closing(RedisStore(single))),
            "cluster": stack.enter_context(contextlib.closing(RedisStore(f"redis+cluster://127.0.0.1:{ports[0]}"))),
        }
        for size, dim, asked in _SHAPES:
            rng = np.random.default_rng(seed)
            vectors = rng.normal(size=(size, dim)).astype(np.float32)
            for store in stores.values():
                store.create_table(_BUNDLE, rows=size, dim=dim)
                store.load_rows(_BUNDLE, vectors, seq=0)
            pages = [_pages(port) for port in ports]
            share = {"part": "cluster: pages", "seed": seed, "of": size, "dim": dim, "pages": pages}
            rows.append(share | {"off_share": float(np.abs(np.array(pages) / np.mean(pages) - 1).max())})
            with plain_values(single, rows=size, size_bytes=4 * dim) as plain:
                readers: dict[str, _Read] = {name: partial(store.read_rows, _BUNDLE) for name, store in stores.items()}
                readers["one MGET"] = plain.read
                times = _alternate(readers, rng, (size, asked), rounds=rounds, warm=warm)
            for name, times_ms in times.items():
                p50, p99 = np.percentile(times_ms, [50, 99])
                row = {"part": f"cluster reads: {name}", "seed": seed, "rows": asked, "dim": dim, "of": size}
                rows.append(row | {"p50_ms": float(p50), "p99_ms": float(p99)})
            for store in stores.values():
                store.drop(_BUNDLE)
    return rows


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Judges the medians over the seeds."""

    def median(reader: str, asked: int) -> float:
        part = f"cluster reads: {reader}"
        return float(np.median([row["p50_ms"] for row in rows if row["part"] == part and row["rows"] == asked]))

    off = max(row["off_share"] for row in rows if row["part"] == "cluster: pages")
    ratios = [
        (f"{asked:,} x {dim}", median("cluster", asked) / median("one server", asked)) for _, dim, asked in _SHAPES
    ]
    return [
        at_most("a node's pages off its share", off, 0.2),
        *(at_most(f"{shape} from a cluster of three over one server, p50", ratio, 1.3) for shape, ratio in ratios),
    ]


def _alternate(
    readers: dict[str, _Read],
    rng: np.random.Generator,
    shape: tuple[int, int],
    *,
    rounds: int,
    warm: int,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each reader's reads of the same random rows, in an order that alternates."""
    times: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(warm + rounds):
        wanted = rng.integers(0, shape[0], shape[1])
        for name in list(readers)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            readers[name](wanted)
            if number >= warm:
                times[name].append(1_000 * (time.perf_counter() - began))
    return times


@contextlib.contextmanager
def _server(directory: Path, *more: str) -> Iterator[int]:
    """Yields the port of a server that runs while the body does."""
    directory.mkdir(parents=True)
    port = _free_port()
    executable = shutil.which("redis-server") or embedded_executable()
    options = {"--port": port, "--bind": "127.0.0.1", "--dir": directory, "--save": "", "--logfile": "log"}
    arguments = [str(part) for option in options.items() for part in option]
    process = subprocess.Popen([executable, *arguments, *more])
    try:
        give_up = time.monotonic() + _START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > give_up:
                raise TesseraError(f"the benchmark's Redis server did not start; see {directory / 'log'}")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def _free_port() -> int:
    """Returns a free port. A node's bus listens 10,000 ports above, which must be a port too."""
    for _ in range(100):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        if port < 55_000:
            return port
    raise TesseraError("no free port below 55,000 for a node of a Redis Cluster; close some connections")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")
    return False


def _await_cluster(port: int) -> None:
    give_up = time.monotonic() + _START_S
    while "cluster_state:ok" not in _cli(port, "-p", str(port), "cluster", "info"):
        if time.monotonic() > give_up:
            raise TesseraError(f"the benchmark's Redis Cluster did not start at port {port}")
        time.sleep(0.1)


def _pages(port: int) -> int:
    return len(_cli(port, "-p", str(port), "--scan", "--pattern", f"tessera:{_BUNDLE}:*:page:*").splitlines())


def _cli(port: int, *arguments: str) -> str:
    """Runs redis-cli.

    Raises:
        TesseraError: It fails, for example because no cluster comes about within a minute.
    """
    program = shutil.which("redis-cli") or str(Path(embedded_executable()).with_name("redis-cli"))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise TesseraError(f"redis-cli failed for the benchmark's cluster at port {port}: {done.stdout[-500:]}")
    return done.stdout
