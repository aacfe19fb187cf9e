"""ROBE-Z: blocks of Z floats out of one circular array (Desai et al., MLSys 2022); Z = 1 is HashedNets' addressing
(Chen et al., ICML 2015).

    e(v)[b·Z + i] = s(v, b) · A[(h(v, b) + i) mod P]        i < Z, s = ±1

Blocks may begin anywhere and overlap; a block that reaches the array's end continues at its beginning. Fields are
hashed with their names as salts into the one array. Stored: the array; no dictionary.
"""

from typing import ClassVar, Self

import torch
from torch import Tensor

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform


class Robe(EmbeddingMethod):
    """Blocks of eight floats. The knob is the array's length."""

    name = "robe"
    block: ClassVar[int] = 8

    def __init__(self, fields: Fields, dim: int, length: int, *, seed: int) -> None:
        super().__init__()
        blocks = dim // self.block
        self.starts: Tensor
        self.signs: Tensor
        self.inside: Tensor
        self.register_buffer("starts", shared_rows(fields, length, blocks), persistent=False)
        signs = shared_rows(fields, 2, blocks, salt="sign ").float() * 2 - 1
        self.register_buffer("signs", signs, persistent=False)
        self.register_buffer("inside", torch.arange(self.block), persistent=False)
        self.array = uniform((length,), seeded(seed))

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        if dim % cls.block:
            raise ValueError(f"dim: expected a multiple of {cls.block} for {cls.name}, got {dim}")
        length = largest(cls.name, range(cls.block, 2**31), lambda length: length * FLOAT_BYTES, budget)
        return cls(fields, dim, length, seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        places = (self.starts[codes][..., None] + self.inside) % len(self.array)
        blocks = self.array.index_select(0, places.flatten()).view(places.shape)
        return (blocks * self.signs[codes][..., None]).flatten(2)


class HashedNet(Robe):
    """Each coordinate hashed by itself: Z = 1."""

    name = "hashed-net"
    block = 1
