"""Hash Embeddings: hashed component rows, mixed by learned importances (Svenstrup et al., NeurIPS 2017).

    e(v) = sum_j p[h'(v), j] · E[h_j(v)]        j < 2

The importances p tell values apart that share both rows. Components and importances are shared by all fields, each
field hashing with its own salt; importances are hashed too, so no dictionary is stored. At most a quarter of the
budget goes to importances, and no more than one pair for each value there is.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform

_IMPORTANCE_SHARE = 4


class HashEmbeddings(EmbeddingMethod):
    """A weighted sum of two hashed rows. The knobs are the component rows and the importance rows."""

    name = "hash-embeddings"
    hashes: ClassVar[int] = 2

    def __init__(self, fields: Fields, dim: int, rows: int, importances: int, *, seed: int) -> None:
        super().__init__()
        self.rows: Tensor
        self.mixed_by: Tensor
        self.register_buffer("rows", shared_rows(fields, rows, self.hashes), persistent=False)
        chosen = shared_rows(fields, importances, 1, salt="importance ")[:, 0]
        self.register_buffer("mixed_by", chosen, persistent=False)
        self.weight = uniform((rows, dim), seeded(seed))
        # A sum of equal variances: the variance of the vector is then that of a component.
        self.importance = nn.Parameter(torch.full((importances, self.hashes), self.hashes**-0.5))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        pair = cls.hashes * FLOAT_BYTES
        row = dim * FLOAT_BYTES
        importances = max(1, min(fields.values, budget // _IMPORTANCE_SHARE // pair, (budget - row) // pair))
        rows = largest(cls.name, range(1, 2**31), lambda rows: rows * row + importances * pair, budget)
        return cls(fields, dim, rows, importances, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        importance = functional.embedding(self.mixed_by[codes], self.importance)
        return (functional.embedding(self.rows[codes], self.weight) * importance[..., None]).sum(2)
