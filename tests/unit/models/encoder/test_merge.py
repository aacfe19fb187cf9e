"""A merged head adds the changes of two heads, and serves two tasks nearly as well as both."""

import numpy as np
import pytest

from features.content.chain import apply_steps
from features.content.encoder import unit
from features.content.step import Cut, Linear, LowRank, VectorStep
from features.errors import TesseraError
from models.encoder.merge import SHARES, SUMS, Weights, best_weights, merge
from models.encoder.pairs import Task, item_task
from models.encoder.tune import tune
from models.encoder.tuning.options import TuneOptions
from models.encoder.tuning.rows import held_out_recall

DIM = 12
RNG = np.random.default_rng(0)
LINEAR = [Linear(matrix=RNG.normal(size=(DIM, DIM))) for _ in range(2)]
LOW_RANK = [LowRank(left=RNG.normal(size=(DIM, 3)), right=RNG.normal(size=(3, DIM))) for _ in range(2)]
VECTORS = unit(RNG.normal(size=(5, DIM)))


@pytest.mark.parametrize("heads", [LINEAR, LOW_RANK, [LINEAR[0], LOW_RANK[1]]])
@pytest.mark.parametrize("weights", [Weights(0.0, 1.0), Weights(0.3, 0.7), Weights(0.7, 0.6), Weights(1.0, 0.0)])
def test_a_merged_head_adds_the_changes_of_the_outputs(heads: list[VectorStep], weights: Weights) -> None:
    (step,) = merge(heads[:1], heads[1:], weights)
    changes = [weight * (head(VECTORS) - VECTORS) for head, weight in zip(heads, weights, strict=True)]
    wanted = VECTORS + changes[0] + changes[1]
    np.testing.assert_allclose(step(VECTORS), wanted, atol=1e-4)


def test_a_head_without_steps_is_the_identity() -> None:
    assert merge((), (), Weights(0.5, 0.5)) == ()
    for head in (LINEAR[0], LOW_RANK[0]):
        (step,) = merge((), [head], Weights(0.4, 0.6))
        np.testing.assert_allclose(step(VECTORS), 0.4 * VECTORS + 0.6 * head(VECTORS), atol=1e-4)


def test_other_steps_and_other_widths_are_refused() -> None:
    with pytest.raises(TesseraError, match="cut"):
        merge([Cut.to(3, width=DIM)], LINEAR[:1], Weights(0.5, 0.5))
    with pytest.raises(TesseraError, match="widths 4, 12"):
        merge([Linear(matrix=np.eye(4))], LINEAR[:1], Weights(0.5, 0.5))


def test_a_merged_head_serves_both_tasks() -> None:
    tasks = planted()
    options = TuneOptions(batch=64, rounds=4, patience=3)
    heads = [tune([task], options).steps for task in tasks]
    weights = best_weights(*heads, tasks, options.seed)
    merged = merge(*heads, weights)
    assert min(weights) > 0
    assert min(SUMS) <= sum(weights) <= max(SUMS)
    for number, task in enumerate(tasks):
        base, own, other, both = (
            held_out_recall(apply_steps(steps, task.vectors), task, options.seed)
            for steps in ((), heads[number], heads[1 - number], merged)
        )
        assert both > max(base, other)
        assert both > 0.65 * own


def test_sums_above_one_keep_more_of_the_worse_task_than_averages() -> None:
    tasks = planted()
    options = TuneOptions(batch=64, rounds=4, patience=3)
    heads = [tune([task], options).steps for task in tasks]

    own = [
        held_out_recall(apply_steps(head, task.vectors), task, options.seed)
        for head, task in zip(heads, tasks, strict=True)
    ]

    def kept(weights: Weights) -> float:
        found = [apply_steps(merge(*heads, weights), task.vectors) for task in tasks]
        return min(
            held_out_recall(one, task, options.seed) / best for one, task, best in zip(found, tasks, own, strict=True)
        )

    averages = [Weights(share, 1 - share) for share in SHARES]
    assert kept(best_weights(*heads, tasks, options.seed)) > max(map(kept, averages)) + 0.01


def planted() -> tuple[Task, Task]:
    """Two tasks on the same vectors: each group shows in three dimensions of its own."""
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, (2, 300))
    signals = [rng.normal(size=(30, 3))[group] + 0.1 * rng.normal(size=(300, 3)) for group in groups]
    vectors = unit(np.concatenate([*signals, rng.normal(size=(300, 6))], axis=1))
    first, second = np.triu_indices(300, 1)
    found = []
    for number, group in enumerate(groups):
        alike = group[first] == group[second]
        weights = np.full(int(alike.sum()), 0.5, dtype=np.float32)
        found.append(item_task(f"task {number}", vectors, first[alike], second[alike], weights))
    return found[0], found[1]
