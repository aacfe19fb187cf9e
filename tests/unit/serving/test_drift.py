"""Alarms of drift are as rare as stated however often one looks, and come for a drift that is larger than tolerated."""

import math
import os
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from features.errors import TesseraError
from models.profile.profile import (
    FeatureValues,
    Observations,
    ProfileMeasure,
    TrainingProfile,
    effective,
    number_values,
    observed,
    unit_shares,
)
from models.table.schema import Feature, Numeric, Schema
from serving.skew.alarm import DriftAlarms, DriftLimits
from serving.skew.drift import DriftWatch
from serving.skew.evidence import Capital, ToleratedBall, ToleratedShares, ball_of, interval_of, payoffs, psi
from serving.skew.interval import harmonic, psi_interval
from serving.skew.record import SkewBatch, SkewRecord

WINDOWS = int(os.environ.get("DRIFT_WINDOWS", "20"))


def hellinger(a: Any, b: Any) -> float:
    return float(1 - np.sqrt(a * b).sum())


@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(2, 12))
@settings(max_examples=50, deadline=None)
def test_psi_is_at_least_the_distance_that_the_alarms_test(seed: int, cells: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.dirichlet(np.ones(cells) * 2, size=2) * 0.99 + 0.01 / cells
    assert psi(a, b) >= 8 * hellinger(a, b) - 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_the_largest_tolerated_mean_is_that_of_a_general_optimiser(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares, score, size = rng.dirichlet(np.ones(6) * 3), rng.normal(size=6), float(rng.uniform(0.02, 1.0))
    bounds = [
        {"type": "eq", "fun": lambda chances: chances.sum() - 1},
        {"type": "ineq", "fun": lambda chances: size - 8 * hellinger(np.maximum(chances, 0), shares)},
    ]
    options = {"maxiter": 500, "ftol": 1e-12}
    found = minimize(
        lambda chances: -chances @ score, shares, constraints=bounds, bounds=[(1e-9, 1)] * 6, options=options
    )
    assert ToleratedBall(shares, size).largest_mean(score) == pytest.approx(-found.fun, abs=1e-5)


def test_a_cell_that_training_did_not_have_is_tolerated_up_to_the_size_of_the_ball() -> None:
    shares = np.array([0.5, 0.5, 0.0])
    # Of a share t in the last cell, H² = 1 - √(1 - t).
    expected = 1 - (1 - 0.1 / 8) ** 2
    assert ToleratedBall(shares, 0.1).largest_mean(np.array([0.0, 0.0, 1.0])) == pytest.approx(expected, rel=1e-3)
    assert ToleratedBall(shares, np.inf).largest_mean(np.array([0.0, 3.0, 1.0])) == pytest.approx(3.0)


@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(2, 12), size=st.floats(0.001, 2.0))
@settings(max_examples=50, deadline=None)
def test_no_bet_gains_on_average_under_a_tolerated_distribution(seed: int, cells: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    trained, seen = rng.dirichlet(np.ones(cells), size=2)
    others = rng.dirichlet(np.ones(cells), size=200)
    # Towards others, up to the edge of the ball.
    steps = np.linspace(0, 1, 40)[:, None, None]
    near = (trained + steps * (others - trained)).reshape(-1, cells)
    ball = ToleratedBall(trained, size)
    near = near[8 * (1 - np.sqrt(near * trained).sum(axis=1)) <= size]
    found = payoffs(seen, trained, ball)
    assert found.min() > 0
    assert (near @ found.T).max() <= 1 + 1e-9
    low, high = sorted(rng.random(2))
    of_share = payoffs(seen[:2] / seen[:2].sum(), trained[:2] / trained[:2].sum(), ToleratedShares(low, high))
    inside = np.linspace(low, high, 20)
    assert (np.stack([1 - inside, inside], axis=1) @ of_share.T).max() <= 1 + 1e-9


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 90), max_size=4))
@settings(max_examples=30, deadline=None)
def test_capital_is_that_of_a_loop_over_users_in_any_batches(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    trained, served = rng.dirichlet(np.ones(4) * 3, size=2)
    shares, tolerated = rng.dirichlet(3 * served + 0.01, size=90), ToleratedBall(trained, 0.05)
    fast = Capital(tolerated, trained)
    for batch in np.split(shares, sorted(cuts)):
        fast.add(batch)
    stakes, until, odds, evidence = np.full(8, 1 / 8), 16, np.ones((8, 4)), 0.0
    for number, one in enumerate(shares):
        if number == until:
            odds, until = payoffs(shares[:number].mean(axis=0), trained, tolerated), 2 * until
        stakes = stakes * [float(pays @ one) for pays in odds]
        evidence = max(evidence, math.log(stakes.sum()))
    assert fast.evidence == pytest.approx(evidence, abs=1e-9)


def test_capital_rarely_grows_at_the_edge_of_the_tolerated_distributions() -> None:
    rng = np.random.default_rng(1)
    p = np.full(10, 0.1)
    edge = p * np.exp(0.3 * np.linspace(-1, 1, 10))
    edge /= edge.sum()
    ball, interval = ToleratedBall(p, 8 * hellinger(edge, p)), ToleratedShares(0.08, 0.12)
    found = []
    for _ in range(400):
        # Users whose requests have several candidates, and resemble themselves.
        numbers, missing = Capital(ball, p), Capital(interval, np.array([0.9, 0.1]))
        numbers.add(clustered(edge, 200, np.full(200, 5), rng))
        missing.add(clustered([0.88, 0.12], 200, np.full(200, 5), rng))
        found.append([numbers.evidence, missing.evidence])
    # Ville: a capital reaches 10 in a tenth of the windows at most.
    assert (np.mean(np.array(found) >= math.log(10), axis=0) <= 0.1).all()


@pytest.mark.parametrize("cells", [3, 12])
def test_a_tolerated_distribution_is_in_the_ball_of_a_sample(cells: int) -> None:
    rng = np.random.default_rng(2)
    p = rng.dirichlet(np.ones(cells) * 5)
    served = p * np.exp(0.25 * np.linspace(-1, 1, cells))
    served /= served.sum()
    true, alpha = 8 * hellinger(served, p), 0.05
    sampled = rng.multinomial(500, p, size=4_000) / 500
    outside = [8 * hellinger(served, one) > ball_of(true, one, 500, alpha).size for one in sampled]
    assert np.mean(outside) < alpha * 1.2
    intervals = [interval_of(0.02, one[0], 500, alpha) for one in sampled]
    low, high = [one.low for one in intervals], [one.high for one in intervals]
    for edge in (p[0] - 0.02, p[0] + 0.02):
        assert np.mean((np.array(low) > edge) | (np.array(high) < edge)) < alpha


MEASURES = [
    *(ProfileMeasure(f"number{n}", "values", [0.1] * 10, 0.0, edges=list(map(float, range(9)))) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "values", [0.5, 0.3, 0.1, 0.1], 0.0, rows=[7, 8, 9]) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "missing", [0.9, 0.1], 0.0) for n in range(3)),
    *(ProfileMeasure(f"word{n}", "unseen", [0.98, 0.02], 0.0) for n in range(3)),
]


