"""The plain twin of the unified table: readable torch, the same numbers; it also pools rows that came from a store."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.lookup import Batch
from models.schema import Schema
from models.table.unified import _INIT, scaled

_EPSILON = 1e-8


def pool(rows: Tensor, batch: Batch) -> Tensor:
    """Pools rows (R, D) as the table does: (B, K · D).

    Args:
        rows: the table, or as many of its rows as `batch.values` points into.
        batch: B examples of K lookups.
    """
    bags = batch.scale.shape[1] * batch.size
    offsets = functional.pad(batch.lengths.cumsum(0), (1, 0))[:bags]
    sums = functional.embedding_bag(batch.values, rows, offsets, mode="sum")
    by_example = sums.view(-1, batch.size, rows.shape[1]).transpose(0, 1).flatten(1)
    return scaled(by_example, batch, rows.shape[1])


class ReferenceTable(nn.Module):
    """A dense parameter; `step` applies row-wise Adagrad to the rows that got a gradient.

    Row-wise Adagrad keeps one number a row, the running sum of the mean squared gradient:
    a ← a + mean(g²);  w ← w − lr · g / (√a + ε)   (Gupta et al., 2014).
    """

    def __init__(self, schema: Schema, *, learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        start = torch.rand(schema.rows, schema.dim, generator=torch.Generator().manual_seed(seed))
        self.rows = nn.Parameter((start * 2 - 1) * _INIT)
        self.register_buffer("accumulator_", torch.zeros(schema.rows))
        self._learning_rate = learning_rate

    @property
    def weight(self) -> Tensor:
        return self.rows.detach()

    @property
    def accumulator(self) -> Tensor:
        return self.get_buffer("accumulator_")

    def forward(self, batch: Batch) -> Tensor:
        return pool(self.rows, batch)

    @torch.no_grad()
    def step(self) -> None:
        """Applies the gradient of the last backward pass and clears it."""
        gradient = self.rows.grad
        if gradient is None:
            return
        accumulator = self.accumulator
        touched = gradient.abs().sum(dim=1) > 0
        accumulator[touched] += (gradient[touched] ** 2).mean(dim=1)
        scale = self._learning_rate / (accumulator[touched].sqrt() + _EPSILON)
        self.rows[touched] -= scale.unsqueeze(1) * gradient[touched]
        self.rows.grad = None
