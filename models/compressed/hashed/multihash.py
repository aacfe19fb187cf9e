"""Several hashes, concatenated, each into a table of its own for each field ("PQ" in Coleman et al., NeurIPS 2023).

    e(v) = concat_j E_fj[h_fj(v)]        j < c tables of width D / c

Two values share a vector only if all c hashes agree. Stored: the tables; no dictionary.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import divide, field_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform


class MultiHash(EmbeddingMethod):
    """Two tables of half the width for each field. The knob is the rows of one of the two, of all fields together."""

    name = "multihash"
    tables: ClassVar[int] = 2

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        own = field_rows(fields, divide(rows, fields.sizes), self.tables)
        self.rows: Tensor
        self.register_buffer("rows", own + torch.arange(self.tables) * rows, persistent=False)
        self.weight = uniform((self.tables * rows, dim // self.tables), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        if dim % cls.tables:
            raise ValueError(f"dim: expected a multiple of {cls.tables} for {cls.name}, got {dim}")
        sizes = range(len(fields.names), 2**31)
        rows = largest(cls.name, sizes, lambda rows: rows * dim * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight).flatten(2)
