"""`serving`: measures reads from Redis and from the mirror, bytes and quality by storage, and ranking over HTTP.

- reads: 500 rows of 64 dimensions, as Feast reads them from a table of the same shape in the same run; 4,000 of 16.
  Floors: one MGET of plain values, one key a row, of the same bytes; numpy's own copy of the rows for the mirror.
- bootstrap: a mirror of a million rows, beside reading 1,000 values that hold as many bytes.
- storage: bytes a row and the AUC on the test part of the dataset, in float32, float16 and int8.
- rank: 500 candidates over HTTP on this machine's loopback, one client, the dataset's own network; rows from Redis, and
  from the mirror. Floor: the same rankings in process, and a request that asks for nothing.
- sampling: the same request to three servers in turn, of which one logs what it read for 1 % of its answers.
- workers: as many requests as one worker and two answer; see `serving_workers`.
"""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.aggregate.plan import NOTHING
from features.dataset.descriptor import Dataset
from models.bundle.bundle import Bundle
from serving.ranking.mirror import Mirror
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.protocol import STORAGES
from serving.store.redis.store import RedisStore
from tessera.bench.harness.floor import p50_p99_ms, plain_values, request_ms
from tessera.bench.harness.live_data import servers
from tessera.bench.harness.needs import FEAST, Peers
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.harness.served import Caller, server
from tessera.bench.several import cluster_reads
from tessera.bench.several.serving_workers import worker_rows
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import storage_cost
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings
from tessera.terminal import one_thread

_ROUNDS, _WARM = 500, 50
_WIDE, _NARROW, _MILLION = (10_000, 64, 500), (200_000, 16, 4_000), 1_000_000
_CANDIDATES, _VALUES, _SERVERS = 500, 1_000, 3


PARTS = ("reads", "cluster", "ranking", "sampling", "workers", "storage")
"""Parts of the benchmark, by the name that `--part` takes."""


