"""The checkpoint: the state with which training continues to the same bits, in one file that is whole or absent."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from features.durable import write_file

_ABOUT = "tessera"


@dataclass(frozen=True)
class Position:
    """Position of a training run.

    Attributes:
        key: Hash of all that decides the run; training never continues from a checkpoint of another key.
        epoch: Running epoch, from 0.
        batches: Batches of that epoch that are done.
        losses: Validation log loss after each finished epoch.
    """

    key: str
    epoch: int
    batches: int
    losses: tuple[float, ...]


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
