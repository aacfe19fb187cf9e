"""The hashing trick in one table of all fields, one hash for all (Weinberger et al., ICML 2009).

    e(v) = E[h(v)]

The hash reads the value alone and no field name: two fields that hold the same word always share its row. This is the
difference from feature multiplexing with one lookup (`unified.py`), which salts the hash with the field.
Stored: the table; no dictionary.
"""

from typing import Self

from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import unsalted_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform


class SharedHashing(EmbeddingMethod):
    """One hashed row of the one table. The knob is its rows."""

    name = "shared-hashing"

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.register_buffer("rows", unsalted_rows(fields, rows)[:, 0], persistent=False)
        self.weight = uniform((rows, dim), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        rows = largest(cls.name, range(1, 2**31), lambda rows: rows * dim * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight)