def serving(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, peers: Peers, parts: Sequence[str] | None = None
) -> BenchResult:
    """Measures each part `seeds` times; claims are judged from the medians.

    Args:
        dataset: Dataset whose bundle is served.
        out: Directory of the run.
        seeds: Number of seeds, from 0.
        console: Console of the progress.
        peers: may lack Feast; then nothing is claimed about it.
        parts: Names in `PARTS`; all by default.

    Raises:
        TesseraError: A part is unknown, or a server is missing.
    """
    chosen = chosen_parts("serving", parts, PARTS)
    settings = servers("serving")
    one_thread()
    result = run(dataset, out / dataset.name, load_options(dataset), console=console, registry=None, until="publish")
    assert result.bundle is not None
    rows = measured_rows()
    with contextlib.closing(RedisStore(settings.redis)) as store:
        for seed in range(seeds):
            if "reads" in chosen:
                with console.status(f"seed {seed}: reads"):
                    rows += _reads(store, settings.redis, seed)
                    if (python := peers.python(FEAST)) is not None:
                        rows.append({"part": "reads: Feast", "seed": seed, **_feast(settings, out, python)})
                    rows.append(_bootstrap(store, settings.redis, seed))
            if "cluster" in chosen:
                with console.status(f"seed {seed}: cluster"):
                    rows += cluster_reads.cluster_rows(seed, out / "cluster", rounds=_ROUNDS, warm=_WARM)
            if "ranking" in chosen:
                with console.status(f"seed {seed}: ranking"):
                    rows.append(_in_process(store, result.bundle, seed))
                    rows += (_ranking(settings, result.bundle, seed, out, mirror=mirror) for mirror in (False, True))
            if "sampling" in chosen:
                with console.status(f"seed {seed}: sampling"):
                    rows.append(_sampling(settings, result.bundle, seed, out))
            if "workers" in chosen:
                with console.status(f"seed {seed}: workers"):
                    rows += worker_rows(settings, result.bundle, seed, out, candidates=_CANDIDATES)
        if "storage" in chosen:
            with console.status("storage"):
                rows += _storage(store, result.bundle, out / dataset.name / "frame")
    rows += peers.rows("part")
    return BenchResult("serving", dataset.name, seeds, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    def median(part: str, column: str, **where: Any) -> float:
        values = [r[column] for r in rows if r["part"] == part and all(r.get(k) == v for k, v in where.items())]
        return float(np.median(values))

    def over_floor(reader: str, rows: int) -> tuple[float, float]:
        floor = median(f"floor: {reader}", "p50_ms", rows=rows)
        return median(f"reads: {reader}", "p50_ms", rows=rows) / floor, 4.0

    def ranked(reader: str) -> float:
        floor = median("floor: rank", "p50_ms") + median(f"rank: {reader}", "request_ms")
        return median(f"rank: {reader}", "p50_ms") / floor

    measured, judged = {row["part"] for row in rows}, []
    if "reads: Feast" in measured:
        times = median("reads: Feast", "p50_ms") / median("reads: Redis", "p50_ms", rows=500)
        judged.append(at_least("500 x 64: times as fast as Feast, p50", times, 4.0))
    if "reads: Redis" in measured:
        bootstrap = median("bootstrap", "seconds") / median("bootstrap", "floor_seconds")
        judged += [
            at_most("500 x 64 from Redis over one MGET of plain values, p50", *over_floor("Redis", 500)),
            at_most("4,000 x 16 from Redis over one MGET of plain values, p50", *over_floor("Redis", 4_000)),
            at_most("4,000 x 16 from the mirror over numpy's copy, p50", *over_floor("mirror", 4_000)),
            at_most("mirror of 1,000,000 rows over reading as many bytes", bootstrap, 4.0),
        ]
    if "cluster: pages" in measured:
        judged += cluster_reads.claims(rows)
    if "storage" in measured:
        judged += [
            at_most("float16, bytes a row", median("storage", "bytes_per_row", storage="float16"), 42.0),
            at_most("int8, bytes a row", median("storage", "bytes_per_row", storage="int8"), 30.0),
        ]
    if "rank: Redis" in measured:
        judged += [
            at_most("rank 500 over HTTP over its parts in process, p50", ranked("Redis"), 2.0),
            at_most("the same, rows from the mirror", ranked("mirror"), 2.0),
        ]
    if "rank: sampled" in measured:
        ratio = median("rank: sampled", "ratio")
        judged.append(at_most("rank 500 with 1 % of the answers logged over without, p50", ratio, 1.05))
    if "workers: 2" in measured:
        one, two = (median(f"workers: {workers}", "requests_per_cpu_s") for workers in (1, 2))
        failed = sum(row["failed"] for row in rows if row["part"].startswith("workers: "))
        held = median("workers: 2", "mirror_pss_bytes") / median("workers: 2", "mirror_bytes")
        judged += [
            at_least("two workers over one: requests for each processor second of the server", two / one, 0.9),
            at_most("two workers: memory of the mirrors over the memory of one", held, 1.05),
            at_most("requests that failed, by one worker and by two", failed, 0),
        ]
    return judged


def _reads(store: RedisStore, address: str, seed: int) -> list[dict[str, Any]]:
    wide = _read(store, address, seed, _WIDE, mirrored=False)
    return wide + _read(store, address, seed, _NARROW, mirrored=True)


def _read(
    store: RedisStore, address: str, seed: int, shape: tuple[int, int, int], *, mirrored: bool
) -> list[dict[str, Any]]:
    size, dim, asked = shape
    rng = np.random.default_rng(seed)
    row = {"seed": seed, "rows": asked, "dim": dim, "of": size}
    with _table(store, size, dim, "float32", rng) as bundle:
        timed = _timed(lambda: store.read_rows(bundle, rng.integers(0, size, asked)))
        results = [{"part": "reads: Redis"} | row | timed]
        if mirrored:
            mirror, copied = Mirror(store, bundle, NOTHING), rng.normal(size=(size, dim)).astype(np.float32)
            timed = _timed(lambda: mirror.read_rows(rng.integers(0, size, asked)))
            results.append({"part": "reads: mirror"} | row | timed)
            timed = _timed(lambda: copied[rng.integers(0, size, asked)])
            results.append({"part": "floor: mirror"} | row | timed)
    with plain_values(address, rows=size, size_bytes=4 * dim) as plain:
        timed = _timed(lambda: plain.read(rng.integers(0, size, asked)))
    return [*results, {"part": "floor: Redis"} | row | timed]


def _in_process(store: RedisStore, bundle: Bundle, seed: int) -> dict[str, Any]:
    fill_store(store, bundle)
    service, rng = RankService(bundle, store), np.random.default_rng(seed)
    items, users = bundle.items["item_id"].to_numpy(), bundle.users["user_id"].to_list()
    asked = min(_CANDIDATES, len(items))
    timed = _timed(
        lambda: service.rank(users[rng.integers(len(users))], rng.choice(items, asked, replace=False).tolist(), 20)
    )
    return {"part": "floor: rank", "seed": seed, "rows": asked, **timed}


def _bootstrap(store: RedisStore, address: str, seed: int) -> dict[str, Any]:
    with _table(store, _MILLION, 16, "float16", np.random.default_rng(seed)) as bundle:
        began = time.perf_counter()
        Mirror(store, bundle, NOTHING)
        seconds = time.perf_counter() - began
        size = int(store.bytes_per_row(bundle) * _MILLION)
    with plain_values(address, rows=_VALUES, size_bytes=size // _VALUES // 4 * 4) as plain:
        began = time.perf_counter()
        for start in range(0, _VALUES, 100):
            plain.read(np.arange(start, start + 100))
        floor = time.perf_counter() - began
    row = {"part": "bootstrap", "seed": seed, "of": _MILLION, "dim": 16}
    return row | {"seconds": seconds, "floor_seconds": floor}


def _storage(store: RedisStore, bundle: Bundle, frame: Path) -> list[dict[str, Any]]:
    auc = storage_cost(bundle, read_frame(frame))
    results: list[dict[str, Any]] = []
    for storage in STORAGES:
        with _table(store, *_NARROW[:2], storage, np.random.default_rng(0)) as name:
            size = store.bytes_per_row(name)
        row: dict[str, Any] = {"part": "storage", "storage": storage, "bytes_per_row": size, "dim": 16}
        if storage in auc:
            row |= {"auc": auc[storage], "auc_cost": auc["float32"] - auc[storage]}
        results.append(row)
    return results


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
        nothing = request_ms(port, "/healthz")
    return {"part": f"rank: {name}", "seed": seed, "rows": _CANDIDATES, "request_ms": nothing, **timed}


def _sampling(settings: Settings, bundle: Bundle, seed: int, out: Path) -> dict[str, Any]:
    """Sends each request to two servers without sampling and to one with it, in an order that rotates.

    Servers of the same code differ by some hundredths, so `control` says what two of them without sampling differ by.
    Each round starts all three again, and sampling is the first, second or third of them.
    """
    rounds = [_sampled_round(settings, bundle, seed, out, place) for place in range(_SERVERS)]
    plain, control, sampled = (float(value) for value in np.exp(np.mean(np.log(rounds), axis=0)))
    row = {"part": "rank: sampled", "seed": seed, "rows": _CANDIDATES, "p50_ms": sampled, "without_p50_ms": plain}
    return row | {"ratio": sampled / float(np.sqrt(plain * control)), "control": control / plain}


def _sampled_round(settings: Settings, bundle: Bundle, seed: int, out: Path, place: int) -> list[float]:
    """Returns the p50 in milliseconds of two servers without sampling and of one with it, started at `place`."""
    environment = {"TESSERA_REDIS": settings.redis, "TESSERA_HOME": str((out / "home").absolute()), "TESSERA_KAFKA": ""}
    options = ("--bundle", str(bundle.directory), "--quiet", "--mirror")
    with contextlib.ExitStack() as stack:
        callers = []
        for number in range(_SERVERS):
            rate, log = "0.01" if number == place else "0", out / f"serve-sampled-{number}.log"
            port = stack.enter_context(server(environment, *options, "--skew-sample", rate, log=log))
            caller = Caller(port, bundle, candidates=_CANDIDATES, seed=seed)
            callers.append(stack.enter_context(contextlib.closing(caller)))
        times: list[list[float]] = [[] for _ in callers]
        for number in range(_WARM + _ROUNDS):
            body = callers[0].body()
            for which in np.roll(np.arange(_SERVERS), number):
                began = time.perf_counter()
                _ranked(callers[which], body)
                times[which].append(1_000 * (time.perf_counter() - began))
    p50 = [float(np.median(one[_WARM:])) for one in times]
    sampled = p50.pop(place)
    return [*p50, sampled]


def _ranked(caller: Caller, body: bytes) -> None:
    status, answer = caller.rank(body)
    if status != 200:
        raise RuntimeError(f"the server answered {status}: {answer}")


def _timed(call: Callable[[], object]) -> dict[str, float]:
    p50, p99 = p50_p99_ms(call, rounds=_ROUNDS, warm=_WARM)
    return {"p50_ms": p50, "p99_ms": p99}


def _feast(settings: Settings, out: Path, python: Path) -> dict[str, Any]:
    repository = out / "feast-repo"
    repository.mkdir(parents=True, exist_ok=True)
    command = [str(python), str(PEER_FOLDER / "feast_read.py"), str(repository), settings.redis]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"rows": _WIDE[2], "dim": _WIDE[1], "of": _WIDE[0], **json.loads(done.stdout.splitlines()[-1])}