def clustered(shares: Any, users: int, examples: Any, rng: np.random.Generator) -> Any:
    """Shares (U, C) of users who resemble themselves, each with so many examples."""
    return rng.multinomial(examples, rng.dirichlet(3 * np.array(shares) + 1e-9, size=users)) / np.reshape(
        examples, (-1, 1)
    )


def sampled_training(rng: np.random.Generator, users: int = 2_000) -> list[ProfileMeasure]:
    """Measures with the shares of a sample, in which some users have many rows."""
    found = []
    for one in MEASURES:
        shares = clustered(one.shares, users, np.minimum(rng.geometric(0.1, users), 200), rng)
        units = effective(users, shares.mean(axis=0), shares.var(axis=0), most=1e9)
        found.append(msgspec.structs.replace(one, shares=shares.mean(axis=0).tolist(), units=units))
    return found


def looks(rng: np.random.Generator, alarms: DriftAlarms, true: list[Any], users: int = 1_500) -> bool:
    """Whether any of thirty looks at some users alarms."""
    served = [clustered(shares, users, np.full(users, 20), rng) for shares in true]
    for part in np.array_split(np.arange(users), 30):
        for number, shares in enumerate(served):
            alarms.add(number, shares[part])
        if (alarms.evidence() >= alarms.enough).any():
            return True
    return False


def test_windows_without_drift_do_not_alarm() -> None:
    rng = np.random.default_rng(3)
    limits = DriftLimits(psi=1e-6, share=1e-6)
    true = [one.shares for one in MEASURES]
    # Hardly any tolerance, and training's sample is drawn again in each window.
    alarmed = sum(looks(rng, DriftAlarms(sampled_training(rng), limits), true) for _ in range(WINDOWS))
    assert alarmed <= max(0.01 * WINDOWS, 1)


