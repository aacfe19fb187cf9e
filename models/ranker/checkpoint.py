"""The checkpoint: the state with which training continues to the same bits, in one file that is whole or absent.

A training in several processes has a directory in place of the file, with a file of each process. The directory is
whole or absent as well.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from features.durable import write_file
from features.errors import TrainingError

_ABOUT = "tessera"


@dataclass(frozen=True)
class Position:
    """Position of a training run.

    Attributes:
        key: Hash of all that decides the run; training never continues from a checkpoint of another key.
        epoch: Running epoch, from 0.
        batches: Batches of that epoch that are done.
        losses: Validation log loss after each finished epoch.
        processes: Processes of the training.
    """

    key: str
    epoch: int
    batches: int
    losses: tuple[float, ...]
    processes: int = 1


def save(path: Path, position: Position, tensors: dict[str, Tensor]) -> None:
    """Writes a checkpoint durably, in place of the one before."""
    about = {_ABOUT: msgspec.json.encode(position).decode()}
    write_file(path, lambda aside: save_file(tensors, aside, metadata=about))


def load(path: Path, key: str) -> tuple[Position, dict[str, Tensor]] | None:
    """Reads a checkpoint; None if there is none, or one of another key."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        position = msgspec.json.decode(file.metadata()[_ABOUT], type=Position)
        if position.key != key:
            return None
        return position, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def part_of(directory: Path, process: int) -> Path:
    """Returns the file of one process in the checkpoint of several."""
    return directory / f"process-{process:05d}.safetensors"


def check_processes(path: Path, processes: int) -> None:
    """Checks that a checkpoint, if there is one, is of a training in this number of processes.

    Raises:
        TrainingError: The checkpoint is of another number; says how to keep it, and how to drop it.
    """
    file = path if path.is_file() else part_of(path, 0)
    if not file.is_file():
        return
    with safe_open(file, "pt") as opened:
        found = msgspec.json.decode(opened.metadata()[_ABOUT], type=Position).processes
    if found != processes:
        raise TrainingError(
            f"{path}: the stopped training has {found} processes, this command {processes}, and each holds other rows; "
            f"go on with --processes {found}, or remove {path.parent} to begin again"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns an optimizer's state as named tensors."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value.detach().to("cpu", copy=True)
        for number, found in state.items()
        for name, value in found.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores the tensors that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, field = name.partition(".")
        state.setdefault(int(number), {})[field] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
