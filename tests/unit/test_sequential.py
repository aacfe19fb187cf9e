"""Intervals that hold the truth at every look, splits that are caught, and sums that are what their users are."""

import numpy as np
import pytest

from features.error import TesseraError
from models.sequential import Arm, SplitTest, difference, spent, split_p


def arm_of(impressions: np.ndarray, outcomes: np.ndarray) -> Arm:
    i, c = impressions.astype(float), outcomes.astype(float)
    return Arm(len(i), int(i.sum()), int(c.sum()), float(i @ i), float(c @ c), float(i @ c))


def users(rng: np.random.Generator, count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    impressions = 1 + rng.poisson(3, count)
    return impressions, rng.binomial(impressions, rng.beta(20 * rate, 20 * (1 - rate), count))


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    i, c = users(rng, 1_000, 0.2)
    whole = arm_of(i, c)
    parts = arm_of(i[:300], c[:300]) + arm_of(i[300:], c[300:])
    assert parts == whole
    assert whole.rate == c.sum() / i.sum()
    # The delta method against drawing users again.
    drawn = [rng.integers(0, 1_000, 1_000) for _ in range(2_000)]
    bootstrap = np.var([c[index].sum() / i[index].sum() for index in drawn])
    assert whole.variance == pytest.approx(bootstrap, rel=0.1)


def test_all_intervals_of_an_experiment_hold_the_truth_in_as_many_experiments_as_promised() -> None:
    alpha, missed = 0.1, 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        control, challenger, held = Arm(), Arm(), True
        for _ in range(20):
            control += arm_of(*users(rng, 200, 0.2))
            challenger += arm_of(*users(rng, 200, 0.25))
            found = difference(control, challenger, alpha=alpha, planned=8_000)
            held = held and found.low <= 0.05 <= found.high
        missed += not held
    assert missed / 300 <= alpha


def test_an_interval_narrows_and_comes_clear_of_zero_where_there_is_a_difference() -> None:
    rng = np.random.default_rng(1)
    control, challenger, widths = Arm(), Arm(), []
    for _ in range(20):
        control += arm_of(*users(rng, 1_000, 0.2))
        challenger += arm_of(*users(rng, 1_000, 0.17))
        found = difference(control, challenger, alpha=0.05, planned=40_000)
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert found.high < 0
    assert found.estimate == pytest.approx(-0.03, abs=0.01)


def test_nothing_seen_says_nothing() -> None:
    found = difference(Arm(), Arm(), alpha=0.05, planned=1_000)
    assert (found.low, found.high) == (-1.0, 1.0)
    assert split_p([0, 0], [0.5, 0.5]) == 1.0


def test_a_wrong_split_is_caught_and_a_right_one_is_not() -> None:
    def caught(share: float, seed: int) -> bool:
        rng, test = np.random.default_rng(seed), SplitTest([0.5, 0.5], alpha=0.02, planned=200_000)
        counts = np.zeros(2, dtype=int)
        for _ in range(14):
            first = rng.binomial(200_000 // 14, share)
            counts += [first, 200_000 // 14 - first]
            test.look(counts.tolist())
        return test.mismatched

    assert np.mean([caught(0.505, seed) for seed in range(400)]) >= 0.95
    assert np.mean([caught(0.5, seed) for seed in range(400)]) <= 0.02


def test_alpha_is_spent_once_and_late() -> None:
    assert spent(0.0, 0.05) == 0.0
    assert spent(1.0, 0.05) == pytest.approx(0.05)
    assert spent(0.25, 0.05) < 0.001
    values = [spent(share, 0.05) for share in np.linspace(0, 1, 20)]
    assert values == sorted(values)


def test_what_cannot_be_tested_is_refused() -> None:
    for wrong in (lambda: split_p([1, 2], [1.0]), lambda: split_p([1, 2], [1.0, 0.0])):
        with pytest.raises(TesseraError, match="positive shares"):
            wrong()
    with pytest.raises(TesseraError, match="0 < alpha < 1"):
        difference(Arm(), Arm(), alpha=0.0, planned=10)
