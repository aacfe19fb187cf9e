"""Merges two tuned heads on the same vectors into one, without another fit.

The weights of the heads are averaged. Both began at the identity, so they lie in one valley of the loss. Wortsman et
al., "Model soups" (ICML 2022); the share is searched on held-out items, as in "Task Arithmetic" (Ilharco et al., 2023).

Shape letters: D dim, K rank.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps
from features.content.step import Linear, LowRank, VectorStep
from features.errors import TesseraError
from models.encoder.pairs import Task
from models.encoder.tuning.rows import held_out_recall

SHARES = tuple(number / 10 for number in range(11))
"""Shares of the first head that are tried."""


def merge(first: Sequence[VectorStep], second: Sequence[VectorStep], share: float) -> tuple[VectorStep, ...]:
    """Returns `share` of the first head and 1 - `share` of the second.

    Args:
        first: Steps of a tuned head: none, or one linear or low-rank step.
        second: Steps of the other head.
        share: Weight of the first head, 0 to 1.

    Raises:
        TesseraError: A head has other steps, or the heads have other widths.
    """
    heads = [*_head(first), *_head(second)]
    widths = {head.width for head in heads}
    if len(widths) > 1:
        raise TesseraError(f"heads of one width expected, got widths {', '.join(map(str, sorted(widths)))}")
    if not heads:
        return ()
    width = widths.pop()
    if all(isinstance(head, LowRank) for head in heads):
        sides = [
            (head.tensors["left"] * weight, head.tensors["right"])
            for head, weight in zip(_each(first, second), (share, 1 - share), strict=True)
            if head is not None
        ]
        return (LowRank(left=np.hstack([left for left, _ in sides]), right=np.vstack([right for _, right in sides])),)
    matrices = [_matrix(head, width) for head in _each(first, second)]
    return (Linear(matrix=share * matrices[0] + (1 - share) * matrices[1]),)


def best_share(first: Sequence[VectorStep], second: Sequence[VectorStep], tasks: tuple[Task, Task], seed: int) -> float:
    """Returns the share whose worse task keeps most of its own head's recall of held-out items.

    Args:
        first: Head that was tuned on the first task.
        second: Head that was tuned on the second task.
        tasks: The two tasks.
        seed: Seed of both fits, which decides the held-out items.
    """
    own = [_recall(head, task, seed) for head, task in zip((first, second), tasks, strict=True)]

    def kept(share: float) -> float:
        steps = merge(first, second, share)
        return min(_recall(steps, task, seed) / max(best, 1e-9) for task, best in zip(tasks, own, strict=True))

    return max(SHARES, key=kept)


def _recall(steps: Sequence[VectorStep], task: Task, seed: int) -> float:
    return held_out_recall(apply_steps(steps, task.vectors), task, seed)


def _each(first: Sequence[VectorStep], second: Sequence[VectorStep]) -> tuple[VectorStep | None, VectorStep | None]:
    return (first[0] if first else None), (second[0] if second else None)


def _head(steps: Sequence[VectorStep]) -> Sequence[VectorStep]:
    if len(steps) > 1 or any(not isinstance(step, LowRank) and type(step) is not Linear for step in steps):
        kinds = ", ".join(step.kind for step in steps)
        raise TesseraError(f"only a linear or a low-rank head can be merged, got the steps {kinds}")
    return steps


def _matrix(head: VectorStep | None, width: int) -> NDArray[np.float32]:
    """Returns a head as a matrix (D, D)."""
    identity = np.eye(width, dtype=np.float32)
    if head is None:
        return identity
    if isinstance(head, LowRank):
        return identity + head.tensors["left"] @ head.tensors["right"]
    return head.tensors["matrix"]
