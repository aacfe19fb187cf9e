"""The paper's experiment on readers that start parallel: a single-layer model turns them apart.

Shape letters: R rows, D dim, F fields, B batch.
"""

from dataclasses import dataclass

import numpy as np
import torch

from features.threads import one_thread
from models.compressed.fields import Fields, Part
from models.compressed.layout import rows_of
from models.insight.reader import Angles, angles
from models.ranker.evaluate import quality

_START, _EPSILON = 0.05, 1e-8


@dataclass(frozen=True)
class TurningConfig:
    """Configuration of the single-layer model's training: Adagrad, row-wise on the table, by coordinate on readers."""

    dim: int = 32
    epochs: int = 10
    batch: int = 512
    table_rate: float = 0.05
    reader_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Turning:
    """Turns of the readers; angles are means over pairs in degrees, folded to [0, 90].

    Attributes:
        before, after: Mean angles before and after training; smallest: angle of the closest pair after it.
        auc: AUC on validation, None if it has only one label.
    """

    rows: int
    before: float
    after: float
    smallest: float
    auc: float | None


@one_thread()
@torch.no_grad()
def turning(fields: Fields, rows: int, config: TurningConfig = TurningConfig()) -> Turning:
    """Trains z = b + Σ_t ⟨θ_t, e_{h_t(x_t)}⟩ with logistic loss from readers θ_t that are all one unit vector.

    This is the paper's experiment in its worst case: at the start every collision between fields leaks in full. Rows
    start uniform in ±0.05. The gradients are written out, so that an epoch is a few products a batch.

    Args:
        fields: F fields and their three parts.
        rows: R of the one table that all fields share.
    """
    generator = torch.Generator().manual_seed(config.seed)
    table = (torch.rand(rows, config.dim, generator=generator) * 2 - 1) * _START
    theta = torch.nn.functional.normalize(torch.randn(1, config.dim, generator=generator)).repeat(len(fields.names), 1)
    bias, of_rows, of_theta = torch.zeros(1), torch.zeros(rows), torch.zeros_like(theta)
    chosen = torch.from_numpy(rows_of(fields, "unified", rows=rows, seed=config.seed)[:, 0])
    codes, labels = _tensors(fields.parts["train"])
    before = _turned(theta)
    place = torch.arange(len(theta))
    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(labels)))
        for index in order.split(config.batch):
            at = chosen[codes[index]]
            vectors = table[at]
            error = torch.sigmoid((vectors * theta).sum((1, 2)) + bias) - labels[index]
            error /= len(index)
            # Readers times the weight that each row got of each reader: (R, F) @ (F, D), the gradient of the rows.
            got = torch.zeros(rows * len(theta)).index_add_(
                0, (at * len(theta) + place).flatten(), error.repeat_interleave(len(theta))
            )
            row_gradient = got.view(rows, -1) @ theta
            gradient = torch.einsum("b,bfd->fd", error, vectors)
            of_rows += (row_gradient**2).mean(1)
            table -= config.table_rate * row_gradient / (of_rows.sqrt() + _EPSILON).unsqueeze(1)
            of_theta += gradient**2
            theta -= config.reader_rate * gradient / (of_theta.sqrt() + _EPSILON)
            bias -= config.reader_rate * error.sum()
    after = _turned(theta)
    codes, labels = _tensors(fields.parts["validation"])
    scores = torch.sigmoid((table[chosen[codes]] * theta).sum((1, 2)) + bias)
    auc = quality(labels.numpy(), scores.numpy()).auc
    return Turning(rows, before.mean or 0.0, after.mean or 0.0, after.smallest or 0.0, auc)


def _turned(theta: torch.Tensor) -> Angles:
    return angles({str(number): one[None, :] for number, one in enumerate(theta.numpy().astype(np.float64))})


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(part.codes), torch.from_numpy(part.labels)
