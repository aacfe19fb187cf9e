"""The table without collisions: a row for each value; all other methods are compared with it.

Stored: N · D floats and the dictionary.
"""

from typing import Self

from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes


class Collisionless(EmbeddingMethod):
    """A row of its own for each value; it has no knob."""

    name = "collisionless"

    def __init__(self, fields: Fields, dim: int, *, seed: int) -> None:
        super().__init__()
        self.dictionary = Dictionary(fields)
        self.weight = uniform((len(self.dictionary), dim), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        least = fields.values * dim * FLOAT_BYTES + dictionary_bytes(fields.values, fields)
        if least > budget:
            raise BudgetError(cls.name, least, budget)
        return cls(fields, dim, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.dictionary.ids[codes], self.weight)
