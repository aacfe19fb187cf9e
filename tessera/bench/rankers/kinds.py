"""`rankers`: the kinds of networks on one table, on the same rows: test AUC, and processor time of training.

Each kind trains with the run's settings on the schema that the run's ranker chose, once with its own options and the
same widths of hidden layers. A kind that reads a sequence gets the history item by item. The control that needs no
network is the users' and items' rates.

Beside torch-rechub's network of the same name each kind trains once more, on the inputs that both can read
(`shared`), each in a process of its own, in turns.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from features.frame import Frame
from models.networks.kinds import DEFAULT, KINDS, reads_sequence
from models.ranker.evaluate import RATE_BASELINES, quality
from models.ranker.network import NetworkConfig
from models.ranker.stored import load_ranker
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from models.table.schema import Feature, Schema
from tessera.bench.harness.data import remembered
from tessera.bench.harness.needs import CTR, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.peers.networks import THREADS
from tessera.bench.rankers.shared import shared_schema, store
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

_NAMES = (DEFAULT, *KINDS)
_MOST_BEHIND = 0.003
_STATIC = ("popularity", "user-item")
KINDS_PART, PEERS_PART = PARTS = ("kinds", "peers")
OURS, RECHUB = "tessera", "torch-rechub"
PAIRED = (DEFAULT, "deepfm", "din", "self-attention")
_FASTER = 1.5
_SPEED = "examples_per_cpu_s"


def rankers(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    peers: Peers,
    options: RunOptions | None = None,
    parts: Sequence[str] = PARTS,
) -> BenchResult:
    """Measures each kind in each seed.

    Args:
        dataset: Dataset with its own split.
        out: Directory of the run and of kept results, so that a later call continues there.
        seeds: Number of seeds, from 0; they decide initial values and the order of examples.
        console: Prints progress.
        peers: May lack torch-rechub. Then Tessera's networks are measured alone.
        options: Choices of the run; None for those of the descriptor.
        parts: `kinds` for all inputs, `peers` for those that torch-rechub can read.

    Raises:
        TesseraError: A training fails.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise TesseraError(f"--part {unknown[0]}: rankers has the parts {', '.join(PARTS)}")
    chosen = load_options(dataset) if options is None else options
    result = run(dataset, out / "run", chosen, console=console, registry=None, until="evaluate")
    frame = read_frame(out / "run" / "frame")
    schema, _ = load_ranker(out / "run" / "train" / "ranker", chosen.train_config())
    decided_by = dataset.model_dump(mode="json", exclude={"source"}), chosen.choices()
    rows = measured_rows()
    if KINDS_PART in parts:
        for name in RATE_BASELINES:
            rows.append({"kind": name, "seed": 0, "test_auc": result.metrics["quality"][name]["all"]["auc"]})
        for seed in range(seeds):
            for kind in _NAMES if seed % 2 else _NAMES[::-1]:
                console.print(f"rankers: seed {seed}, {kind}")
                network = chosen.training.network if kind == DEFAULT else NetworkConfig(kind=kind)
                config = replace(chosen.train_config(), seed=seed, device="cpu", network=network)
                kept = out / f"{kind}-{seed}.json"
                work = partial(_trained, for_kind(schema, kind), frame, config)
                rows.append({"kind": kind, "seed": seed} | remembered(kept, __name__, (*decided_by, seed, kind), work))
    if PEERS_PART in parts:
        python = peers.python(CTR)
        for kind in PAIRED:
            store(shared_schema(schema, kind), frame, out / "shared" / kind)
        for seed in range(seeds):
            for kind in PAIRED:
                shared = out / "shared" / kind
                for model in (OURS, RECHUB)[:: 1 if seed % 2 else -1] if python else (OURS,):
                    console.print(f"rankers: seed {seed}, {kind} of {model}")
                    kept = out / f"shared-{model}-{kind}-{seed}.json"
                    work = partial(_in_process, python if model == RECHUB else None, kind, out / "run", shared, seed)
                    named = {"kind": kind, "model": model, "seed": seed}
                    rows.append(named | remembered(kept, __name__, (*decided_by, seed, kind, model), work))
        rows += peers.rows("model")
    return BenchResult("rankers", dataset.name, seeds, rows, claims(rows))


def for_kind(schema: Schema, kind: str) -> Schema:
    """Returns the schema for a kind: with the history item by item if the kind reads a sequence, else its mean."""
    wide = {feature.column: feature.chunks for feature in schema.of("item")}
    sequence = reads_sequence(kind)

    def shaped(feature: Feature) -> Feature:
        if feature.of != "history" or not sequence or feature.column not in wide:
            return feature
        return replace(feature, pooling="attention", chunks=wide[feature.column])

    return replace(schema, features=tuple(shaped(feature) for feature in schema.features))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges the mean over the seeds."""

    def mean(kind: str, model: str | None = None, field: str = "test_auc") -> float:
        found = [row[field] for row in rows if row.get("kind") == kind and row.get("model") == model]
        return float(np.mean(found))

    judged = []
    for kind in sorted({row["kind"] for row in rows if row.get("model") == RECHUB}):
        less = mean(kind, OURS) - mean(kind, RECHUB)
        judged.append(at_least(f"test AUC of {kind} less that of {RECHUB}, the same inputs", less, -_MOST_BEHIND))
        faster = mean(kind, OURS, _SPEED) / mean(kind, RECHUB, _SPEED)
        judged.append(at_least(f"examples a CPU-second of {kind} over those of {RECHUB}", faster, _FASTER))
    if not any(row.get("kind") in _STATIC for row in rows):
        return judged
    means = {kind: mean(kind) for kind in _NAMES}
    # The running rates know labels of the test part, which a frozen ranker does not.
    rate = max(mean(name) for name in _STATIC)
    return [
        *judged,
        at_most("test AUC of the best kind over the default's", max(means.values()) - means[DEFAULT], _MOST_BEHIND),
        *(at_least(f"test AUC of {kind} over the best rate's", means[kind] - rate, 0.0) for kind in _NAMES),
    ]


def _in_process(python: Path | None, kind: str, run_directory: Path, shared: Path, seed: int) -> dict[str, Any]:
    """Trains one model on the shared inputs: torch-rechub's with an interpreter, Tessera's without."""
    result, log = shared / f"result-{seed}.json", shared / f"log-{seed}.txt"
    ends = [str(shared), str(result), "--seed", str(seed), "--kind", kind]
    if python:
        command = [str(python), str(PEER_FOLDER / "networks.py"), *ends]
    else:
        command = [sys.executable, "-m", "tessera.bench.rankers.worker", str(run_directory), *ends]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as output:
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise TesseraError(f"rankers: {kind} failed, see {log}; its last words: {log.read_text()[-500:].strip()}")
    measured = json.loads(result.read_text())
    examples = measured["rows"] * measured["epochs"]
    speeds = {"examples_per_s": examples / measured["seconds"], _SPEED: examples / measured["cpu_seconds"]}
    kept = ("test_auc", "epochs", "parameters", "peak_gb", "fit_gb", "precision")
    return {name: measured[name] for name in kept} | speeds


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
        _SPEED: examples / cpu_s,
        "parameters": sum(own.numel() for own in trained.ranker.network.parameters()),
    }
