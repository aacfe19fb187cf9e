"""Layers that several networks share."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.networks.inputs import NetworkInputs


def stack(width: int, hidden: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Returns linear layers, each with an activation behind it."""
    widths = [width, *hidden]
    return nn.Sequential(
        *(layer for one, two in itertools.pairwise(widths) for layer in (nn.Linear(one, two), activation()))
    )


def flat(inputs: NetworkInputs) -> Tensor:
    """Returns fields and numbers side by side, (B, F · D + N)."""
    return torch.cat([inputs.fields.flatten(1), inputs.numbers], dim=1)


def within(items: Tensor, visits: Tensor) -> Tensor:
    """Returns (B, L, 1) in the dtype of the items: 1 for a visited item, 0 for a slot behind the newest."""
    slots = torch.arange(items.shape[1], device=items.device)
    return (slots < visits.unsqueeze(1)).to(items.dtype).unsqueeze(2)
