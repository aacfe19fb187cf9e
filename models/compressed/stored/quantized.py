"""Rows as integers: symmetric uniform quantization with a scale for each row (as in Zhang et al., VLDB 2024).

    s = max|w| / (2^(b-1) - 1)        e(v) = s · round(w / s)        |e(v) - w| <= s / 2

Training uses the rounded rows; the gradient passes straight through to the float ones. Stored: the integers, the
scales and the dictionary. There is no knob.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes


class Quantized(EmbeddingMethod):
    """Base of INT8 and INT16; `integers` is the stored type."""

    integers: ClassVar[torch.dtype]

    def __init__(self, fields: Fields, dim: int, *, seed: int) -> None:
        super().__init__()
        self.dictionary = Dictionary(fields)
        self.weight = uniform((fields.values, dim), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        row = dim * cls.integers.itemsize + FLOAT_BYTES
        least = fields.values * row + dictionary_bytes(fields.values, fields)
        if least > budget:
            raise BudgetError(cls.name, least, budget)
        return cls(fields, dim, seed=seed)

    @classmethod
    def most(cls) -> int:
        """Returns the largest integer used; its negative is the smallest."""
        return torch.iinfo(cls.integers).max

    def forward(self, codes: Tensor) -> Tensor:
        rows = functional.embedding(self.dictionary.ids[codes], self.weight)
        with torch.no_grad():
            scales = self._scales(rows)
            off = torch.round(rows / scales) * scales - rows
        return rows + off

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        found = super().stored()
        scales = self._scales(self.weight)
        return found | {"weight": torch.round(self.weight / scales).to(self.integers), "scales": scales}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        floats = stored["weight"] * stored["scales"]
        super().restore({name: stored[name] for name in stored if name != "scales"} | {"weight": floats})

    def _scales(self, rows: Tensor) -> Tensor:
        """Returns scales (…, 1) of rows (…, D)."""
        return (rows.abs().amax(-1, keepdim=True) / self.most()).clamp(min=torch.finfo(torch.float32).tiny)


class Int8(Quantized):
    """A byte a coordinate."""

    name = "int8"
    integers = torch.int8


class Int16(Quantized):
    """Two bytes a coordinate."""

    name = "int16"
    integers = torch.int16
