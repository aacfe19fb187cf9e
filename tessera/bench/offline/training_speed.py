"""`training-speed`: samples a second, memory and test AUC of the trainer beside DeepCTR-Torch and torch-rechub.

Generated data: F categorical features of up to V values each, drawn from a Zipf law, and n numeric ones. Labels follow

    logistic(bias + Σ_f effect[f, value_f] + Σ_j weight_j (numeric_j - 1/2))

with normal effects, so that the best possible AUC is known. Every model trains one epoch of the same arrays in a
process of its own, with two threads, batch 4,096, dim 16 and the same network: one low-rank cross layer beside an MLP
of 256-128. The models take turns in each seed. Peers get label-encoded values, so that their tables have the rows there
are; the encoding is not in their time, looking values up is in Tessera's. Everything is float32 first; Tessera trains
once more in the precision that `auto` takes on this processor. A peer trains once more, on as many rows as it manages
in the seconds that Tessera needed in float32.

The floor is fbgemm's bare table and the same network, fed with prepared tensors: no loader can be faster.
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
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from features.errors import TesseraError
from features.frame import Frame
from features.threads import fixed_threads
from models.ranker.loading import assembler, examples
from models.ranker.network import Network, NetworkConfig
from models.ranker.train import PrecisionChoice, TrainConfig, Trained, new_ranker, predict, train
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.reference import EPSILON, start_rows
from models.table.schema import Feature, Numeric, Schema
from tessera.bench.harness.needs import CTR, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.peers.ctr import (
    BATCH,
    CROSS_LAYERS,
    CROSS_RANK,
    DIM,
    HIDDEN,
    THREADS,
    Arrays,
    Clock,
    PeerRun,
    measure,
    timed,
)

FLOOR = "floor"
OURS: dict[str, PrecisionChoice] = {"tessera": "float32", "tessera-auto": "auto"}
PEERS = ("deepctr", "rechub")
_MARKS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
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
    network=NetworkConfig(cross_layers=CROSS_LAYERS, cross_rank=CROSS_RANK, hidden=HIDDEN),
)


@dataclass(frozen=True)
class TrainingSpec:
    """Specification of the data: training and test rows, F features of V values, n numeric ones, the seed."""

    rows: int = 400_000
    test_rows: int = 50_000
    features: int = 26
    values: int = 100_000
    numeric: int = 13
    seed: int = 0


def generate(spec: TrainingSpec) -> tuple[Arrays, Arrays, NDArray[np.float64]]:
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
    """Returns the arrays as a frame whose events hold every feature, categorical values as strings."""
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
    """Returns one lookup a feature, and as many rows as the training part has distinct values."""
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


def tessera(training: Arrays, test: Arrays, seed: int, config: TrainConfig = _TRAIN) -> PeerRun:
    """Tessera's trainer, by its public API: from the frame to the end of the epoch.

    The seconds cover looking values up, building the model and the epoch, not the frame and not the last evaluation.
    """
    frame = star(training, test)
    schema = schema_of(frame)
    config = replace(config, seed=seed)
    left: list[Trained] = []
    # Torch and fbgemm import parts of themselves at first use, and imports are not timed.
    torch.optim.Adam(new_ranker(schema, config).network.parameters(), fused=True)

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

    measured = measure(len(training.labels), fit, score, test.labels)
    return replace(measured, precision=left[0].precision)


def floor(training: Arrays, test: Arrays, seed: int, config: TrainConfig = _TRAIN) -> PeerRun:
    """fbgemm's table and the same network, without anything that makes batches: rows and offsets are ready tensors."""
    frame = star(training, test)
    schema = replace(schema_of(frame), admission=0)
    network = Network(len(schema.features) * schema.dim + len(schema.numeric), config.network, seed=seed)
    table = _bare_table(schema.rows, config.table_rate)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.network_rate, fused=True)

    def ready(part: str, size: int) -> list[Batch]:
        rows = frame.part(part)
        source, every = assembler(schema, frame, rows, Admission.off()), examples(rows)
        starts = range(0, len(every), size)
        return [source.batch(every.take(np.arange(at, min(at + size, len(every))))) for at in starts]

    def logits(batch: Batch, offsets: Tensor) -> Tensor:
        pooled = table(batch.values, offsets).view(len(schema.features), batch.size, -1)
        found: Tensor = network(pooled.transpose(0, 1).reshape(batch.size, -1), batch.numeric)
        return found

    batches = ready("train", config.batch)
    offsets = [torch.arange(len(batch.values) + 1) for batch in batches]

    def fit() -> None:
        for batch, ends in zip(batches, offsets, strict=True):
            loss = functional.binary_cross_entropy_with_logits(logits(batch, ends), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def score() -> NDArray[np.float32]:
        held_out = ready("test", config.batch)
        return np.concatenate([logits(batch, torch.arange(len(batch.values) + 1)).numpy() for batch in held_out])

    with fixed_threads(config.threads):
        return measure(len(training.labels), lambda: timed(fit), score, test.labels)


def _bare_table(rows: int, rate: float) -> torch.nn.Module:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    table: torch.nn.Module = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=rate,
        eps=EPSILON,
        pooling_mode=PoolingMode.SUM,
    )
    start_rows(table.split_embedding_weights()[0].detach(), 0)  # type: ignore[operator]
    return table


