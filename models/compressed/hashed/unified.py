"""Feature multiplexing: salted lookups of all fields into one table (Coleman et al., NeurIPS 2023).

    e(v) = concat_j E[h(v; f, j)]        j < c lookups of width D / c

Collisions within a field are as rare as in a table of that whole size; the model can resolve those between fields.
Stored: the table; no dictionary.
"""

from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform


class Unified(EmbeddingMethod):
    """Two lookups of half the width. The knob is the table's rows."""

    name = "unified"
    lookups: ClassVar[int] = 2

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", shared_rows(fields, rows, self.lookups), persistent=False)
        self.weight = uniform((rows, dim // self.lookups), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        if dim % cls.lookups:
            raise ValueError(f"dim: expected a multiple of {cls.lookups} for {cls.name}, got {dim}")
        rows = largest(cls.name, range(1, 2**31), lambda rows: rows * dim // cls.lookups * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight).flatten(2)


class UnifiedOneLookup(Unified):
    """One lookup of full width: two values share the whole vector or none of it."""

    name = "unified-1"
    lookups = 1
