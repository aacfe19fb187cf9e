"""Trains Tessera's network of a kind on the shared inputs, in a process of its own as the peer does.

python -m tessera.bench.rankers.worker --kind KIND RUN DATA RESULT --seed S
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.networks.kinds import DEFAULT
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig, Trained, new_ranker, predict_part, train
from models.table.admission import Admission
from models.table.schema import Schema
from tessera.bench.peers.ctr import measure, timed
from tessera.bench.peers.networks import (
    ATTENTION,
    BATCH,
    CROSS_LAYERS,
    CROSS_RANK,
    EPOCHS,
    HEADS,
    HIDDEN,
    PATIENCE,
    THREADS,
)
from tessera.pipeline.artifact import read_frame

_OPTIONS: dict[str, dict[str, Any]] = {"din": {"attention": ATTENTION}, "self-attention": {"heads": HEADS}}


def config_of(kind: str, seed: int) -> TrainConfig:
    """Returns the run's default training with the layers that the peer has."""
    own = NetworkConfig(cross_layers=CROSS_LAYERS, cross_rank=CROSS_RANK, hidden=HIDDEN)
    options = {"hidden": HIDDEN, **_OPTIONS.get(kind, {})}
    network = own if kind == DEFAULT else NetworkConfig(kind=kind, options=options)
    return TrainConfig(
        batch=BATCH, max_epochs=EPOCHS, patience=PATIENCE, threads=THREADS, seed=seed, device="cpu", network=network
    )


def trained(kind: str, run: Path, data: Path, seed: int) -> dict[str, Any]:
    """Trains the network to its early stop and scores the test part."""
    frame = read_frame(run / "frame")
    schema = Schema.from_json(json.loads((data / "schema.json").read_text()))
    config = config_of(kind, seed)
    test = frame.blocks("test")
    # Torch and fbgemm import parts of themselves at first use, and imports are not timed.
    fresh = new_ranker(schema, replace(config, max_epochs=1)).network
    torch.optim.Adam(fresh.parameters(), fused=True)
    left: list[Trained] = []

    def score() -> NDArray[np.float32]:
        return predict_part(left[0].ranker, schema, frame, test, Admission(left[0].sketch, schema.admission))

    labels = test.whole("label")["label"].to_numpy().astype(np.float32)
    run_figures = measure(
        frame.blocks("train").height,
        lambda: timed(lambda: left.append(train(schema, frame, config))),
        score,
        labels,
    )
    parameters = schema.rows * schema.dim + sum(own.numel() for own in fresh.parameters())
    return {**asdict(run_figures), "epochs": len(left[0].epochs), "parameters": parameters}


def main() -> None:
    """Trains one network and writes its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", required=True)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args()
    args.result.write_text(json.dumps(trained(args.kind, args.run, args.data, args.seed)))


if __name__ == "__main__":
    main()
