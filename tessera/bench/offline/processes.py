"""`processes`: training in several processes beside training in one, on the same batches: losses, test AUC, time.

The control trains in one process in another order of the examples: two orders differ by noise alone. The first seed is
trained twice in several processes, to compare the bits.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.ranker.evaluate import quality
from models.ranker.network import Ranker
from models.ranker.stored import load_ranker
from models.ranker.train import Checkpointing, TrainConfig, Watch, predict_part, train
from models.sharded.launch import Launch, train_in_processes
from models.sharded.messages import LOSSES
from models.table.admission import Admission, Sketch
from models.table.default_schema import default_schema
from models.table.row_files import row_files
from models.table.schema import Schema
from tessera.bench.harness.data import remembered
from tessera.bench.harness.result import BenchResult, Claim, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.offline.training_blocks import in_another_order
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

COUNT = 2
ONE, OTHER_ORDER, SEVERAL = "one process", "one process, other order", f"{COUNT} processes"
_FIRST, _MORE = 10, 100
_MOST_FIRST, _MOST_MORE, _MOST_AUC, _MOST_BYTES = 1e-6, 3e-4, 0.001, 0.6


def processes(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, options: RunOptions | None = None
) -> BenchResult:
    """Measures each seed in one process, in another order, and in several processes.

    Args:
        dataset: Dataset with its own split.
        out: Directory of the frame, and of kept results, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide initial values and the order of examples.
        console: Prints progress.
        options: Choices of the run; None for those of the descriptor.
    """
    chosen = load_options(dataset) if options is None else options
    run(dataset, out / "run", chosen, console=console, registry=None, until="frame")
    directory = out / "run" / "frame"
    frame = read_frame(directory)
    schema = default_schema(dataset, frame, chosen.shape, history_length=chosen.history_length)
    decided_by = dataset.model_dump(mode="json", exclude={"source"}), chosen.choices()
    rows = measured_rows()
    for seed in range(seeds):
        config = replace(chosen.train_config(), seed=seed, device="cpu", processes=COUNT)
        arms = {
            ONE: partial(_in_one, schema, frame, frame, config),
            OTHER_ORDER: partial(_in_one, schema, in_another_order(frame, seed), frame, config),
            SEVERAL: partial(_in_several, schema, frame, directory, config, out / f"seed-{seed}"),
        }
        if not seed:
            arms[f"{SEVERAL}, again"] = partial(_in_several, schema, frame, directory, config, out / "again")
        for name, work in arms.items():
            console.print(f"processes: seed {seed}, {name}")
            kept = out / f"{name.replace(',', '').replace(' ', '-')}-{seed}.json"
            rows.append({"seed": seed, "trained": name} | remembered(kept, __name__, (*decided_by, seed, name), work))
    found = claims(rows)
    shown = [{name: value for name, value in row.items() if name != "losses"} for row in rows]
    return BenchResult("processes", dataset.name, seeds, shown, found)


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges losses, AUC and bytes by the worst seed."""
    by_arm = {(row["seed"], row["trained"]): row for row in rows}
    pairs = [(by_arm[seed, ONE], by_arm[seed, SEVERAL]) for seed in sorted({row["seed"] for row in rows})]
    again = by_arm[0, SEVERAL]["sha256"] != by_arm[0, f"{SEVERAL}, again"]["sha256"]
    share = max(several["largest_share"] for _, several in pairs)
    auc = max(abs(several["test_auc"] - one["test_auc"]) for one, several in pairs)
    return [
        at_most(f"largest distance of the loss in {_FIRST} steps", _apart(pairs, _FIRST), _MOST_FIRST),
        at_most(f"largest distance of the loss in {_MORE} steps", _apart(pairs, _MORE), _MOST_MORE),
        at_most("largest distance of test AUC", auc, _MOST_AUC),
        at_most("largest share of the table's bytes in a process", share, _MOST_BYTES),
        at_most("repeats of several processes with other bits", float(again), 0),
    ]


def _apart(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], steps: int) -> float:
    return max(
        float(np.abs(np.subtract(one["losses"][:steps], several["losses"][:steps])).max()) for one, several in pairs
    )


def _in_one(schema: Schema, trained_on: Frame, frame: Frame, config: TrainConfig) -> dict[str, Any]:
    losses: list[float] = []
    began = time.perf_counter()
    trained = train(schema, trained_on, config, watch=Watch(losses.append))
    took = time.perf_counter() - began
    measured = _measured(schema, frame, trained.ranker, trained.sketch)
    return measured | {"epochs": len(trained.epochs), "seconds": took, "losses": losses[:_MORE]}


def _in_several(schema: Schema, frame: Frame, directory: Path, config: TrainConfig, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    launch = Launch(directory, out / "ranker", Checkpointing(out / "checkpoint"), watch=True)
    began = time.perf_counter()
    train_in_processes(schema, config, launch)
    took = time.perf_counter() - began
    losses = msgspec.json.decode((launch.work / LOSSES).read_bytes(), type=list[float])
    _, trained = load_ranker(launch.model, config, trains=False)
    files = row_files(launch.model)
    sizes = [path.stat().st_size for path in files]
    sha256 = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    measured = _measured(schema, frame, trained.ranker, trained.sketch)
    measured |= {"epochs": len(trained.epochs), "seconds": took, "losses": losses[:_MORE]}
    return measured | {"largest_share": max(sizes) / sum(sizes), "sha256": sha256[:16]}


def _measured(schema: Schema, frame: Frame, ranker: Ranker, sketch: Sketch) -> dict[str, Any]:
    test = frame.blocks("test")
    predicted = predict_part(ranker, schema, frame, test, Admission(sketch, schema.admission))
    labels = test.whole("label")["label"].to_numpy().astype(np.float32)
    return {"test_auc": quality(labels, predicted).auc}
