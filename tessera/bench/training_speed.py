"""`training-speed`: samples a second, memory and test AUC of the trainer beside DeepCTR-Torch and torch-rechub.

Generated data: F categorical features of up to V values each, drawn from a Zipf law, and n numeric ones. Labels follow

    logistic(bias + Σ_f effect[f, value_f] + Σ_j weight_j (numeric_j - 1/2))

with normal effects, so that the best possible AUC is known. Every model trains one epoch of the same arrays in a
process of its own, with two threads, batch 4,096, dim 16 and an MLP of 256-128; the models take turns in each seed.
Tessera multiplies in bfloat16, which the peers do not offer, and once more in float32. A peer trains once more, on as
many rows as it manages in the seconds that Tessera needed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich.console import Console

from features.error import TesseraError
from features.frame import Frame
from models.admission import Admission
from models.loading import assembler, examples
from models.ranker import NetworkConfig
from models.schema import Feature, Numeric, Schema
from models.train import Precision, TrainConfig, Trained, predict, train
from tessera.bench.peer import PEER_FOLDER, peer_python
from tessera.bench.peers.ctr import BATCH, DIM, HIDDEN, THREADS, Arrays, Clock, Measured, measure
from tessera.bench.result import BenchResult, Claim, at_least, at_most

OURS: dict[str, Precision] = {"tessera": "bfloat16", "tessera-float32": "float32"}
PEERS = ("deepctr", "rechub")
_ZIPF, _BASE_RATE = 1.2, 0.25
_CATEGORICAL_STD, _NUMERIC_STD = 1.1, 0.5
# A part that decides nothing: with one epoch there is no other to choose.
_VALIDATION_ROWS = 64
_TRAIN = TrainConfig(
    batch=BATCH,
    max_epochs=1,
    table_rate=0.03,
    network_rate=3e-3,
    threads=THREADS,
    precision=OURS["tessera"],
    network=NetworkConfig(cross_layers=1, cross_rank=16, hidden=HIDDEN),
)


@dataclass(frozen=True)
class Spec:
    """What decides the data: training and test rows, F features of V values, n numeric ones, and the seed."""

    rows: int = 400_000
    test_rows: int = 50_000
    features: int = 26
    values: int = 100_000
    numeric: int = 13
    seed: int = 0


def generate(spec: Spec) -> tuple[Arrays, Arrays, NDArray[np.float64]]:
    """Draws the training and the test part, and the test rows' true probabilities."""
    rng = np.random.default_rng(spec.seed)
    count = spec.rows + spec.test_rows
    values = np.minimum(rng.zipf(_ZIPF, (count, spec.features)) - 1, spec.values - 1).astype(np.int32)
    numeric = rng.random((count, spec.numeric), dtype=np.float32)
    effect = rng.normal(0, _CATEGORICAL_STD / spec.features**0.5, (spec.features, spec.values))
    # A uniform number has the variance 1/12.
    weight = rng.normal(0, _NUMERIC_STD * (12 / spec.numeric) ** 0.5, spec.numeric)
    logit = (numeric - 0.5) @ weight
    for number in range(spec.features):
        logit += effect[number, values[:, number]]
    probability = _with_base_rate(logit)
    labels = (rng.random(count) < probability).astype(np.float32)
    parts = (slice(0, spec.rows), slice(spec.rows, None))
    first, second = (Arrays(values[part], numeric[part], labels[part]) for part in parts)
    return first, second, probability[spec.rows :]


def _with_base_rate(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = -20.0, 20.0
    for _ in range(50):
        bias = (low + high) / 2
        low, high = (bias, high) if np.mean(1 / (1 + np.exp(-logit - bias))) < _BASE_RATE else (low, bias)
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-logit - low))
    return probability


def star(training: Arrays, test: Arrays) -> Frame:
    """The arrays as a frame whose events hold every feature, categorical values as strings."""
    parts = {"train": training, "validation": training.head(_VALIDATION_ROWS), "test": test}
    tables = []
    for name, part in parts.items():
        columns = {f"C{number}": pl.Series(column).cast(pl.String) for number, column in enumerate(part.values.T)}
        columns |= {f"I{number}": pl.Series(column) for number, column in enumerate(part.numeric.T)}
        tables.append(
            pl.DataFrame(columns).with_columns(
                user=pl.lit(0, dtype=pl.UInt32),
                item=pl.lit(0, dtype=pl.UInt32),
                label=pl.Series(part.labels.astype(np.int8)),
                split=pl.lit(name),
                history=pl.lit([], dtype=pl.List(pl.UInt32)),
            )
        )
    events = pl.concat(tables).with_row_index("event")
    return Frame(pl.DataFrame({"user_id": ["only"]}), pl.DataFrame({"item_id": ["only"]}), events)


def schema_of(frame: Frame) -> Schema:
    """One lookup a feature, and as many rows as the training part has distinct values."""
    part = frame.part("train")
    categorical = [name for name in part.columns if name.startswith("C")]
    return Schema(
        features=tuple(Feature(name, "event", name, name) for name in categorical),
        numeric=tuple(
            # The mean and the deviation of log1p of a uniform number.
            Numeric(name, "event", name, mean=0.386, std=0.198)
            for name in part.columns
            if name.startswith("I")
        ),
        rows=sum(part[name].n_unique() for name in categorical),
        dim=DIM,
        history_length=1,
    )


