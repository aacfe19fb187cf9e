"""TT-Rec: a table as a train of three small tensors (Yin et al., MLSys 2021).

    e(v)[a, b, c] = G1[i1][a, :] · G2[i2][:, b, :] · G3[i3][:, c]        x = (i1 · n2 + i2) · n3 + i3,  D = d1 · d2 · d3

All fields share one train. x is hashed (with the field's name as salt) into a range about sixteen times the number of
values and is not the value's dense id: no dictionary is stored, and few values share an x. Cores start normal with
deviation (σ / r)^(1/3), so that a product summed over r² paths starts with the usual deviation σ.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, INIT_STD, EmbeddingMethod, largest, seeded

_SPREAD = 16


class TensorTrain(EmbeddingMethod):
    """Three cores. The knob is the rank."""

    name = "tensor-train"

    def __init__(self, fields: Fields, dim: int, rank: int, *, seed: int) -> None:
        super().__init__()
        self.side = _side(fields)
        self.shape = _factors(dim)
        self.rank = rank
        place = shared_rows(fields, self.side**3, 1)[:, 0]
        self.pairs: Tensor
        self.thirds: Tensor
        self.register_buffer("pairs", place // self.side, persistent=False)
        self.register_buffer("thirds", place % self.side, persistent=False)
        generator, deviation = seeded(seed), (INIT_STD / rank) ** (1 / 3)
        first, second, third = self.shape

        def core(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(self.side, *size, generator=generator) * deviation)

        self.first, self.second, self.third = core(first, rank), core(rank, second * rank), core(rank, third)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        side, (first, second, third) = _side(fields), _factors(dim)

        def bytes_at(rank: int) -> int:
            return side * (first * rank + rank * second * rank + rank * third) * FLOAT_BYTES

        return cls(fields, dim, largest(cls.name, range(1, 2**12), bytes_at, budget), seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        first, second, third = self.shape
        # All n1 · n2 products of the first two cores are computed at once in one matrix product. A batch would instead
        # gather the middle core, the largest, once for each of its values.
        left = self.first.reshape(-1, self.rank) @ self.second.permute(1, 0, 2).reshape(self.rank, -1)
        left = left.view(self.side, first, self.side, second * self.rank).transpose(1, 2)
        left = left.reshape(self.side**2, first * second * self.rank)
        flat = codes.flatten()
        of_pairs = functional.embedding(self.pairs[flat], left).view(-1, first * second, self.rank)
        of_thirds = functional.embedding(self.thirds[flat], self.third.flatten(1)).view(-1, self.rank, third)
        return torch.bmm(of_pairs, of_thirds).view(*codes.shape, -1)


def _side(fields: Fields) -> int:
    """Returns the n of each core: n³ places for the hash."""
    return math.ceil(math.cbrt(_SPREAD * fields.values))


def _factors(dim: int) -> tuple[int, int, int]:
    """Returns three factors of D, as equal as possible: the middle is the smallest, the others ascend."""
    found = [
        (a, b, dim // a // b) for a in range(1, dim + 1) if dim % a == 0 for b in range(1, dim + 1) if dim // a % b == 0
    ]
    low, middle, high = min((tuple(sorted(one)) for one in found), key=lambda one: one[2] - one[0])
    return middle, low, high
