"""Intervals that hold the truth at every look, splits that are caught, and sums that are what their users are."""

import numpy as np
import pytest

from features.error import TesseraError
from models.sequential import Arm, difference, mismatched, split_p, surely_above


def users(rng: np.random.Generator, count: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    impressions = 1 + rng.poisson(3, count)
    return impressions, rng.binomial(impressions, rng.beta(20 * rate, 20 * (1 - rate), count))


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    i, c = users(rng, 1_000, 0.2)
    whole = Arm.of(i, c)
    parts = Arm.of(i[:300], c[:300]) + Arm.of(i[300:], c[300:])
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
            control += Arm.of(*users(rng, 200, 0.2))
            challenger += Arm.of(*users(rng, 200, 0.25))
            found = difference(control, challenger, alpha=alpha, planned=8_000)
            held = held and found.low <= 0.05 <= found.high
        missed += not held
    assert missed / 300 <= alpha


def test_an_interval_narrows_and_comes_clear_of_zero_where_there_is_a_difference() -> None:
    rng = np.random.default_rng(1)
    control, challenger, widths = Arm(), Arm(), []
    for _ in range(20):
        control += Arm.of(*users(rng, 1_000, 0.2))
        challenger += Arm.of(*users(rng, 1_000, 0.17))
        found = difference(control, challenger, alpha=0.05, planned=40_000)
        widths.append(found.high - found.low)
    assert widths == sorted(widths, reverse=True)
    assert found.high < 0
    assert found.estimate == pytest.approx(-0.03, abs=0.01)


def test_nothing_seen_says_nothing() -> None:
    found = difference(Arm(), Arm(), alpha=0.05, planned=1_000)
    assert (found.low, found.high) == (-np.inf, np.inf)
    assert split_p([0, 0], [0.5, 0.5]) == 1.0
    # Nor do users who have all done nothing.
    found = difference(Arm.of([1, 2], [0, 0]), Arm.of([1, 1], [0, 0]), alpha=0.05, planned=1_000)
    assert (found.estimate, found.low, found.high) == (0.0, -np.inf, np.inf)


def first_mismatch(rng: np.random.Generator, share: float, days: int, planned: int = 200_000) -> bool:
    counts = np.zeros(2, dtype=int)
    for _ in range(days):
        first = rng.binomial(200_000 // 14, share)
        counts += [first, 200_000 // 14 - first]
        if mismatched(counts.tolist(), (0.5, 0.5), alpha=0.03, planned=planned):
            return True
    return False


def test_a_wrong_split_is_caught_and_a_right_one_is_not() -> None:
    assert np.mean([first_mismatch(np.random.default_rng(seed), 0.505, 14) for seed in range(400)]) >= 0.95
    assert np.mean([first_mismatch(np.random.default_rng(seed), 0.5, 14) for seed in range(400)]) <= 0.03


def test_looks_at_every_user_and_beyond_the_plan_are_no_more_often_wrong() -> None:
    def wrong(seed: int) -> bool:
        first = np.cumsum(np.random.default_rng(seed).integers(0, 2, 3_000))
        return any(
            mismatched((int(first[n - 1]), int(n - first[n - 1])), (0.5, 0.5), alpha=0.1, planned=1_000)
            for n in range(1, 3_001, 12)
        )

    # The bound is close: two standard errors of 150 experiments above it.
    assert np.mean([wrong(seed) for seed in range(150)]) <= 0.1 + 2 * np.sqrt(0.1 * 0.9 / 150)
    # Long after the plan, a difference that is there is still found.
    assert mismatched((1_010_000, 990_000), (0.5, 0.5), alpha=0.03, planned=1_000)


def test_an_uneven_split_is_tested_as_it_was_asked_for() -> None:
    assert not mismatched((90_000, 10_000), (0.9, 0.1), alpha=0.03, planned=200_000)
    assert mismatched((90_000, 11_000), (0.9, 0.1), alpha=0.03, planned=200_000)
    assert mismatched((0, 150), (0.5, 0.5), alpha=0.03, planned=400)


def test_a_share_is_surely_above_another_only_where_it_is_and_at_any_look() -> None:
    def alarms(share: float, seed: int) -> bool:
        seen = np.cumsum(np.random.default_rng(seed).random(3_000) < share)
        return any(surely_above(int(seen[n - 1]), n, 0.05, alpha=0.05) for n in range(1, 3_001, 7))

    assert np.mean([alarms(0.05, seed) for seed in range(200)]) <= 0.05
    assert np.mean([alarms(0.02, seed) for seed in range(200)]) == 0
    assert np.mean([alarms(0.09, seed) for seed in range(200)]) >= 0.95
    # A handful of failures in a row needs no thousand requests.
    assert surely_above(8, 8, 0.01, alpha=0.001)
    assert not surely_above(0, 0, 0.01, alpha=0.001)


def test_what_cannot_be_tested_is_refused() -> None:
    for wrong in (lambda: split_p([1, 2], [1.0]), lambda: split_p([1, 2], [1.0, 0.0])):
        with pytest.raises(TesseraError, match="positive shares"):
            wrong()
    with pytest.raises(TesseraError, match="0 < alpha < 1"):
        difference(Arm(), Arm(), alpha=0.0, planned=10)
