"""Loss of a ranker: the log loss of one label, or the weighted sum of several tasks' log losses.

With several tasks an example's loss is `Σ_t w_t · l_t` over the tasks whose label is known, with the descriptor's
weights w. An unknown label, NaN, adds nothing. A batch's loss divides the sum by the number of examples, known or not,
so that the parts of processes and partitions add up to it.

With uncertainty weights (Kendall, Gal and Cipolla, CVPR 2018, equation 10) the network learns a number
`s_t = log σ_t²` for each task, and `l_t` becomes `exp(-s_t) · l_t + s_t / 2`.

Shape letters: B batch, E examples, T tasks.
"""

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

_LEAST = 1e-7
Values = TypeVar("Values", Tensor, NDArray[np.float32])


class TaskLosses(nn.Module):
    """Weights of several tasks.

    Attributes:
        names: Names of the tasks, in the order of the outputs.
        judge: Name of the judged task.

    Args:
        weights: Weight of each task's loss by its name.
        judge: Name of the judged task.
        uncertainty: True learns a weight for each task beside the given one.
    """

    def __init__(self, weights: Mapping[str, float], judge: str, *, uncertainty: bool) -> None:
        super().__init__()
        self.names, self.judge = tuple(weights), judge
        self.weights: Tensor
        self.register_buffer("weights", torch.tensor(list(weights.values()), dtype=torch.float32), persistent=False)
        self.log_variances = nn.Parameter(torch.zeros(len(weights))) if uncertainty else None

    def judged(self, values: Values) -> Values:
        """Returns the judged task's column (B,) of values (B, T)."""
        return values[:, self.names.index(self.judge)]

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss (B,) of each example, from logits and labels (B, T)."""
        known = torch.isfinite(labels)
        wanted = torch.where(known, labels, torch.zeros_like(labels))
        losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        if self.log_variances is not None:
            losses = torch.exp(-self.log_variances) * losses + self.log_variances / 2
        return (torch.where(known, losses, torch.zeros_like(losses)) * self.weights).sum(dim=1)


def mean_loss(tasks: TaskLosses | None, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean loss of a batch: logits and labels (B,), or (B, T) of several tasks."""
    if tasks is None:
        return functional.binary_cross_entropy_with_logits(logits, labels)
    found: Tensor = tasks(logits, labels).mean()
    return found


def summed_loss(tasks: TaskLosses | None, logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the loss of a batch, summed over the examples with their weights (B,), by default 1."""
    if tasks is None:
        return functional.binary_cross_entropy_with_logits(logits, labels, weight=weights, reduction="sum")
    losses: Tensor = tasks(logits, labels)
    return losses.sum() if weights is None else (losses * weights).sum()


def summed_log_loss(tasks: TaskLosses | None, probabilities: NDArray[np.float32], labels: NDArray[np.float32]) -> float:
    """Returns the log loss of predictions, summed over the examples.

    Tasks have the descriptor's weights alone, since epochs are compared by it and learned weights differ between them.

    Args:
        tasks: Weights of several tasks, None for one label.
        probabilities, labels: (E,), or (E, T) of several tasks.
    """
    clipped, wanted = torch.from_numpy(probabilities).double().clamp(_LEAST, 1 - _LEAST), torch.from_numpy(labels)
    if tasks is None:
        return float(functional.binary_cross_entropy(clipped, wanted.double(), reduction="sum"))
    known = torch.isfinite(wanted)
    losses = functional.binary_cross_entropy(clipped, wanted.double().nan_to_num(0.0), reduction="none")
    return float((losses * known * tasks.weights.cpu()).sum())
