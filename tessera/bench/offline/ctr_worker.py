"""Tessera's side of `training-speed`, and the floor: fbgemm's bare table under the same network.

Each runs in a process of its own, as the peers do, and writes its figures as JSON. No loader can be faster than the
floor, which is fed with prepared tensors.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.threads import fixed_threads
from models.ranker.loading import assembler, examples
from models.ranker.network import Network, NetworkConfig
from models.ranker.train import PrecisionChoice, TrainConfig, Trained, new_ranker, predict, train
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.reference import EPSILON, start_rows
from tessera.bench.offline.ctr_data import schema_of, star
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
TRAIN = TrainConfig(
    batch=BATCH,
    max_epochs=1,
    table_rate=0.03,
    network_rate=3e-3,
    threads=THREADS,
    network=NetworkConfig(cross_layers=CROSS_LAYERS, cross_rank=CROSS_RANK, hidden=HIDDEN),
)


def tessera(training: Arrays, test: Arrays, seed: int, config: TrainConfig = TRAIN) -> PeerRun:
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


def floor(training: Arrays, test: Arrays, seed: int, config: TrainConfig = TRAIN) -> PeerRun:
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
        logit: Tensor = network(pooled.transpose(0, 1).reshape(batch.size, -1), batch.numeric)
        return logit

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
    start_rows(table.split_embedding_weights()[0].detach(), torch.Generator().manual_seed(0))  # type: ignore[operator]
    return table


def worker(directory: Path, result: Path, rows: int, seed: int, model: str) -> None:
    """Runs the floor or Tessera's side on the stored arrays and writes `PeerRun` as JSON."""
    training, test = Arrays.load(directory / "train", rows), Arrays.load(directory / "test")
    if model == FLOOR:
        measured = floor(training, test, seed)
    else:
        measured = tessera(training, test, seed, replace(TRAIN, precision=OURS[model]))
    result.write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Runs Tessera's side of the benchmark in a process of its own.")
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--model", choices=(FLOOR, *OURS), required=True)
    given = parser.parse_args()
    worker(given.data, given.result, given.rows, given.seed, given.model)
