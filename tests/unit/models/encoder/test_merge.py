"""A merged head is the average of two heads, and serves two tasks nearly as well as both."""

import numpy as np
import pytest

from features.content.chain import apply_steps
from features.content.encoder import unit
from features.content.step import Cut, Linear, LowRank, VectorStep
from features.errors import TesseraError
from models.encoder.merge import best_share, merge
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
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_merged_head_is_the_average_of_the_outputs(heads: list[VectorStep], share: float) -> None:
    (step,) = merge(heads[:1], heads[1:], share)
    wanted = share * heads[0](VECTORS) + (1 - share) * heads[1](VECTORS)
    np.testing.assert_allclose(step(VECTORS), wanted, atol=1e-4)


def test_a_head_without_steps_is_the_identity() -> None:
    assert merge((), (), 0.5) == ()
    for head in (LINEAR[0], LOW_RANK[0]):
        (step,) = merge((), [head], 0.4)
        np.testing.assert_allclose(step(VECTORS), 0.4 * VECTORS + 0.6 * head(VECTORS), atol=1e-4)


def test_other_steps_and_other_widths_are_refused() -> None:
    with pytest.raises(TesseraError, match="cut"):
        merge([Cut.to(3, width=DIM)], LINEAR[:1], 0.5)
    with pytest.raises(TesseraError, match="widths 4, 12"):
        merge([Linear(matrix=np.eye(4))], LINEAR[:1], 0.5)


def test_a_merged_head_serves_both_tasks() -> None:
    tasks = planted()
    options = TuneOptions(batch=64, rounds=4, patience=3)
    heads = [tune([task], options).steps for task in tasks]
    share = best_share(*heads, tasks, options.seed)
    merged = merge(*heads, share)
    assert 0 < share < 1
    for number, task in enumerate(tasks):
        base, own, other, both = (
            held_out_recall(apply_steps(steps, task.vectors), task, options.seed)
            for steps in ((), heads[number], heads[1 - number], merged)
        )
        assert both > max(base, other)
        assert both > 0.65 * own


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
