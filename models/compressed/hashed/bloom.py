"""Several hashes into the field's table, summed (Serrà & Karatzoglou, RecSys 2017).

    e(v) = sum_j E_f[h_fj(v)]        j < 2

Stored: the tables; no dictionary.
"""

from typing import ClassVar, Self

from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import divide, field_rows
from models.compressed.method import FLOAT_BYTES, INIT_BOUND, EmbeddingMethod, largest, seeded, uniform


class Bloom(EmbeddingMethod):
    """The sum of two hashed rows of the field's own table. The knob is the rows of all tables together."""

    name = "bloom"
    hashes: ClassVar[int] = 2

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", field_rows(fields, divide(rows, fields.sizes), self.hashes), persistent=False)
        self.weight = uniform((rows, dim), seeded(seed), INIT_BOUND / self.hashes**0.5)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        sizes = range(len(fields.names), 2**31)
        rows = largest(cls.name, sizes, lambda rows: rows * dim * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight).sum(2)
