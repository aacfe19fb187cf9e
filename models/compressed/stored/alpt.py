"""ALPT: rows as integers with a learned scale for each (Li et al., AAAI 2023; the scale's gradient is that of LSQ).

    e(v) = s · round(clip(w / s, -127, 127))        ∂e/∂s = round(w / s) - w / s within, ±127 beyond

There are two departures. ALPT keeps the integers in training too and rounds at random; here training keeps floats,
since only the stored tensors are compared. And log s is learnt instead of s, so that Adam's one rate, which ALPT lowers
for s, moves a scale by a share of itself. Stored: the integers, the scales and the dictionary. There is no knob.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, INIT_BOUND, BudgetError, EmbeddingMethod, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes

_MOST = 127
_ROOM = 4  # factor by which a row may grow beyond its start before its scale must change


class Alpt(EmbeddingMethod):
    """A byte a coordinate and a learned scale a row."""

    name = "alpt"

    def __init__(self, fields: Fields, dim: int, *, seed: int) -> None:
        super().__init__()
        self.dictionary = Dictionary(fields)
        self.weight = uniform((fields.values, dim), seeded(seed))
        self.log_scale = nn.Parameter(torch.full((fields.values, 1), _ROOM * INIT_BOUND / _MOST).log())

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        least = fields.values * (dim + FLOAT_BYTES) + dictionary_bytes(fields.values, fields)
        if least > budget:
            raise BudgetError(cls.name, least, budget)
        return cls(fields, dim, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        ids = self.dictionary.ids[codes]
        scales = functional.embedding(ids, self.log_scale).exp()
        steps = (functional.embedding(ids, self.weight) / scales).clamp(-_MOST, _MOST)
        return (steps + (torch.round(steps) - steps).detach()) * scales

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        found = super().stored()
        steps = self.weight / self.log_scale.exp()
        return found | {"weight": torch.round(steps).clamp(-_MOST, _MOST).to(torch.int8)}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        super().restore(dict(stored) | {"weight": stored["weight"] * stored["log_scale"].exp()})