def test_a_drift_below_the_tolerance_does_not_alarm_and_a_drift_above_it_does() -> None:
    rng = np.random.default_rng(4)
    training = sampled_training(rng, 10_000)
    tilt = np.exp(0.4 * np.linspace(-1, 1, 10))
    small = [np.array(one.shares) * (tilt if one.edges else 1) for one in MEASURES]
    small = [shares / shares.sum() for shares in small]
    assert 0.05 < float(psi(small[0], np.full(10, 0.1))) < 0.1
    assert not looks(rng, DriftAlarms(training, DriftLimits()), small)
    zigzag = np.exp(0.5 * np.where(np.arange(10) % 2, 1, -1))
    for change in (
        {0: np.array(MEASURES[0].shares) * tilt**2},
        {0: np.array(MEASURES[0].shares) * zigzag},
        {3: np.array([0.3, 0.3, 0.1, 0.3])},
        {6: np.array([0.85, 0.15])},
        {9: np.array([0.93, 0.07])},
    ):
        large = [change.get(number, np.array(one.shares)) for number, one in enumerate(MEASURES)]
        # As many users as 6,000 requests of a skewed shop have.
        alarmed = looks(rng, DriftAlarms(training, DriftLimits()), [shares / shares.sum() for shares in large], 850)
        assert alarmed, change


SCHEMA = Schema(
    (Feature("word", "item", "word", "word"), Feature("who", "user", "who", "who", chunks=2)),
    (Numeric("size", "item", "size"),),
    rows=50,
    dim=4,
    history_length=3,
)
SERVED = TrainingProfile(
    1,
    100,
    100,
    0,
    [
        ProfileMeasure("word", "values", [0.5, 0.5, 0.0], 1_000.0, rows=[30, 10]),
        ProfileMeasure("word", "missing", [1.0, 0.0], 1_000.0),
        ProfileMeasure("word", "unseen", [1.0, 0.0], 1_000.0),
        ProfileMeasure("word", "length", [0.0, 0.5, 0.5], 1_000.0, edges=[0.0, 1.0]),
        ProfileMeasure("who", "values", [1.0, 0.0], 1_000.0, rows=[20]),
        ProfileMeasure("size", "values", [0.5, 0.5], 1_000.0, edges=[1.0]),
        ProfileMeasure("size", "missing", [1.0, 0.0], 1_000.0),
        ProfileMeasure("score", "values", [0.5, 0.5], 1_000.0, edges=[0.5]),
    ],
)


def served(number: int, user: str, **changes: Any) -> SkewRecord:
    """A record of three candidates: of words 30 and 10, of word 10 and one without a row, and without a word."""
    whole = {
        "version": 2, "id": f"r{number}", "time_ms": number, "bundle": "b-1", "user": user,
        "candidates": ["i1", "i2", "i3"], "context": {}, "at": None, "now_us": 0, "retrieved": False,
        "known_user": True, "stale": False, "source": "store", "storage": "float32", "position": 0, "history": [],
        "rows": np.array([10, 20, 21, 30], dtype="<u4").tobytes(), "digests": bytes(32),
        "shared": SkewBatch(_words([1, 2]), _words([1, 1]), bytes(8)),
        "own": SkewBatch(_words([3, 0, 0]), _words([2, 1, 0]), bytes(12)),
        "numeric": np.array([0.5, 2, 0], dtype="<f4").tobytes(), "content": b"",
        "scores": np.array([0.25, 0.5, 0.75], dtype="<f4").tobytes(),
        "shared_unread": b"", "own_unread": bytes([0, 1, 0]),
    }  # fmt: skip
    return SkewRecord(**whole | changes)


def _words(numbers: list[int]) -> bytes:
    return np.array(numbers, dtype="<u4").tobytes()


def test_a_watch_counts_the_first_request_of_each_user() -> None:
    watch = DriftWatch(SCHEMA, SERVED, bundle="b-1")
    watch.add([served(2, "a"), served(1, "a", scores=np.full(3, 0.9, dtype="<f4").tobytes())])
    watch.add([served(3, "b"), served(4, "b"), served(5, "c", bundle="b-2"), served(6, "d", stale=True)])
    watch.add([served(7, ""), served(8, "")])
    report = watch.look()
    assert (report.users, report.repeated) == (4, 2)
    shares = {(one.feature, one.measure): one.shares for one in watch.profile().measures}
    thirds = [1 / 3, 2 / 3]
    expected = {
        ("word", "values"): [0.25, 0.75, 0.0],
        ("word", "missing"): thirds[::-1],
        # The second candidate has two words, of which one has no row.
        ("word", "unseen"): [0.75, 0.25],
        ("word", "length"): [1 / 3, 0, 2 / 3],
        ("who", "values"): [1.0, 0.0],
        ("size", "values"): [0.5, 0.5],
        ("size", "missing"): thirds[::-1],
        ("score", "values"): [0.5, 0.5],
    }
    expected["score", "values"] = [(3 * 2 / 3 + 0) / 4, (3 / 3 + 1) / 4]
    assert shares.keys() == expected.keys()
    for name, found in shares.items():
        assert found == pytest.approx(expected[name]), name


