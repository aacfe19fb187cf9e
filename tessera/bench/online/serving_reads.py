"""`serving`: reads from a real Redis server and from the mirror, bytes and quality by storage, and ranking over HTTP.

- reads: 500 rows of 64 dimensions, as Feast reads them from a table of the same shape in the same run; 4,000 of 16.
- bootstrap: a mirror of a million rows.
- storage: bytes a row and the AUC on the test part of the dataset, in float32, float16 and int8.
- rank: 500 candidates over HTTP on this machine's loopback, one client, the dataset's own network; rows from Redis, and
  from the mirror.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from models.bundle.bundle import Bundle
from serving.ranking.mirror import Mirror
from serving.store.protocol import STORAGES
from serving.store.redis.store import RedisStore
from tessera.bench.harness.live_data import servers
from tessera.bench.harness.peer import PEER_FOLDER, peer_python
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.served import Caller, server
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import storage_cost
from tessera.pipeline.run import RunOptions, run
from tessera.settings import Settings
from tessera.terminal import one_thread

_ROUNDS, _WARM = 500, 50
_WIDE, _NARROW, _MILLION = (10_000, 64, 500), (200_000, 16, 4_000), 1_000_000
_CANDIDATES = 500


def serving(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures each part `seeds` times; claims are judged from the medians."""
    settings = servers("serving")
    one_thread()
    result = run(dataset, out / dataset.name, RunOptions(), console=console, registry=None, until="publish")
    assert result.bundle is not None
    rows: list[dict[str, Any]] = []
    with contextlib.closing(RedisStore(settings.redis)) as store:
        for seed in range(seeds):
            with console.status(f"seed {seed}: reads"):
                rows += _reads(store, seed)
                rows.append({"part": "reads: Feast", "seed": seed, **_feast(settings, out, console)})
                rows.append(_bootstrap(store, seed))
            with console.status(f"seed {seed}: ranking"):
                rows += [_ranking(settings, result.bundle, seed, out, mirror=mirror) for mirror in (False, True)]
        with console.status("storage"):
            rows += _storage(store, result.bundle, out / dataset.name / "frame")
    return BenchResult("serving", dataset.name, seeds, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    def median(part: str, column: str, **where: Any) -> float:
        found = [r[column] for r in rows if r["part"] == part and all(r.get(k) == v for k, v in where.items())]
        return float(np.median(found))

    wide, feast = median("reads: Redis", "p50_ms", rows=500), median("reads: Feast", "p50_ms")
    return [
        at_most("500 x 64 from Redis, p50 ms", wide, 2.0),
        at_most("500 x 64 from Redis, p99 ms", median("reads: Redis", "p99_ms", rows=500), 4.0),
        at_least("times as fast as Feast", feast / wide, 1.0),
        at_most("4,000 x 16 from Redis, p50 ms", median("reads: Redis", "p50_ms", rows=4_000), 12.0),
        at_most("4,000 x 16 from the mirror, p50 ms", median("reads: mirror", "p50_ms"), 0.25),
        at_most("mirror of 1,000,000 rows, seconds", median("bootstrap", "seconds"), 1.0),
        at_most("float16, bytes a row", median("storage", "bytes_per_row", storage="float16"), 42.0),
        at_most("int8, bytes a row", median("storage", "bytes_per_row", storage="int8"), 30.0),
        at_most("rank 500 over HTTP, p50 ms", median("rank: Redis", "p50_ms"), 8.0),
        at_most("rank 500 over HTTP, p99 ms", median("rank: Redis", "p99_ms"), 20.0),
        at_most("rank 500 over HTTP from the mirror, p50 ms", median("rank: mirror", "p50_ms"), 8.0),
    ]


def _reads(store: RedisStore, seed: int) -> list[dict[str, Any]]:
    found = _read(store, seed, _WIDE, mirrored=False)
    return found + _read(store, seed, _NARROW, mirrored=True)


def _read(store: RedisStore, seed: int, shape: tuple[int, int, int], *, mirrored: bool) -> list[dict[str, Any]]:
    size, dim, asked = shape
    rng = np.random.default_rng(seed)
    row = {"seed": seed, "rows": asked, "dim": dim, "of": size}
    with _table(store, size, dim, "float32", rng) as bundle:
        timed = _timed(lambda: store.read_rows(bundle, rng.integers(0, size, asked)))
        found = [{"part": "reads: Redis"} | row | timed]
        if mirrored:
            mirror = Mirror(store, bundle)
            timed = _timed(lambda: mirror.read_rows(rng.integers(0, size, asked)))
            found.append({"part": "reads: mirror"} | row | timed)
    return found


def _bootstrap(store: RedisStore, seed: int) -> dict[str, Any]:
    with _table(store, _MILLION, 16, "float16", np.random.default_rng(seed)) as bundle:
        began = time.perf_counter()
        Mirror(store, bundle)
        return {"part": "bootstrap", "seed": seed, "of": _MILLION, "dim": 16, "seconds": time.perf_counter() - began}


def _storage(store: RedisStore, bundle: Bundle, frame: Path) -> list[dict[str, Any]]:
    auc = storage_cost(bundle, read_frame(frame))
    found: list[dict[str, Any]] = []
    for storage in STORAGES:
        with _table(store, *_NARROW[:2], storage, np.random.default_rng(0)) as name:
            size = store.bytes_per_row(name)
        row: dict[str, Any] = {"part": "storage", "storage": storage, "bytes_per_row": size, "dim": 16}
        if storage in auc:
            row |= {"auc": auc[storage], "auc_cost": auc["float32"] - auc[storage]}
        found.append(row)
    return found


@contextlib.contextmanager
def _table(store: RedisStore, rows: int, dim: int, storage: str, rng: np.random.Generator) -> Any:
    bundle = f"bench-serving-{os.getpid()}-{rows}-{dim}-{storage}"
    store.drop(bundle)
    store.create_table(bundle, rows=rows, dim=dim, storage=storage)
    store.load_rows(bundle, rng.normal(size=(rows, dim)).astype(np.float32), seq=0)
    try:
        yield bundle
    finally:
        store.drop(bundle)


def _ranking(settings: Settings, bundle: Bundle, seed: int, out: Path, *, mirror: bool) -> dict[str, Any]:
    name = "mirror" if mirror else "Redis"
    environment = {"TESSERA_REDIS": settings.redis, "TESSERA_HOME": str((out / "home").absolute()), "TESSERA_KAFKA": ""}
    options = ["--bundle", str(bundle.directory), "--quiet", *(["--mirror"] if mirror else [])]
    with server(environment, *options, log=out / f"serve-{name}.log") as port:
        with contextlib.closing(Caller(port, bundle, candidates=_CANDIDATES, seed=seed)) as caller:
            bodies = [caller.body() for _ in range(_WARM + _ROUNDS)]
            asked = iter(bodies)
            timed = _timed(lambda: _ranked(caller, next(asked)))
    return {"part": f"rank: {name}", "seed": seed, "rows": _CANDIDATES, **timed}


def _ranked(caller: Caller, body: bytes) -> None:
    status, answer = caller.rank(body)
    if status != 200:
        raise RuntimeError(f"the server answered {status}: {answer}")


def _timed(call: Callable[[], object]) -> dict[str, float]:
    times: list[float] = []
    for number in range(_WARM + _ROUNDS):
        began = time.perf_counter()
        call()
        if number >= _WARM:
            times.append(1_000 * (time.perf_counter() - began))
    p50, p99 = np.percentile(times, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


def _feast(settings: Settings, out: Path, console: Console) -> dict[str, Any]:
    python = peer_python(out / "feast-peer", PEER_FOLDER / "feast_requirements.txt", console)
    place = out / "feast-repo"
    place.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(PEER_FOLDER / "feast_read.py"), str(place), settings.redis]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"rows": _WIDE[2], "dim": _WIDE[1], "of": _WIDE[0], **json.loads(done.stdout.splitlines()[-1])}
