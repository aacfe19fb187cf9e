"""Cross net and MLP of DCN-V2: TorchRec's, or plain twins where TorchRec is not installed.

TorchRec does not load without fbgemm. The twins have the same parameter names, shapes and order of
initialisation, so that a bundle trained with one is served by the other.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.table.engine import fused


class PlainCrossNet(nn.Module):
    """x ← x₀ ⊙ (W V x + b) + x, layer by layer (Wang et al., WWW 2021, eq. 3): (B, width) in and out."""

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        normal = nn.init.xavier_normal_
        self.W_kernels = nn.ParameterList([nn.Parameter(normal(torch.empty(width, rank))) for _ in range(layers)])
        self.V_kernels = nn.ParameterList([nn.Parameter(normal(torch.empty(rank, width))) for _ in range(layers)])
        self.bias = nn.ParameterList([nn.Parameter(torch.zeros(width)) for _ in range(layers)])

    def forward(self, start: Tensor) -> Tensor:
        found = start
        for outer, inner, bias in zip(self.W_kernels, self.V_kernels, self.bias, strict=True):
            found = start * (functional.linear(functional.linear(found, inner), outer) + bias) + found
        return found


class _Layer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self._linear = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self._linear(x))


class PlainMlp(nn.Module):
    """Linear layers with ReLU after each: (B, width) in, (B, hidden[-1]) out."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [width, *hidden]
        self._mlp = nn.Sequential(*[_Layer(a, b) for a, b in pairwise(widths)])

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._mlp(x)
        return found


def cross_net(width: int, layers: int, rank: int, *, plain: bool = False) -> nn.Module:
    """Returns a low-rank cross net, (B, width) float32 in and out. `plain` asks for the twin in any case."""
    module = None if plain else fused("torchrec.modules.crossnet")
    kind: type[nn.Module] = module.LowRankCrossNet if module else PlainCrossNet
    return kind(width, layers, rank)


def mlp(width: int, hidden: Sequence[int], *, plain: bool = False) -> nn.Module:
    """Returns an MLP with ReLU, (B, width) float32 in, (B, hidden[-1]) out. `plain` asks for the twin in any case."""
    module = None if plain else fused("torchrec.modules.mlp")
    kind: type[nn.Module] = module.MLP if module else PlainMlp
    return kind(width, list(hidden))
