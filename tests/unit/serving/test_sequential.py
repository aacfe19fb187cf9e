"""Intervals that hold the truth at every look, splits that are caught, and sums that are what their users are."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import nchypergeom_fisher

from features.errors import TesseraError
from serving.rollout.sequential import Arm, Slower, difference, mismatched, split_p, surely_above, tightest


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


def boundary(total: int, *, alpha: float, planned: int) -> int:
    """The least count of the second arm, above the half, that is mismatched."""
    low, high = total // 2, total
    while high - low > 1:
        middle = (low + high) // 2
        found = mismatched((total - middle, middle), (0.5, 0.5), alpha=alpha, planned=planned)
        low, high = (low, middle) if found else (middle, high)
    return high


@pytest.mark.parametrize(("total", "alpha"), [(1_001, 0.05), (10_000, 0.03), (1_000_000, 0.2)])
def test_beyond_the_plan_the_split_is_tested_by_lindon_and_maleks_mixture_at_a_fifth_of_alpha(
    total: int, alpha: float
) -> None:
    def e_value(count: int) -> float:
        # Their equation 6 for two arms with a Dirichlet prior of 500 and 500, in plain factorials.
        beta = [math.lgamma(500 + n) for n in (count, total - count)]
        prior = 2 * math.lgamma(500) - math.lgamma(1_000)
        return sum(beta) - math.lgamma(1_000 + total) - prior + total * math.log(2)

    found = boundary(total, alpha=alpha, planned=1_000)
    assert e_value(found) >= math.log(1 / (0.2 * alpha)) > e_value(found - 1)


def test_within_the_plan_the_split_is_tested_at_four_fifths_of_alpha() -> None:
    for total, planned in ((6_000, 8_000), (8_000, 8_000)):
        found = boundary(total, alpha=0.03, planned=planned)
        z = [(2 * count - total) / math.sqrt(total) for count in (found - 1, found)]
        # P(max |B| ≥ c) ≤ 4 (1 - Φ(c)).
        tail = [4 * 0.5 * math.erfc(one * math.sqrt(total / planned) / math.sqrt(2)) for one in z]
        assert tail[0] > 0.8 * 0.03 >= tail[1]


def test_ten_thousand_looks_beyond_the_plan_are_wrong_no_more_often_than_a_fifth_of_alpha() -> None:
    alpha, wrong = 0.9, 0
    for seed in range(30):
        first = 250 + np.cumsum(np.random.default_rng(seed).integers(0, 2, 10_000))
        looks = zip(first.tolist(), range(501, 10_501), strict=True)
        wrong += any(mismatched((a, n - a), (0.5, 0.5), alpha=alpha, planned=500) for a, n in looks)
    # 5.4 of 30 are expected at most; 27 where all of alpha is spent there.
    assert wrong <= 30 * 0.2 * alpha + 3 * math.sqrt(30 * 0.18 * 0.82)


@pytest.mark.parametrize(("alpha", "planned", "users"), [(0.025, 200_000, 5_000), (0.1, 3_000, 90_000), (0.5, 10, 100)])
def test_an_interval_is_the_papers_to_the_last_digits(alpha: float, planned: int, users: int) -> None:
    # One impression each, so that the effective exposure is known: E v0 / v with v0 / v = 1 / (1 - r) in both arms.
    counts = (users // 4, users // 5)
    arms = [Arm.of(np.ones(users), np.arange(users) < count) for count in counts]
    found = difference(arms[0], arms[1], alpha=alpha, planned=planned)
    v = sum(float(Fraction(c, users) * (1 - Fraction(c, users)) / users) for c in counts)
    n = 2 * users * (sum(counts) / (2 * users) * 2 / users) / v
    # Waudby-Smith et al., Theorem 2.2, with σ² = v n, and the optimal ρ by its own equation: x - ln(1 + x) = -2 ln α.
    rho2 = tightest(planned, alpha)
    x = rho2 * planned
    assert x - math.log1p(x) == pytest.approx(-2 * math.log(alpha), rel=1e-12)
    root = math.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / alpha))
    assert (found.high - found.low) / 2 == pytest.approx(math.sqrt(v * n) * root, rel=1e-12)
    assert (found.high + found.low) / 2 == pytest.approx((counts[1] - counts[0]) / users, rel=1e-12)


def test_an_interval_is_tightest_at_what_was_planned() -> None:
    users = 10_000
    control, challenger = (Arm.of(np.ones(users), np.arange(users) < 2_000) for _ in "ab")
    effective = 2 * users / (1 - 0.2)

    def width(times: float) -> float:
        return difference(control, challenger, alpha=0.025, planned=times * effective).high

    assert width(1.0) < min(width(0.97), width(1.03)) < min(width(0.3), width(3.0)) < min(width(0.1), width(10.0))


def test_users_who_keep_coming_back_move_the_clock_and_miss_the_truth_no_more_often() -> None:
    alpha, missed = 0.1, 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        exposure, outcomes, held, before = np.zeros((2, 300)), np.zeros((2, 300)), True, 0
        for mean in np.unique(np.geomspace(4, 4_000, 40).astype(int)).tolist():
            more = rng.poisson(mean - before, (2, 300))
            before = mean
            exposure += more
            outcomes += rng.binomial(more, 0.1)
            found = difference(*(Arm.of(exposure[a], outcomes[a]) for a in (0, 1)), alpha=alpha, planned=600)
            held = held and found.low <= 0 <= found.high
        missed += not held
    assert missed / 150 <= alpha


def test_a_chance_is_surely_above_another_only_where_it_is_and_at_any_look() -> None:
    def alarms(shares: tuple[float, float], seed: int, margin: float = 0.02) -> bool:
        seen = np.cumsum(np.random.default_rng(seed).random((2, 3_000)) < np.array(shares)[:, None], axis=1)
        looks = range(1, 3_001, 7)
        return any(surely_above(seen[:, n - 1].tolist(), (n, n), margin=margin, alpha=0.05) for n in looks)

    assert np.mean([alarms((0.03, 0.05), seed) for seed in range(40)]) <= 0.05
    assert np.mean([alarms((0.03, 0.03), seed, margin=0.0) for seed in range(40)]) <= 0.05
    assert np.mean([alarms((0.03, 0.1), seed) for seed in range(40)]) >= 0.95
    # Eight failures in a row beside twelve answers are enough, two are not; nothing says nothing.
    assert surely_above((0, 8), (12, 8), margin=0.01, alpha=0.001)
    assert not surely_above((0, 2), (12, 2), margin=0.01, alpha=0.001)
    assert not surely_above((0, 0), (0, 0), margin=0.01, alpha=0.001)
    # A margin that leaves no room cannot be passed.
    assert not surely_above((990, 1_000), (1_000, 1_000), margin=0.02, alpha=0.05)


def test_evidence_for_what_is_slower_is_fishers_likelihood_ratio() -> None:
    found = Slower().with_slice(5, 12, 40, 160).with_slice(0, 3, 10, 90)
    for log, odds in zip(found.logs, (1.5, 2.0, 4.0, 8.0, 32.0), strict=True):
        expected = 0.0
        for mine, top, size, others in ((5, 12, 40, 160), (0, 3, 10, 90)):
            chances = [nchypergeom_fisher.pmf(mine, size + others, size, top, each) for each in (odds, 1.0)]
            expected += math.log(chances[0] / chances[1])
        assert log == pytest.approx(expected, abs=1e-9)


def test_what_is_slower_is_found_at_any_shares_and_what_is_alike_is_not() -> None:
    def alarms(seed: int, share: float, slower: float, alpha: float) -> bool:
        rng, evidence = np.random.default_rng(seed), Slower()
        for _ in range(120):
            mine = rng.random(400) < share
            numbers = rng.lognormal(1.5, 0.4, 400) * np.where(mine, slower, 1.0)
            top = np.argsort(-numbers)[:4]
            evidence = evidence.with_slice(int(mine[top].sum()), 4, int(mine.sum()), int((~mine).sum()))
            if evidence.surely(alpha):
                return True
        return False

    for share in (0.01, 0.1, 0.5):
        assert np.mean([alarms(seed, share, 1.0, 0.05) for seed in range(20)]) <= 0.05
        assert np.mean([alarms(seed, share, 2.5, 0.001) for seed in range(20)]) >= 0.95


def test_what_cannot_be_tested_is_refused() -> None:
    for wrong in (lambda: split_p([1, 2], [1.0]), lambda: split_p([1, 2], [1.0, 0.0])):
        with pytest.raises(TesseraError, match="positive shares"):
            wrong()
    with pytest.raises(TesseraError, match="0 < alpha < 1"):
        difference(Arm(), Arm(), alpha=0.0, planned=10)
