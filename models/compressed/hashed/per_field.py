"""The hashing trick, a table for each field (Weinberger et al., ICML 2009).

    e(v) = E_f[h_f(v)]        R_f rows of the fields in proportion to their sizes

Values that share a row cannot be told apart. Stored: the tables; no dictionary.
"""

from typing import Self

from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import divide, field_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform


class Hashing(EmbeddingMethod):
    """One hashed row of the field's own table. The knob is the rows of all tables together."""

    name = "hashing"

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", field_rows(fields, divide(rows, fields.sizes), 1)[:, 0], persistent=False)
        self.weight = uniform((rows, dim), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        sizes = range(len(fields.names), 2**31)
        rows = largest(cls.name, sizes, lambda rows: rows * dim * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight)
