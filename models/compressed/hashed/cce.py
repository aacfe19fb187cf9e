"""CCE: hashed rows become learned clusters between epochs (Tsang & Ahle, "Clustering the Sketch", NeurIPS 2023).

    e(v) = concat_j (M_j[a_j(v)] + H_j[h_j(v)])        j < 4 chunks of width D / 4, k rows in each M_j and H_j

At first the pointers a are hashes too. Between epochs the vectors of chunk j are clustered by k-means: M_j becomes
the centroids, a_j the assignment, and the helper H_j starts again at zero under a new hash, to split the clusters
further. All fields share the tables. Stored: M, H, the pointers packed into bits, the dictionary (a pointer belongs
to a value) and the number of clusterings, which decides the helper's hash.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform
from models.compressed.stored.bits import bits_for, pack, packed_bytes, unpack
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes

_ITERATIONS = 10
_AT_ONCE = 1_024


class Clustered(EmbeddingMethod):
    """A centroid plus a hashed row for each chunk. The knob is the rows of a chunk's table."""

    name = "cce"
    chunks: ClassVar[int] = 4
    clusterings: ClassVar[int] = 2

    def __init__(self, fields: Fields, dim: int, rows: int, *, seed: int) -> None:
        super().__init__()
        self._fields = fields
        self._generator = seeded(seed)
        self._table_rows = rows
        self.dictionary = Dictionary(fields)
        self.pointers: Tensor
        self.helpers: Tensor
        self.rounds: Tensor
        self.register_buffer("rounds", torch.zeros((), dtype=torch.int32))
        self.register_buffer("pointers", self._hashed("main"), persistent=False)
        self.register_buffer("helpers", self._hashed("helper 0"), persistent=False)
        width = dim // self.chunks
        self.main = uniform((self.chunks * rows, width), self._generator)
        self.helper = nn.Parameter(torch.zeros(self.chunks * rows, width))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        if dim % cls.chunks:
            raise ValueError(f"dim: expected a multiple of {cls.chunks} for {cls.name}, got {dim}")

        def bytes_at(rows: int) -> int:
            pointers = packed_bytes(fields.values * cls.chunks, bits_for(rows))
            return 2 * rows * dim * FLOAT_BYTES + pointers + dictionary_bytes(fields.values, fields) + 4

        return cls(fields, dim, largest(cls.name, range(2, fields.values + 1), bytes_at, budget), seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        main = functional.embedding(self.pointers[codes], self.main)
        return (main + functional.embedding(self.helpers[codes], self.helper)).flatten(2)

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        """Clusters after each of the first epochs; the remaining epochs train the tables alone."""
        if epoch >= self.clusterings:
            return
        vectors = self.main[self.pointers] + self.helper[self.helpers]
        for chunk in range(self.chunks):
            centroids, assigned = _k_means(vectors[:, chunk], self._table_rows, self._generator)
            start = chunk * self._table_rows
            self.main[start : start + self._table_rows] = centroids
            self.pointers[:, chunk] = assigned + start
        self.helper.zero_()
        self.rounds += 1
        self.helpers.copy_(self._hashed(f"helper {int(self.rounds)}"))

    def stored(self) -> dict[str, Tensor]:
        by_id = torch.empty_like(self.pointers)
        by_id[self.dictionary.ids] = self.pointers - self._starts()
        return super().stored() | {"pointers": pack(by_id, bits_for(self._table_rows))}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        super().restore({name: tensor for name, tensor in stored.items() if name != "pointers"})
        by_id = unpack(stored["pointers"], bits_for(self._table_rows), tuple(self.pointers.shape))
        self.pointers.copy_(by_id[self.dictionary.ids] + self._starts())
        self.helpers.copy_(self._hashed(f"helper {int(self.rounds)}"))

    def _starts(self) -> Tensor:
        return torch.arange(self.chunks) * self._table_rows

    def _hashed(self, salt: str) -> Tensor:
        return shared_rows(self._fields, self._table_rows, self.chunks, salt=f"{salt} ") + self._starts()


def _k_means(points: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clusters points (N, d) by Lloyd's algorithm from random points: centroids (K, d), assignment (N,) int64."""
    centroids = points[torch.randperm(len(points), generator=generator)[:clusters]].clone()
    for _ in range(_ITERATIONS):
        assigned = _nearest(points, centroids)
        count = torch.bincount(assigned, minlength=clusters)[:, None]
        total = torch.zeros_like(centroids).index_add_(0, assigned, points)
        # A cluster that is nearest to no point keeps its centroid.
        centroids = torch.where(count > 0, total / count.clamp(min=1), centroids)
    return centroids, _nearest(points, centroids)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part, centroids).argmin(1) for part in points.split(_AT_ONCE)])
