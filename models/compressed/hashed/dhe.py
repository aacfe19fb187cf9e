"""Deep Hash Embedding: a network computes the vector from many hashes (Kang et al., KDD 2021).

    x(v) = (h_1(v), …, h_k(v)), each uniform in [-1, 1]        e(v) = MLP(x(v)), five hidden layers with batch norm

No table at all: the network is all that is stored, one for all fields, each hashing with its name as salt. Two
departures: k is 256, not 1,024, since the first layer would take nearly all of a small budget; and the layers are
ReLU, not Mish, with which the authors of CCE found DHE weaker (Tsang & Ahle, NeurIPS 2023).
"""

from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from models.compressed.fields import Fields
from models.compressed.hashed.address import shared_rows
from models.compressed.method import FLOAT_BYTES, INIT_STD, EmbeddingMethod, largest

_BUCKETS = 1_000_000
_COUNTER_BYTES = 8


class DeepHash(EmbeddingMethod):
    """Hashes through a network. The knob is the width of its hidden layers."""

    name = "dhe"
    hashes: ClassVar[int] = 256
    hidden: ClassVar[int] = 5

    def __init__(self, fields: Fields, dim: int, width: int, *, seed: int) -> None:
        super().__init__()
        self.encodings: Tensor
        encodings = shared_rows(fields, _BUCKETS, self.hashes, salt="dhe ").float() / (_BUCKETS - 1) * 2 - 1
        self.register_buffer("encodings", encodings, persistent=False)
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for before, after in pairwise([self.hashes, *[width] * self.hidden]):
                linear = nn.Linear(before, after)
                nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
                layers += [linear, nn.BatchNorm1d(after), nn.ReLU()]
            last = nn.Linear(width, dim)
            # ReLU leaves half the variance of batch norm's output.
            nn.init.normal_(last.weight, std=INIT_STD * (2 / width) ** 0.5)
            nn.init.zeros_(last.bias)
        self.network = nn.Sequential(*layers, last)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        def bytes_at(width: int) -> int:
            linear = cls.hashes * width + width + (cls.hidden - 1) * (width * width + width) + width * dim + dim
            norm = cls.hidden * 4 * width
            return (linear + norm) * FLOAT_BYTES + cls.hidden * _COUNTER_BYTES

        return cls(fields, dim, largest(cls.name, range(1, 2**14), bytes_at, budget), seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        # Each value of the batch is computed once, since the network is the cost.
        values, place = torch.unique(codes, return_inverse=True)
        if len(values) == 1:
            values = values.expand(2)  # batch norm needs two
        vectors: Tensor = self.network(self.encodings[values])
        return vectors.index_select(0, place.flatten()).view(*codes.shape, -1)
