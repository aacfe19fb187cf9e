"""A trained ranker on the disk, with the schema it reads by and the sketch of the values it saw.

ranker.safetensors       network and rows, or the network alone if the rows are in files of their own
table/rows-*.safetensors rows of each process, if several trained the ranker; see `models.table.row_files`
admission.safetensors    sketch of the values' sightings
schema.json  epochs.json
"""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from features.durable import write_file
from features.errors import DatasetError
from models.ranker.network import DensePart, Ranker
from models.ranker.train import TrainConfig, Trained, new_ranker, restore, snapshot
from models.table.admission import Sketch
from models.table.row_files import FileTable, load_rows, row_files, write_rows
from models.table.schema import Schema

_STATE, _SKETCH, _NETWORK = "ranker.safetensors", "admission.safetensors", "network."


def save_ranker(directory: Path, schema: Schema, trained: Trained, *, ranges: int = 1) -> None:
    """Writes a trained ranker into an existing empty directory, with the validation log loss of each epoch.

    Args:
        directory: Directory to write to.
        schema: Schema of the ranker.
        trained: Ranker and the rest.
        ranges: Number of files of rows. 1 keeps the rows in the file of the network.
    """
    if ranges == 1:
        save_file(snapshot(trained.ranker), directory / _STATE)
        _save_rest(directory, schema, trained)
        return
    write_rows(directory, trained.ranker.table.weight, trained.ranker.table.accumulator, ranges=ranges)
    save_without_rows(directory, schema, trained)


def save_without_rows(directory: Path, schema: Schema, trained: Trained) -> None:
    """Writes a trained ranker as `save_ranker` does, without the rows, which each process writes itself."""
    state = {f"{_NETWORK}{name}": own.detach() for name, own in trained.ranker.network.state_dict().items()}
    save_file(state, directory / _STATE)
    _save_rest(directory, schema, trained)


def load_ranker(directory: Path, config: TrainConfig, *, trains: bool = True) -> tuple[Schema, Trained]:
    """Reads what `save_ranker` wrote.

    Args:
        directory: Directory of the ranker.
        config: Configuration of its training.
        trains: False leaves rows that are in files of their own there, and reads those that a batch asks for.

    Raises:
        DatasetError: The ranker has other tasks, or the same in another order.
    """
    kept = msgspec.json.decode((directory / "epochs.json").read_bytes())
    tasks, wanted = kept.get("tasks", []), list(config.network.tasks)
    if tasks != wanted:
        raise DatasetError(
            f"{directory}: its ranker has the outputs {', '.join(tasks) or 'of one label'}, this run has "
            f"{', '.join(wanted) or 'one label'}; declare the same [events.labels] in the same order, or train again"
        )
    schema = Schema.from_json(msgspec.json.decode((directory / "schema.json").read_bytes()))
    if not row_files(directory):
        ranker = new_ranker(schema, config)
        restore(ranker, load_file(directory / _STATE))
    elif trains:
        ranker = new_ranker(schema, config)
        load_rows(directory, schema, {"weight": ranker.table.weight, "accumulator": ranker.table.accumulator})
        load_network(directory, ranker)
    else:
        ranker = Ranker(FileTable(directory, schema), DensePart(schema, config.network, seed=config.seed))
        load_network(directory, ranker)
    epochs = tuple(kept["validation_log_loss"])
    # Earlier releases trained on processors alone, and did not write it.
    device = kept.get("device", {"device": "cpu"})
    return schema, Trained(ranker.eval(), load_sketch(directory), epochs, device=device)


def load_network(directory: Path, ranker: Ranker) -> None:
    """Reads the parameters of a ranker's network."""
    state: dict[str, Tensor] = load_file(directory / _STATE)
    own = {name.removeprefix(_NETWORK): value for name, value in state.items() if name.startswith(_NETWORK)}
    ranker.network.load_state_dict(own)


def save_sketch(directory: Path, sketch: Sketch) -> None:
    """Writes a sketch of sightings."""
    save_file({"cells": torch.from_numpy(sketch.cells)}, directory / _SKETCH)


def load_sketch(directory: Path) -> Sketch:
    """Reads a sketch of sightings."""
    return Sketch(load_file(directory / _SKETCH)["cells"].numpy())


def _save_rest(directory: Path, schema: Schema, trained: Trained) -> None:
    save_sketch(directory, trained.sketch)
    _write_json(directory / "schema.json", schema.to_json())
    epochs: dict[str, object] = {
        "validation_log_loss": list(trained.epochs),
        "precision": trained.precision,
        "device": dict(trained.device),
    }
    if trained.ranker.network.tasks is not None:
        epochs["tasks"] = list(trained.ranker.network.tasks.names)
    _write_json(directory / "epochs.json", epochs)


def _write_json(path: Path, data: object) -> None:
    write_file(path, msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n")
