"""Towers on the disk: the form in a bundle, and the form in the stage of a run, which has their rows too.

schema.json              schema of the towers, config, first row of their range
network.safetensors      dense part
admission.safetensors    sketch of the values' sightings in training
rows.safetensors         (R, D) rows of the range; in a stage alone, since a bundle's table has them
epochs.json              validation gain after each epoch; in a stage alone
"""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from features.durable import write_file
from features.errors import BundleError
from models.ranker.stored import load_sketch, save_sketch
from models.table.schema import Schema
from models.towers.config import TowerConfig
from models.towers.towers import Towers, empty_network
from models.towers.train import TrainedTowers

_ABOUT, _NETWORK, _ROWS, _EPOCHS = "schema.json", "network.safetensors", "rows.safetensors", "epochs.json"
_FILES = (_ABOUT, _NETWORK, "admission.safetensors")


def save_towers(directory: Path, towers: Towers) -> str:
    """Writes towers into an existing directory and returns their id, a hash of all their files."""
    about: dict[str, Any] = {"schema": towers.schema.to_json(), "config": asdict(towers.config), "start": towers.start}
    write_file(directory / _ABOUT, msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n")
    save_file(dict(towers.network.state_dict()), directory / _NETWORK)
    save_sketch(directory, towers.sketch)
    return towers_id(directory)


def load_towers(directory: Path) -> Towers:
    """Reads towers that `save_towers` wrote.

    Raises:
        BundleError: A file is missing, or does not fit the schema beside it.
    """
    path = directory / _ABOUT
    try:
        about = msgspec.json.decode(path.read_bytes())
        schema, config = Schema.from_json(about["schema"]), msgspec.convert(about["config"], TowerConfig)
        network = empty_network(schema, config)
        network.load_state_dict(load_file(directory / _NETWORK))
        return Towers(
            schema, config, network, load_sketch(directory), start=int(about["start"]), id=towers_id(directory)
        )
    except (OSError, KeyError, TypeError, RuntimeError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError(f"{directory}: its towers cannot be read ({error}); fetch the bundle again") from error


def towers_id(directory: Path) -> str:
    """Returns `towers-HASH` of the files that decide the towers, their rows aside."""
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update((directory / name).read_bytes())
    return f"towers-{digest.hexdigest()[:16]}"


def save_trained(directory: Path, trained: TrainedTowers) -> None:
    """Writes trained towers into the directory of a stage, with their rows."""
    save_file({"rows": torch.from_numpy(trained.rows)}, directory / _ROWS)
    write_file(directory / _EPOCHS, msgspec.json.encode({"gain": list(trained.gains)}))
    save_towers(directory, trained.towers)


def load_rows_of(directory: Path) -> NDArray[np.float32]:
    """Reads the rows (R, D) of the range of a stage's towers."""
    found: NDArray[np.float32] = load_file(directory / _ROWS)["rows"].numpy()
    return found
