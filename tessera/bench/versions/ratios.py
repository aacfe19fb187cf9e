"""`streaming`: measures this version of the stream beside another commit, in turns on one machine.

Each version runs `worker.py` in an environment of its own, with one thread, on a bundle that it made from one dataset.
The two versions take turns, and every second pair begins with the other one. A ratio is of two neighbours.

- step: messages that become deltas in memory, events for a CPU second.
- items: messages about items whose text did not change, so that no text needs its encoder again.
- pipeline: Kafka → step → deltas → Redis, events for a second, on a real broker and a real Redis server.

Aggregates are off: the other commit may have none.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from tessera.bench.harness.against import other_python
from tessera.bench.harness.parts import chosen_parts
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.settings import Settings

VERSION_1 = "310ca4f"
PARTS = ("step", "items", "pipeline")
_WORKER = Path(__file__).parent / "worker.py"
# Batch sizes of each part, its figure that is claimed, and the least ratio of the two versions.
_CLAIMED = {
    "step": ((256, 1_024), "events_per_cpu_s", 1.7),
    "items": ((256,), "items_per_cpu_s", 20.0),
    "pipeline": ((256,), "events_per_s", 2.0),
}


def streaming(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    parts: Sequence[str] | None = None,
    commit: str = VERSION_1,
) -> BenchResult:
    """Measures both versions in `seeds` turns.

    Args:
        dataset: Dataset of a descriptor that both versions understand.
        out: Directory of the bundles.
        seeds: Number of turns. A seed decides with which message a turn begins.
        console: Shows progress.
        parts: Parts to measure, of `PARTS`.
        commit: The other version.
    """
    chosen = chosen_parts("streaming", parts, PARTS)
    settings = Settings.from_environment()
    if "pipeline" in chosen and not (settings.kafka and settings.redis):
        raise TesseraError(
            "bench streaming --part pipeline measures a real broker and a real Redis server: `make up`, then set "
            "TESSERA_KAFKA=host:port and TESSERA_REDIS=redis://host:port/0"
        )
    versions = {commit: other_python(commit), "this": Path(sys.executable)}
    for version, python in versions.items():
        if not (out / version / "bundle.txt").exists():
            console.print(f"offline job of {version}")
            (out / version).mkdir(parents=True, exist_ok=True)
            _run(python, out, version, "prepare", str(dataset.source.absolute()), *_without_aggregates(version))
    rows = measured_rows()
    for part in chosen:
        batches, name, _ = _CLAIMED[part]
        for batch in batches:
            for seed in range(seeds):
                order = sorted(versions, key=lambda version: version == "this", reverse=bool(seed % 2))
                with console.status(f"{part}, batch {batch}, seed {seed}"):
                    found = {version: _run(versions[version], out, version, part, batch, seed) for version in order}
                rows.append(_row(part, batch, seed, found["this"], found[commit], name))
    return BenchResult("streaming", dataset.name, seeds, rows, _claims(rows))


def _row(
    part: str, batch: int, seed: int, this: dict[str, float], other: dict[str, float], name: str
) -> dict[str, Any]:
    row: dict[str, Any] = {"part": part, "batch": batch, "seed": seed, "ratio": this[name] / other[name]}
    for figure in this.keys() & other.keys():
        row |= {figure: this[figure], f"other_{figure}": other[figure]}
    return row


def _claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges the mean ratio over the seeds; its spread stands beside it."""
    claims = []
    for part, batch in dict.fromkeys((row["part"], row["batch"]) for row in rows):
        ratios = [row["ratio"] for row in rows if (row["part"], row["batch"]) == (part, batch)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        claims.append(
            at_least(
                f"{part}, batch {batch}: {_CLAIMED[part][1]} over the other version's, mean ({spread})",
                float(np.mean(ratios)),
                _CLAIMED[part][2],
            )
        )
    return claims


def _without_aggregates(version: str) -> list[str]:
    return ["aggregates=off"] if version == "this" else []


def _run(python: Path, out: Path, version: str, part: str, *arguments: object) -> dict[str, float]:
    """Runs the worker with a version's Python. Returns its figures; those of `prepare` are none."""
    folder = (out / version).absolute()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TESSERA_HOME": str(folder / "home")}
    command = [str(python), str(_WORKER), part, str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise TesseraError(f"{part} of {version}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    if part == "prepare":
        return {}
    try:
        found: dict[str, float] = msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, float])
    except (IndexError, msgspec.DecodeError) as error:
        raise TesseraError(f"{part} of {version}: no figures in its output") from error
    return found
