"""Compositional embeddings: a quotient's row times a remainder's row (Shi et al., KDD 2020).

    e(v) = Q_f[x div m_f] ∘ E_f[x mod m_f]        x = h_f(v) in [0, q_f · m_f)

Here x is hashed into the range of all pairs and is not the value's dense id, so no dictionary is stored. With q and m
alike, R_f rows have R_f² / 4 pairs, and two values of a field rarely share a pair. A field whose rows make no more
pairs than rows is hashed plainly, with a fixed quotient. Factors start with the root of the usual deviation, so that
their product starts with the usual deviation. Stored: both tables.
"""

from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import divide, field_rows
from models.compressed.method import FLOAT_BYTES, INIT_STD, EmbeddingMethod, largest, seeded, uniform

_LEAST = 2


class QuotientRemainder(EmbeddingMethod):
    """The product of two rows. The knob is the rows of all tables together."""

    name = "quotient-remainder"

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        own = divide(rows, fields.sizes, least=_LEAST)
        quotients = np.where(own > 4, own // 2, 1)
        remainders = own - quotients
        of = np.repeat(np.arange(len(own)), fields.sizes)
        pairs = quotients * remainders
        cell = field_rows(fields, pairs, 1)[:, 0].numpy() - (np.cumsum(pairs) - pairs)[of]
        start = (np.cumsum(own) - own)[of]
        addresses = np.stack([start + cell // remainders[of], start + quotients[of] + cell % remainders[of]], axis=1)
        self.rows: Tensor
        self.register_buffer("rows", torch.from_numpy(addresses), persistent=False)
        self.weight = uniform((rows, dim), seeded(seed), (3 * INIT_STD) ** 0.5)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        sizes = range(_LEAST * len(fields.names), 2**31)
        rows = largest(cls.name, sizes, lambda rows: rows * dim * FLOAT_BYTES, budget)
        return cls(fields, dim, rows, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        return functional.embedding(self.rows[codes], self.weight).prod(2)
