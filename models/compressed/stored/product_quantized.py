"""Product quantization learned end to end: DPQ (Chen et al., ICML 2020, vector-quantized form) and MGQE,
which gives infrequent values fewer codes (Kang et al., WWW 2020).

    code_j(v) = argmin_k |q_j(v) - C_j[k]|        e(v) = concat_j C_j[code_j(v)]        j < p parts

Training keeps the queries q. Their gradient is the vector's, passed straight through, and the regulariser |sg(c) - q|²
draws a query towards its centroid. Centroids learn from the gradient of the vectors they represent (DPQ moves them by a
regulariser alone). All fields share the codebooks. Stored: codebooks, codes packed into bits, dictionary; for MGQE also
one bit a value that says if it is frequent.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, seeded, uniform
from models.compressed.stored.bits import pack, packed_bytes, unpack
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes

_PARTS = (1, 2, 4, 8, 16)
_MOST_BITS = 8
_COMMITMENT = 1.0


class ProductQuantized(EmbeddingMethod):
    """DPQ. The knobs are parts and bits of a code: as many bits a value as the budget holds, at most 16 · 8.

    Args:
        parts: p.
        bits: Bits of a part's code; 2**bits centroids.
    """

    name = "dpq"
    frequent_share: ClassVar[float] = 1.0
    fewer_bits: ClassVar[int] = 0

    def __init__(self, fields: Fields, dim: int, parts: int, bits: int, *, seed: int) -> None:
        super().__init__()
        generator = seeded(seed)
        self.parts, self.bits = parts, bits
        self.dictionary = Dictionary(fields)
        self.books = uniform((parts, 2**bits, dim // parts), generator)
        self.queries = uniform((fields.values, dim), generator)
        self.frequent: Tensor
        self.codes: Tensor
        order = np.argsort(-fields.counts, kind="stable")[: _frequent(fields, self.frequent_share)]
        frequent = torch.zeros(fields.values, dtype=torch.bool)
        frequent[self.dictionary.ids[torch.from_numpy(order)]] = True
        self.register_buffer("frequent", frequent, persistent=False)
        self.register_buffer("codes", torch.zeros(fields.values, parts, dtype=torch.uint8), persistent=False)
        self._served = False
        self._regulariser = torch.zeros(())

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        knobs = [(p, bits) for p in _PARTS if dim % p == 0 for bits in range(1 + cls.fewer_bits, _MOST_BITS + 1)]
        needed = {knob: cls._bytes(fields, dim, *knob) for knob in knobs}
        if min(needed.values()) > budget:
            raise BudgetError(cls.name, min(needed.values()), budget)
        # For equally many bits a value, more centroids for fewer parts distinguish more vectors.
        parts, bits = max((knob for knob in knobs if needed[knob] <= budget), key=lambda k: (k[0] * k[1], k[1]))
        return cls(fields, dim, parts, bits, seed=seed)

    @classmethod
    def _bytes(cls, fields: Fields, dim: int, parts: int, bits: int) -> int:
        many = _frequent(fields, cls.frequent_share)
        few = fields.values - many
        codes = packed_bytes(many * parts, bits) + packed_bytes(few * parts, bits - cls.fewer_bits)
        flags = packed_bytes(fields.values, 1) if cls.fewer_bits else 0
        return (dim * FLOAT_BYTES << bits) + codes + flags + dictionary_bytes(fields.values, fields)

    def forward(self, codes: Tensor) -> Tensor:
        ids = self.dictionary.ids[codes]
        if self._served and not self.training:
            return self._decode(self.codes[ids.flatten()].long()).view(*codes.shape, -1)
        values, place = torch.unique(ids, return_inverse=True)
        queries = self.queries.index_select(0, values)
        chosen = self._decode(self._nearest(queries.detach(), self.frequent[values]))
        self._regulariser = _COMMITMENT * (queries - chosen.detach()).square().sum(1).mean()
        vectors = chosen + (queries - queries.detach())
        return vectors.index_select(0, place.flatten()).view(*codes.shape, -1)

    def loss(self) -> Tensor:
        return self._regulariser

    def train(self, mode: bool = True) -> Self:
        self._served = self._served and not mode
        return super().train(mode)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        codes = self.codes.long() if self._served else self._nearest(self.queries, self.frequent)
        found = super().stored()
        del found["queries"]
        found["codes"] = pack(codes[self.frequent], self.bits)
        if self.fewer_bits:
            found["rare_codes"] = pack(codes[~self.frequent], self.bits - self.fewer_bits)
            found["frequent"] = pack(self.frequent, 1)
        return found

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Restores stored tensors; in evaluation, vectors are then decoded from codes."""
        state = {name: stored[name] for name in self.state_dict() if name in stored}
        self.load_state_dict(state | {"queries": self.queries})
        if self.fewer_bits:
            self.frequent.copy_(unpack(stored["frequent"], 1, tuple(self.frequent.shape)).bool())
        many = int(self.frequent.sum())
        self.codes[self.frequent] = unpack(stored["codes"], self.bits, (many, self.parts)).to(torch.uint8)
        if self.fewer_bits:
            shape = (len(self.frequent) - many, self.parts)
            self.codes[~self.frequent] = unpack(stored["rare_codes"], self.bits - self.fewer_bits, shape).to(
                torch.uint8
            )
        self.queries.copy_(self._decode(self.codes.long()))
        self._served = not self.training

    def _decode(self, codes: Tensor) -> Tensor:
        """Returns the vectors (V, D) of codes (V, p)."""
        starts = torch.arange(self.parts) << self.bits
        return torch.nn.functional.embedding(codes + starts, self.books.flatten(0, 1)).flatten(1)

    @torch.no_grad()
    def _nearest(self, queries: Tensor, frequent: Tensor) -> Tensor:
        """Returns codes (V, p) int64 of queries (V, D); infrequent queries choose among the first centroids only."""
        parted = queries.view(len(queries), self.parts, -1).transpose(0, 1).contiguous()
        apart = torch.cdist(parted, self.books, compute_mode="donot_use_mm_for_euclid_dist")
        if self.fewer_bits:
            apart[:, ~frequent, 2 ** (self.bits - self.fewer_bits) :] = torch.inf
        return apart.argmin(2).transpose(0, 1)


class MultiGranular(ProductQuantized):
    """MGQE: the most frequent tenth of the values has four times as many codes as the others."""

    name = "mgqe"
    frequent_share = 0.1
    fewer_bits = 2


def _frequent(fields: Fields, share: float) -> int:
    return max(1, round(share * fields.values))
