"""AdaptEmb: frequent values have rows of their own, the rest share hashed ones (as in Zhang et al., VLDB 2024).

    e(v) = E[id(v)] for the most frequent values in training, else S[h(v)]

If there are enough values, half the budget goes to rows of their own. Stored: both tables, and the dictionary of the
frequent values alone. The knob is the number of frequent values.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, largest, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes


class Adaptive(EmbeddingMethod):
    """Table of exact rows, then hashed rows.

    Args:
        frequent: Number of values with a row of their own.
        rows: Number of rows of all other values.
    """

    name = "adaptive"

    def __init__(self, fields: Fields, dim: int, frequent: int, rows: int, *, seed: int) -> None:
        super().__init__()
        chosen = np.zeros(fields.values, dtype=bool)
        chosen[np.argsort(-fields.counts, kind="stable")[:frequent]] = True
        self.dictionary = Dictionary(fields, chosen)
        self.hashed: Tensor
        self.register_buffer("hashed", shared_rows(fields, rows, 1)[:, 0] + frequent, persistent=False)
        self.weight = uniform((frequent + rows, dim), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        row = dim * FLOAT_BYTES

        def exact(frequent: int) -> int:
            return frequent * row + dictionary_bytes(frequent, fields)

        least = exact(1) + row
        if least > budget:
            raise BudgetError(cls.name, least, budget)
        frequent = largest(cls.name, range(1, fields.values + 1), exact, max(budget // 2, exact(1)))
        rows = largest(cls.name, range(1, 2**31), lambda rows: rows * row + exact(frequent), budget)
        return cls(fields, dim, frequent, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        own = self.dictionary.ids[codes]
        return functional.embedding(torch.where(own >= 0, own, self.hashed[codes]), self.weight)
