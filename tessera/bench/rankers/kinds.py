"""`rankers`: the kinds of networks on one table, on the same rows: test AUC, and processor time of training.

Each kind trains with the run's settings on the schema that the run's ranker chose, once with its own options and the
same widths of hidden layers. The control that needs no network is the users' and items' rates.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.networks.kinds import DEFAULT, KINDS
from models.ranker.evaluate import RATE_BASELINES, quality
from models.ranker.network import NetworkConfig
from models.ranker.stored import load_ranker
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from models.table.schema import Schema
from tessera.bench.harness.data import remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

_NAMES = (DEFAULT, *KINDS)
_MOST_BEHIND = 0.003
_STATIC = ("popularity", "user-item")


def rankers(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, options: RunOptions | None = None
) -> BenchResult:
    """Measures each kind in each seed.

    Args:
        dataset: Dataset with its own split.
        out: Directory of the run and of kept results, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide initial values and the order of examples.
        console: Prints progress.
        options: Choices of the run; None for those of the descriptor.
    """
    chosen = load_options(dataset) if options is None else options
    result = run(dataset, out / "run", chosen, console=console, registry=None, until="evaluate")
    frame = read_frame(out / "run" / "frame")
    schema, _ = load_ranker(out / "run" / "train" / "ranker", chosen.train_config())
    decided_by = dataset.model_dump(mode="json", exclude={"source"}), chosen.choices()
    rows = measured_rows()
    for name in RATE_BASELINES:
        rows.append({"kind": name, "seed": 0, "test_auc": result.metrics["quality"][name]["all"]["auc"]})
    for seed in range(seeds):
        for kind in _NAMES if seed % 2 else _NAMES[::-1]:
            console.print(f"rankers: seed {seed}, {kind}")
            network = chosen.training.network if kind == DEFAULT else NetworkConfig(kind=kind)
            config = replace(chosen.train_config(), seed=seed, device="cpu", network=network)
            kept = out / f"{kind}-{seed}.json"
            work = partial(_trained, schema, frame, config)
            rows.append({"kind": kind, "seed": seed} | remembered(kept, __name__, (*decided_by, seed, kind), work))
    return BenchResult("rankers", dataset.name, seeds, rows, claims(rows))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges the mean over the seeds."""

    def mean(kind: str) -> float:
        return float(np.mean([row["test_auc"] for row in rows if row["kind"] == kind]))

    means = {kind: mean(kind) for kind in _NAMES}
    # The running rates know labels of the test part, which a frozen ranker does not.
    rate = max(mean(name) for name in _STATIC)
    return [
        at_most("test AUC of the best kind over the default's", max(means.values()) - means[DEFAULT], _MOST_BEHIND),
        *(at_least(f"test AUC of {kind} over the best rate's", means[kind] - rate, 0.0) for kind in _NAMES),
    ]


def _trained(schema: Schema, frame: Frame, config: TrainConfig) -> dict[str, Any]:
    began = time.process_time()
    trained = train(schema, frame, config)
    cpu_s = time.process_time() - began
    test = frame.blocks("test")
    predicted = predict_part(trained.ranker, schema, frame, test, Admission(trained.sketch, schema.admission))
    labels = test.whole("label")["label"].to_numpy().astype(np.float32)
    found = quality(labels, predicted)
    examples = len(trained.epochs) * frame.blocks("train").height
    return {
        "test_auc": found.auc,
        "test_log_loss": found.log_loss,
        "epochs": len(trained.epochs),
        "examples_per_cpu_s": examples / cpu_s,
        "parameters": sum(own.numel() for own in trained.ranker.network.parameters()),
    }
