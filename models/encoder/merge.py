"""Merges two tuned heads on the same vectors into one, without another fit.

A head is the identity and a change. The changes of both heads are added, each with a weight. Weights that add up to 1
average the heads (Wortsman et al., "Model soups", ICML 2022). Changes of two tasks hardly meet, so larger sums keep
more of both ("Task Arithmetic", Ilharco et al., ICLR 2023, equation 2). The weights are searched on held-out items.

Shape letters: D dim, K rank.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps
from features.content.step import Linear, LowRank, VectorStep
from features.errors import TesseraError
from models.encoder.pairs import Task
from models.encoder.tuning.rows import held_out_recall

SHARES = tuple(number / 10 for number in range(11))
"""Shares of the first head that are tried."""
SUMS = (1.0, 1.2, 1.4, 1.6)
"""Sums of both weights that are tried."""


class Weights(NamedTuple):
    """Weights of the changes of two heads.

    Attributes:
        first: Weight of the first head's change.
        second: Weight of the second head's change.
    """

    first: float
    second: float


def merge(first: Sequence[VectorStep], second: Sequence[VectorStep], weights: Weights) -> tuple[VectorStep, ...]:
    """Returns the identity, and the change of each head times its weight.

    Args:
        first: Steps of a tuned head: none, or one linear or low-rank step.
        second: Steps of the other head.
        weights: Weights of both changes.

    Raises:
        TesseraError: A head has other steps, or the heads have other widths.
    """
    heads = [*_head(first), *_head(second)]
    widths = {head.width for head in heads}
    if len(widths) > 1:
        raise TesseraError(f"heads of one width expected, got widths {', '.join(map(str, sorted(widths)))}")
    if not heads:
        return ()
    weighted = [(head, weight) for head, weight in zip(_each(first, second), weights, strict=True) if head is not None]
    if all(isinstance(head, LowRank) for head in heads):
        left = np.hstack([head.tensors["left"] * weight for head, weight in weighted])
        return (LowRank(left=left, right=np.vstack([head.tensors["right"] for head, _ in weighted])),)
    width = widths.pop()
    changes = sum(weight * _change(head, width) for head, weight in weighted)
    return (Linear(matrix=(np.eye(width) + changes).astype(np.float32)),)


def best_weights(
    first: Sequence[VectorStep], second: Sequence[VectorStep], tasks: tuple[Task, Task], seed: int
) -> Weights:
    """Returns the weights whose worse task keeps most of its own head's recall of held-out items.

    Args:
        first: Head that was tuned on the first task.
        second: Head that was tuned on the second task.
        tasks: The two tasks.
        seed: Seed of both fits, which decides the held-out items.
    """
    own = [_recall(head, task, seed) for head, task in zip((first, second), tasks, strict=True)]

    def kept(weights: Weights) -> float:
        steps = merge(first, second, weights)
        return min(_recall(steps, task, seed) / max(best, 1e-9) for task, best in zip(tasks, own, strict=True))

    tried = [Weights(share * total, (1 - share) * total) for total, share in product(SUMS, SHARES)]
    return max(tried, key=kept)


def _recall(steps: Sequence[VectorStep], task: Task, seed: int) -> float:
    return held_out_recall(apply_steps(steps, task.vectors), task, seed)


def _each(first: Sequence[VectorStep], second: Sequence[VectorStep]) -> tuple[VectorStep | None, VectorStep | None]:
    return (first[0] if first else None), (second[0] if second else None)


def _head(steps: Sequence[VectorStep]) -> Sequence[VectorStep]:
    if len(steps) > 1 or any(not isinstance(step, LowRank) and type(step) is not Linear for step in steps):
        kinds = ", ".join(step.kind for step in steps)
        raise TesseraError(f"only a linear or a low-rank head can be merged, got the steps {kinds}")
    return steps


def _change(head: VectorStep, width: int) -> NDArray[np.float64]:
    """Returns a head less the identity, (D, D)."""
    if isinstance(head, LowRank):
        return np.asarray(head.tensors["left"] @ head.tensors["right"], dtype=np.float64)
    return np.asarray(head.tensors["matrix"], dtype=np.float64) - np.eye(width)
