"""The protocol of an embedding table, and the plain twin of the unified table: readable torch, the same numbers.

The twin also pools rows that came from a store, and replaces the fused table if fbgemm is not installed.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.table.batch import Batch
from models.table.schema import Schema

RowPrecision = Literal["float32", "float16"]
# Uniform and narrow: a standard normal start costs about five points of AUC.
_INIT = 0.05
_DRAWN_ROWS = 1 << 16
EPSILON = 1e-8
"""Epsilon of row-wise Adagrad."""


class EmbeddingTable(Protocol):
    """Table that reads and trains rows. The fused table and its plain twin give the same numbers."""

    def __call__(self, batch: Batch) -> Tensor:
        """Returns (B, K · D) float32: per example and lookup the sum of its rows, or the mean if the batch scales."""
        ...

    @property
    def weight(self) -> Tensor:
        """(R, D) float32, the live rows; writing to it in place changes what the next batch reads."""
        ...

    @property
    def accumulator(self) -> Tensor:
        """(R,) float32, the live row-wise Adagrad state."""
        ...

    def step(self) -> None:
        """Applies the gradient after the backward pass, unless the backward pass has applied it."""
        ...


@torch.no_grad()
def start_rows(weight: Tensor, generator: torch.Generator) -> None:
    """Fills (R, D) with the initial values of every table, decided by the generator of the table's device."""
    torch.rand(weight.shape, generator=generator, out=weight)
    weight.mul_(2).sub_(1).mul_(_INIT)


@torch.no_grad()
def start_range(weight: Tensor, generator: torch.Generator, *, low: int) -> None:
    """Fills (r, D) with the initial values of the rows from `low` on of a larger table, without memory for the others.

    The values before `low` are drawn and dropped, so all ranges together are what `start_rows` gives.
    """
    height, dim = weight.shape
    for start in range(0, low + height, _DRAWN_ROWS):
        drawn = torch.empty(min(_DRAWN_ROWS, low + height - start), dim)
        start_rows(drawn, generator)
        first, last = max(low, start), start + len(drawn)
        if first < last:
            weight[first - low : last - low] = drawn[first - start :]


def pool(rows: Tensor, batch: Batch) -> Tensor:
    """Pools rows (R, D) as the table does: (B, K · D).

    Args:
        rows: The table, or the subset of its rows that `batch.values` indexes.
        batch: B examples of K lookups.
    """
    if batch.offsets is not None:
        weights = None if batch.weights is None else batch.weights.to(rows.dtype)
        sums = functional.embedding_bag(batch.values, rows, batch.offsets[:-1], mode="sum", per_sample_weights=weights)
        return sums.view(batch.size, -1)
    bags = batch.scale.shape[1] * batch.size
    offsets = functional.pad(batch.lengths.cumsum(0), (1, 0))[:bags]
    sums = functional.embedding_bag(batch.values, rows, offsets, mode="sum")
    return by_example(sums, batch)


def by_example(sums: Tensor, batch: Batch) -> Tensor:
    """Turns the bags' sums, (K · B, D) lookup-major, into (B, K · D), and sums into means by the batch's scale."""
    turned = sums.view(batch.scale.shape[1], batch.size, -1).transpose(0, 1)
    # One more pass through all rows, forward and backward, that single values do not need.
    if not bool((batch.scale == 1).all()):
        turned = turned * batch.scale.unsqueeze(2)
    return turned.flatten(1)


class ReferenceTable(nn.Module):
    """Dense parameter; `step` applies row-wise Adagrad to the rows that got a gradient.

    Row-wise Adagrad keeps one number a row, the running sum of the mean squared gradient:
    a ← a + mean(g²);  w ← w − lr · g / (√a + ε)   (Gupta et al., 2014).
    """

    def __init__(self, schema: Schema, *, learning_rate: float, seed: int = 0) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(schema.rows, schema.dim))
        start_rows(self.weight, torch.Generator().manual_seed(seed))
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
        scale = self._learning_rate / (accumulator[touched].sqrt() + EPSILON)
        self.rows[touched] -= scale.unsqueeze(1) * gradient[touched]
        self.rows.grad = None
