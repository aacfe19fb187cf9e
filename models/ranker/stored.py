"""A trained ranker on the disk, with the schema it reads by and the sketch of the values it saw."""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from features.durable import write_file
from models.ranker.train import TrainConfig, Trained, new_ranker, restore, snapshot
from models.table.admission import Sketch
from models.table.schema import Schema


def save_ranker(directory: Path, schema: Schema, trained: Trained) -> None:
    """Writes a trained ranker into an existing empty directory, with the validation log loss of each epoch."""
    save_file(snapshot(trained.ranker), directory / "ranker.safetensors")
    save_file({"cells": torch.from_numpy(trained.sketch.cells)}, directory / "admission.safetensors")
    _write_json(directory / "schema.json", schema.to_json())
    epochs = {
        "validation_log_loss": list(trained.epochs),
        "precision": trained.precision,
        "device": dict(trained.device),
    }
    _write_json(directory / "epochs.json", epochs)


def load_ranker(directory: Path, config: TrainConfig) -> tuple[Schema, Trained]:
    """Reads what `save_ranker` wrote."""
    schema = Schema.from_json(msgspec.json.decode((directory / "schema.json").read_bytes()))
    ranker = new_ranker(schema, config)
    restore(ranker, load_file(directory / "ranker.safetensors"))
    sketch = Sketch(load_file(directory / "admission.safetensors")["cells"].numpy())
    kept = msgspec.json.decode((directory / "epochs.json").read_bytes())
    epochs = tuple(kept["validation_log_loss"])
    # Earlier releases trained on processors alone, and did not write it.
    return schema, Trained(ranker.eval(), sketch, epochs, device=kept.get("device", {"device": "cpu"}))


def _write_json(path: Path, data: object) -> None:
    write_file(path, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
