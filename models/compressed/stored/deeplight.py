"""DeepLight: the table thinned by magnitude while it learns (Deng et al., WSDM 2021).

    keep the largest |w|: a share 1 - S · (1 - (1 - t)³) of them, t from 0 to 1 over the first epoch after a warm-up

DeepLight's own schedule needs more steps than a small data set has; this schedule ends within the first epoch. The
stored, and hence scored, table always holds the final number of weights. Stored: the remaining weights, a byte for the
column of each, a byte for each row's count (CSR with row lengths instead of row starts) and the dictionary.
"""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes

_WARM_UP = 0.2  # share of an epoch
_EVERY = 10  # steps
_MOST_COLUMNS = 255


class DeepLight(EmbeddingMethod):
    """Sparse table. The knob is the number of weights that remain.

    Args:
        left: Most weights that are stored.
    """

    name = "deeplight"

    def __init__(self, fields: Fields, dim: int, left: int, *, seed: int) -> None:
        super().__init__()
        self.left = left
        self.dictionary = Dictionary(fields)
        self.weight = uniform((fields.values, dim), seeded(seed))
        self.kept: Tensor
        self.register_buffer("kept", torch.ones_like(self.weight, dtype=torch.bool), persistent=False)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        if dim > _MOST_COLUMNS:
            raise ValueError(f"dim: expected at most {_MOST_COLUMNS} for {cls.name}, got {dim}")
        fixed = fields.values + dictionary_bytes(fields.values, fields)
        sizes = range(1, fields.values * dim + 1)
        return cls(
            fields, dim, largest(cls.name, sizes, lambda left: left * (FLOAT_BYTES + 1) + fixed, budget), seed=seed
        )

    def forward(self, codes: Tensor) -> Tensor:
        ids = self.dictionary.ids[codes]
        weight = self.weight if self.training else self._pruned()
        rows = functional.embedding(ids, weight)
        return rows * self.kept[ids] if self.training else rows

    @torch.no_grad()
    def after_step(self, step: int, steps: int) -> None:
        """Prunes every tenth step of the first epoch; a pruned weight stays zero afterwards."""
        start = _WARM_UP * steps
        if step < start or step > steps or (step % _EVERY and step != steps):
            return
        done = (step - start) / max(steps - start, 1)
        sparsity = (1 - self.left / self.weight.numel()) * (1 - (1 - done) ** 3)
        left = max(self.left, round(self.weight.numel() * (1 - sparsity)))
        self.kept.copy_(_largest(self.weight * self.kept, left))

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        pruned = self._pruned()
        rows, columns = pruned.nonzero(as_tuple=True)
        found = {name: tensor for name, tensor in super().stored().items() if name != "weight"}
        lengths = torch.bincount(rows, minlength=len(pruned))
        return found | {
            "values": pruned[rows, columns],
            "columns": columns.to(torch.uint8),
            "lengths": lengths.to(torch.uint8),
        }

    @torch.no_grad()
    def restore(self, stored: Mapping[str, Tensor]) -> None:
        dense = torch.zeros_like(self.weight)
        rows = torch.arange(len(dense)).repeat_interleave(stored["lengths"].long())
        dense[rows, stored["columns"].long()] = stored["values"]
        named = {name: tensor for name, tensor in stored.items() if name.startswith("dictionary.")}
        super().restore(named | {"weight": dense})
        self.kept.copy_(dense != 0)

    def _pruned(self) -> Tensor:
        """Returns the table (N, D) with at most the weights that may be stored."""
        weight = self.weight * self.kept
        return weight if int(torch.count_nonzero(weight)) <= self.left else weight * _largest(weight, self.left)


def _largest(weight: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` largest magnitudes; among equal magnitudes, their places decide."""
    kept = torch.zeros(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().topk(count, sorted=False).indices] = True
    return kept.view_as(weight)