def tessera(training: Arrays, test: Arrays, seed: int, config: TrainConfig = _TRAIN) -> Measured:
    """Tessera's trainer, by its public API: from the frame to the end of the epoch.

    The seconds cover looking values up, building the model and the epoch, not the frame and not the last evaluation.
    """
    frame = star(training, test)
    schema = schema_of(frame)
    config = replace(config, seed=seed)
    left: list[Trained] = []

    def fit() -> Clock:
        marks: list[tuple[float, float]] = []
        start, cpu = time.perf_counter(), time.process_time()

        def note(done: int, total: int) -> None:
            marks.append((time.perf_counter() - start, time.process_time() - cpu))

        left.append(train(schema, frame, config, progress=note))
        # The last call of all tells that the evaluation, too, is over.
        return Clock(*marks[-2], setup_seconds=marks[0][0])

    def score() -> NDArray[np.float32]:
        part = frame.part("test")
        source = assembler(schema, frame, part, Admission(left[0].sketch, schema.admission))
        return predict(left[0].ranker, source, examples(part))

    return measure(len(training.labels), fit, score, test.labels)


def worker(directory: Path, result: Path, rows: int, seed: int, precision: Precision) -> None:
    """Runs Tessera's side on the stored arrays and writes `Measured` as JSON."""
    training, test = Arrays.load(directory / "train", rows), Arrays.load(directory / "test")
    measured = tessera(training, test, seed, replace(_TRAIN, precision=precision))
    result.write_text(json.dumps(asdict(measured)))


def training_speed(out: Path, *, seeds: int, console: Console, rows: int = 400_000) -> BenchResult:
    """Measures all three models in each seed, in turns.

    Args:
        out: takes the peers' environment, the data and each run's figures.
        rows: training rows.

    Raises:
        TesseraError: the peers cannot be installed, or a run fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    python = peer_python(out / "peers", PEER_FOLDER / "ctr_requirements.txt", console)
    found: list[dict[str, Any]] = []
    ceilings: list[float] = []
    for seed in range(seeds):
        spec = Spec(rows=rows, seed=seed)
        data = out / f"data-{seed}"
        ceilings.append(store(spec, data))
        seconds = 0.0
        for model in (*OURS, *PEERS):
            console.print(f"training-speed: seed {seed}, {model}")
            measured = _run(python, model, data, spec, rows)
            row = {"model": model, "seed": seed, **as_row(measured)}
            if model == "tessera":
                seconds = measured.seconds
            if model in OURS:
                row["equal_time_auc"] = measured.test_auc if model == "tessera" else None
            else:
                fit = min(rows, max(BATCH, int(rows * seconds / measured.seconds)))
                row["equal_time_auc"] = _run(python, model, data, spec, fit).test_auc
            found.append(row | {"best_auc": ceilings[-1]})
        shutil.rmtree(data)
    return BenchResult("training-speed", f"synthetic-zipf-{rows}", seeds, found, claims(found))


def as_row(measured: Measured) -> dict[str, Any]:
    """A run's figures as the result shows them."""
    return {"samples_per_second": measured.rows / measured.seconds} | {
        name: value for name, value in asdict(measured).items() if name != "rows"
    }


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    """What is claimed, judged in the seed that speaks most against it."""
    by_model = {
        model: {row["seed"]: row for row in rows if row["model"] == model} for model in {row["model"] for row in rows}
    }
    pairs = [(ours, by_model["deepctr"][seed]) for seed, ours in by_model["tessera"].items()]
    speed, auc, at_time, memory = "samples_per_second", "test_auc", "equal_time_auc", "peak_gb"
    against = "DeepCTR-Torch's, worst seed"
    return [
        at_least(f"samples/s over {against}", min(ours[speed] / peer[speed] for ours, peer in pairs), 5.0),
        at_least("samples/s, worst seed", min(ours[speed] for ours, _ in pairs), 70_000),
        at_least(f"test AUC after equal samples less {against}", min(ours[auc] - peer[auc] for ours, peer in pairs), 0),
        at_least(f"test AUC after equal time less {against}", min(o[at_time] - p[at_time] for o, p in pairs), 0),
        at_most(
            f"peak resident memory of the process (libraries, data, model) over {against}",
            max(ours[memory] / peer[memory] for ours, peer in pairs),
            0.5,
        ),
        at_most(
            f"memory that the training added (fit_gb) over {against}",
            max(ours["fit_gb"] / peer["fit_gb"] for ours, peer in pairs),
            0.5,
        ),
    ]


def store(spec: Spec, directory: Path) -> float:
    """Writes both parts as .npy, so that every process reads the same arrays; returns the best possible test AUC."""
    from sklearn.metrics import roc_auc_score

    training, test, probability = generate(spec)
    for name, part in (("train", training), ("test", test)):
        part.save(directory / name)
    return float(roc_auc_score(test.labels, probability))


def _run(python: Path, model: str, data: Path, spec: Spec, rows: int) -> Measured:
    result, log = data / f"{model}-{rows}.json", data / f"{model}-{rows}.log"
    same = [str(data), str(result), "--rows", str(rows), "--seed", str(spec.seed)]
    if model in OURS:
        command = [sys.executable, "-m", "tessera.bench.training_speed", *same, "--precision", OURS[model]]
    else:
        command = [str(python), str(PEER_FOLDER / "ctr.py"), *same, "--peer", model, "--values", str(spec.values)]
    # Threads that spin while they wait starve each other on a machine that does other things as well.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as said:
        ended = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise TesseraError(
            f"training-speed: {model} failed, see {log}; its last words: {log.read_text()[-500:].strip()}"
        )
    return Measured(**json.loads(result.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs Tessera's side of the benchmark in a process of its own.")
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--precision", choices=get_args(Precision), required=True)
    given = parser.parse_args()
    worker(given.data, given.result, given.rows, given.seed, given.precision)
