"""Part `workers` of `serving`: what a request costs the processor where two processes share a port and a mirror.

The callers take as many answers as they get, from one worker and from two in turn. The generator runs on the same
cores, so throughput says little. The processor time of all processes of a server, divided by its requests, is the cost.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from models.bundle.bundle import Bundle
from tessera.bench.harness.load import Load
from tessera.bench.harness.served import Caller, served_process
from tessera.settings import Settings

_WORKERS = (1, 2)
_CALLERS, _LOAD_S, _WARM_S, _TURNS = 16, 6.0, 2.0, 3
_MIRROR = "/tessera-mirror-"


def worker_rows(
    settings: Settings, bundle: Bundle, seed: int, out: Path, *, candidates: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for each number of workers.

    Args:
        settings: Address of the store.
        bundle: Bundle that is served.
        seed: Of the requests.
        out: Directory of the servers' logs.
        candidates: Candidates of a request.
    """
    environment = {"TESSERA_REDIS": settings.redis, "TESSERA_HOME": str((out / "home").absolute()), "TESSERA_KAFKA": ""}
    options = ("--bundle", str(bundle.directory), "--quiet", "--mirror")
    with contextlib.ExitStack() as stack:
        loads, pids, spent = {}, {}, dict.fromkeys(_WORKERS, 0.0)
        for workers in _WORKERS:
            log = out / f"serve-workers-{workers}.log"
            chosen = (*options, "--workers", str(workers))
            port, pids[workers] = stack.enter_context(served_process(environment, *chosen, log=log))
            connect = partial(_connect, port, bundle, candidates, seed)
            Load(connect, per_second=None, callers=_CALLERS).run(_WARM_S)
            loads[workers] = Load(connect, per_second=None, callers=_CALLERS)
        for turn in range(_TURNS):
            for workers in _WORKERS if turn % 2 else _WORKERS[::-1]:
                before = _cpu_s(pids[workers])
                loads[workers].run(_LOAD_S)
                spent[workers] += _cpu_s(pids[workers]) - before
        for workers, load in loads.items():
            held = [_mirror_bytes(pid) for pid in _family(pids[workers])]
            yield load.row(f"workers: {workers}") | {
                "seed": seed,
                "requests_per_cpu_s": len(load.ms) / spent[workers],
                "mirrors": sum(1 for size, _ in held if size),
                "mirror_bytes": max((size for size, _ in held), default=0),
                "mirror_pss_bytes": sum(own for _, own in held),
                "table_bytes": 4 * bundle.schema.rows * bundle.schema.dim,
            }


def _connect(port: int, bundle: Bundle, candidates: int, seed: int, number: int) -> Caller:
    return Caller(port, bundle, candidates=candidates, seed=1_000 * seed + number)


def _family(pid: int) -> list[int]:
    """Returns a process and the processes that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *(int(child) for child in children.split())]


def _cpu_s(pid: int) -> float:
    """Returns the processor seconds of a process and of the processes that it started."""
    ticks = 0
    for one in _family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _mirror_bytes(pid: int) -> tuple[int, int]:
    """Returns the bytes of the shared mirror in a process, and its share of them (PSS)."""
    resident = share = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ")[0] and " " in name:
            inside = _MIRROR in line and line.split(" (deleted)")[0].endswith(".rows")
        elif inside and name == "Rss":
            resident += int(value.split()[0]) * 1_024
        elif inside and name == "Pss":
            share += int(value.split()[0]) * 1_024
    return resident, share