def worker(directory: Path, result: Path, rows: int, seed: int, model: str) -> None:
    """Runs the floor or Tessera's side on the stored arrays and writes `PeerRun` as JSON."""
    training, test = Arrays.load(directory / "train", rows), Arrays.load(directory / "test")
    if model == FLOOR:
        measured = floor(training, test, seed)
    else:
        measured = tessera(training, test, seed, replace(_TRAIN, precision=OURS[model]))
    result.write_text(json.dumps(asdict(measured)))


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
    found = measured_rows()
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
            found.append(row | {"best_auc": ceilings[-1], "processor": flags})
        shutil.rmtree(data)
    found += peers.rows("model")
    return BenchResult("training-speed", f"synthetic-zipf-{rows}", seeds, found, claims(found))


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
    found = [
        at_least("samples/s, loader counted, over those of the floor", over_floor, 0.8),
        at_least(
            "samples/s in auto over float32", min(a[speed] / b[speed] for a, b in pairs("tessera-auto", "tessera")), 0.9
        ),
    ]
    for name in [peer for peer in PEERS if peer in by_model]:
        both = pairs("tessera", name)
        found += [
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
    return found


def store(spec: TrainingSpec, directory: Path) -> float:
    """Writes both parts as .npy, so that every process reads the same arrays; returns the best possible test AUC."""
    from sklearn.metrics import roc_auc_score

    training, test, probability = generate(spec)
    for name, part in (("train", training), ("test", test)):
        part.save(directory / name)
    return float(roc_auc_score(test.labels, probability))


def _run(python: Path | None, model: str, data: Path, spec: TrainingSpec, rows: int) -> PeerRun:
    result, log = data / f"{model}-{rows}.json", data / f"{model}-{rows}.log"
    same = [str(data), str(result), "--rows", str(rows), "--seed", str(spec.seed)]
    if model not in PEERS:
        command = [sys.executable, "-m", "tessera.bench.offline.training_speed", *same, "--model", model]
    else:
        command = [str(python), str(PEER_FOLDER / "ctr.py"), *same, "--peer", model]
    # Threads that spin while they wait starve each other on a machine that does other things as well.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as said:
        ended = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, env=environment, check=False)
    if ended.returncode:
        raise TesseraError(
            f"training-speed: {model} failed, see {log}; its last words: {log.read_text()[-500:].strip()}"
        )
    return PeerRun(**json.loads(result.read_text()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs Tessera's side of the benchmark in a process of its own.")
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", choices=(FLOOR, *OURS), required=True)
    given = parser.parse_args()
    worker(given.data, given.result, given.rows, given.seed, given.model)
