"""The bench of drift gives every test the same windows, and claims what the rows say."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from serving.skew.evidence import psi
from tessera.bench.skew.drift import BETS, CONTROLS, STRICT, DriftSizes, claims, drift, first_alarms
from tessera.bench.skew.window import DRIFTS, MEASURES, drawn_training, drawn_window

SMALL = DriftSizes(same=3, drifted=1, requests=600, candidates=5, looks=4, training=500)


def test_each_kind_of_drift_has_a_row_for_each_test(tmp_path: Path) -> None:
    result = drift(tmp_path, seeds=2, console=Console(file=io.StringIO()), sizes=SMALL)
    tests = (BETS, STRICT, *CONTROLS)
    expected = [(seed, kind, test) for seed in range(2) for kind in DRIFTS for test in tests]
    assert [(row["seed"], row["drift"], row["test"]) for row in result.rows] == expected
    assert {row["windows"] for row in result.rows if row["drift"] == "none"} == {2}
    assert len(result.claims) == 3 + len(DRIFTS) - 2


def test_the_kinds_of_drift_have_the_index_that_they_name() -> None:
    named = {kind: float(kind.split("PSI ")[1]) for kind in DRIFTS if "PSI" in kind}
    assert len(named) == 5
    for kind, expected in named.items():
        ((number, shares),) = DRIFTS[kind].items()
        assert float(psi(shares, np.array(MEASURES[number].shares))) == pytest.approx(expected, abs=1e-6)


def test_a_large_drift_alarms_and_draws_of_one_user_fool_the_tests_of_candidates_alone() -> None:
    rng = np.random.default_rng(1)
    sizes = DriftSizes(requests=2_000, looks=8)
    training = drawn_training(rng, 2_000)
    found = first_alarms(training, drawn_window(rng, 2_000, candidates=20, drift={6: np.array([0.6, 0.4])}), sizes)
    assert 0 < found[BETS] <= 2_000
    assert 0 < found["chi-square of users"] <= found[BETS]
    same = first_alarms(training, drawn_window(rng, 2_000, candidates=20, drift={}), sizes)
    assert (same[BETS], same[STRICT]) == (0, 0)
    assert same["chi-square of candidates"] > 0


def test_claims_are_of_all_seeds() -> None:
    missing = "missing, 10 to 15 %"
    alarmed = [("none", STRICT, 0), ("none", STRICT, 1), (missing, BETS, 10), (missing, BETS, 4)]
    rows = [{"drift": kind, "test": test, "windows": 10, "alarmed": count} for kind, test, count in alarmed]
    found = {claim.claim: (claim.value, claim.holds) for claim in claims(rows)}
    assert found["windows without drift that alarm, no tolerance"] == (0.05, False)
    assert found[f"{missing}: windows that alarm"] == (0.7, False)
