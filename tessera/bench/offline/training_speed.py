"""`training-speed`: samples a second, memory and test AUC of the trainer beside DeepCTR-Torch and torch-rechub.

Every model trains one epoch of the same generated arrays (`ctr_data`) in a process of its own, with two threads, batch
4,096, dim 16 and the same network: one low-rank cross layer beside an MLP of 256-128. The models take turns in each
seed. Peers get label-encoded values, so that their tables have as many rows as there are values. The encoding is not in
their time; the lookup of values is in Tessera's. Everything is float32 first; Tessera trains once more in the precision
that `auto` takes on this processor. A peer trains once more, on as many rows as it manages in the seconds that Tessera
needed in float32. The floor (`ctr_worker`) is fbgemm's bare table and the same network, fed with prepared tensors.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from features.errors import TesseraError
from tessera.bench.harness.needs import CTR, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.offline.ctr_data import TrainingSpec, store
from tessera.bench.offline.ctr_worker import FLOOR, OURS
from tessera.bench.peers.ctr import BATCH, PeerRun

PEERS = ("deepctr", "rechub")
_MARKS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")


def training_speed(out: Path, *, seeds: int, console: Console, peers: Peers, rows: int = 400_000) -> BenchResult:
    """Measures the floor, Tessera and both peers in each seed, in turns.

    Args:
        out: Directory of the data and each run's figures.
        peers: may lack the peers' environment; then the floor and Tessera are measured alone.
        rows: training rows.

    Raises:
        TesseraError: a run fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    python = peers.python(CTR)
    flags = processor()
    console.print(f"training-speed: processor with {flags}")
    results = measured_rows()
    ceilings: list[float] = []
    for seed in range(seeds):
        spec = TrainingSpec(rows=rows, seed=seed)
        data = out / f"data-{seed}"
        ceilings.append(store(spec, data))
        seconds = 0.0
        for model in (FLOOR, *OURS, *(PEERS if python is not None else ())):
            console.print(f"training-speed: seed {seed}, {model}")
            measured = _run(python, model, data, spec, rows)
            row = {"model": model, "seed": seed, **as_row(measured)}
            if model == "tessera":
                seconds = measured.seconds
            row["equal_time_auc"] = measured.test_auc if model == "tessera" else None
            if model in PEERS:
                fit = min(rows, max(BATCH, int(rows * seconds / measured.seconds)))
                row["equal_time_auc"] = _run(python, model, data, spec, fit).test_auc
            results.append(row | {"best_auc": ceilings[-1], "processor": flags})
        shutil.rmtree(data)
    results += peers.rows("model")
    return BenchResult("training-speed", f"synthetic-zipf-{rows}", seeds, results, claims(results))


def as_row(measured: PeerRun) -> dict[str, Any]:
    """Returns a run's figures as the result shows them."""
    speed = {
        "samples_per_second": measured.rows / measured.seconds,
        "samples_per_cpu_second": measured.rows / measured.cpu_seconds,
    }
    return speed | {name: value for name, value in asdict(measured).items() if name != "rows"}


def processor() -> str:
    """Returns the features of the processor that decide how fast it multiplies, of those that Linux lists."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return " ".join(mark for mark in _MARKS if mark in flags) or "none of " + " ".join(_MARKS)


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """Returns the claims, all in float32 but one, judged in the seed with the worst result."""
    measured = [row for row in rows if "missing" not in row]
    by_model = {
        model: {row["seed"]: row for row in measured if row["model"] == model}
        for model in {row["model"] for row in measured}
    }

    def pairs(ours: str, theirs: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        return [(by_model[ours][seed], row) for seed, row in by_model[theirs].items()]

    speed, auc, at_time, memory = "samples_per_second", "test_auc", "equal_time_auc", "fit_gb"
    over_floor = min(a[speed] / b[speed] for a, b in pairs("tessera", FLOOR))
    judged = [
        at_least("samples/s, loader counted, over those of the floor", over_floor, 0.8),
        at_least(
            "samples/s in auto over float32", min(a[speed] / b[speed] for a, b in pairs("tessera-auto", "tessera")), 0.9
        ),
    ]
    for name in [peer for peer in PEERS if peer in by_model]:
        both = pairs("tessera", name)
        judged += [
            at_least(f"samples/s over those of {name}", min(a[speed] / b[speed] for a, b in both), 3.0),
            at_least(f"test AUC after equal samples less that of {name}", min(a[auc] - b[auc] for a, b in both), 0),
            at_least(
                f"test AUC after equal time less that of {name}", min(a[at_time] - b[at_time] for a, b in both), 0
            ),
            at_most(
                f"memory that training added (fit_gb) over that of {name}",
                max(a[memory] / b[memory] for a, b in both),
                0.5,
            ),
        ]
    return judged


def _run(python: Path | None, model: str, data: Path, spec: TrainingSpec, rows: int) -> PeerRun:
    result, log = data / f"{model}-{rows}.json", data / f"{model}-{rows}.log"
    same = [str(data), str(result), "--rows", str(rows), "--seed", str(spec.seed)]
    if model not in PEERS:
        command = [sys.executable, "-m", "tessera.bench.offline.ctr_worker", *same, "--model", model]
    else:
        command = [str(python), str(PEER_FOLDER / "ctr.py"), *same, "--peer", model]
    # Threads that spin while they wait starve each other on a machine that does other things as well.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise TesseraError(
            f"training-speed: {model} failed, see {log}; its last words: {log.read_text()[-500:].strip()}"
        )
    return PeerRun(**json.loads(result.read_text()))