def test_an_old_record_does_not_say_which_values_had_no_row() -> None:
    watch = DriftWatch(SCHEMA, SERVED, bundle="b-1")
    watch.add([served(1, "a", version=1, shared_unread=None, own_unread=None)])
    names = {one.name for one in watch.look().measures}
    assert names == {"word", "who", "size", "size missing", "score"}


def test_an_alarm_of_a_look_remains_and_a_new_window_has_none() -> None:
    watch = DriftWatch(SCHEMA, SERVED, bundle="b-1")
    high = np.full(3, 0.9, dtype="<f4").tobytes()
    watch.add(served(number, f"u{number}", scores=high) for number in range(60))
    assert "score" in watch.look().to_json()["alarms"]
    low = np.full(3, 0.1, dtype="<f4").tobytes()
    watch.add(served(number, f"v{number}", scores=low) for number in range(60))
    balanced = {one.name: one for one in watch.look().measures}["score"]
    assert balanced.alarm
    assert balanced.psi < 0.01
    again = DriftWatch(SCHEMA, SERVED, bundle="b-1")
    assert not again.look().alarms


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_shares_of_users_are_those_of_a_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, unread = rng.integers(0, 4, 12), rng.integers(0, 3, 12)
    example, users = np.repeat(np.arange(12), lengths), rng.integers(0, 5, 12)
    rows = rng.integers(0, 6, lengths.sum())
    measure = ProfileMeasure("f", "values", [0.0] * 4, 0.0, rows=[5, 0, 3])
    found = observed(measure, FeatureValues(rows, example, lengths, unread))
    assert found is not None
    fast = unit_shares(found, users, 5, 4)
    slow = []
    for user in range(5):
        own = []
        for one in np.flatnonzero((users == user) & (lengths > 0)):
            places = [measure.rows.index(row) if row in measure.rows else 3 for row in rows[example == one]]
            own.append(np.bincount(places, minlength=4) / len(places))
        if own:
            slow.append(np.mean(own, axis=0))
    assert np.allclose(fast, np.reshape(slow, (-1, 4)))


def test_a_number_is_in_the_cell_of_the_edge_that_it_equals_and_0_is_missing() -> None:
    values = number_values(np.array([-2, 0, 1, 1.5, 9], dtype=np.float32))
    measure = ProfileMeasure("f", "values", [0.0] * 4, 0.0, edges=[-1.0, 1.0, 2.0])
    found = observed(measure, values)
    assert isinstance(found, Observations)
    assert dict(zip(found.example.tolist(), found.cell.tolist(), strict=True)) == {0: 0, 2: 1, 3: 2, 4: 3}


@pytest.mark.parametrize("wrong", [{"alpha": 0}, {"alpha": 1}, {"psi": 0}, {"psi": float("nan")}, {"share": -1}])
def test_limits_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(TesseraError, match=f"{next(iter(wrong))} "):
        DriftLimits(**wrong)


@pytest.mark.parametrize("tilt", [0.0, 0.4, 1.1])
def test_an_interval_of_the_index_holds_the_true_one_in_95_of_100_looks(tilt: float) -> None:
    rng = np.random.default_rng(6)
    trained = np.full(10, 0.1)
    served = trained * np.exp(tilt * np.linspace(-1, 1, 10))
    served /= served.sum()
    true = float(psi(served, trained))
    inside = 0
    for _ in range(400):
        index = float(psi(rng.multinomial(800, served) / 800, rng.multinomial(3_000, trained) / 3_000))
        low, high = psi_interval(index, 10, harmonic(800, 3_000))
        assert low is not None
        assert high is not None
        inside += low - 1e-6 <= true <= high
    assert 0.91 <= inside / 400 <= 0.99


def test_an_interval_of_samples_of_unknown_size_is_unknown() -> None:
    assert psi_interval(0.2, 10, harmonic(0.0, 100.0)) == (None, None)
