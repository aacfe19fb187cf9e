"""Assignment is sticky, balanced, independent between layers, and moves nobody it need not."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from features.errors import TesseraError
from serving.rollout.experiment import Experiment, RampStep, arms, expected_shares, places, room

ROOT = Path(__file__).parents[2]
USERS = [f"user-{number}" for number in range(50_000)]


def experiment(
    name: str = "a", *, layer: str = "l", start: float = 0.0, share: float = 0.1, **fields: object
) -> Experiment:
    ramp = [RampStep(0.0, share)]
    return Experiment(**{"name": name, "challenger": "b-2", "control": "b-1", "layer": layer, "start": start,
                         "ramp": ramp, "started": 0} | fields)  # type: ignore[arg-type]  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=20), st.text(max_size=8))
def test_a_users_place_is_its_own_whoever_is_asked_with_it(users: list[str], layer: str) -> None:
    encodable = [user for user in users if user.isprintable()]
    together = places(encodable, "x" + layer)
    assert [places([user], "x" + layer)[0] for user in encodable] == together.tolist()
    assert ((together >= 0) & (together < 1)).all()


def test_another_process_assigns_every_user_alike() -> None:
    code = (
        "from serving.rollout.experiment import places; import hashlib;"
        "print(hashlib.sha256(places([f'user-{n}' for n in range(50_000)], 'l').tobytes()).hexdigest())"
    )
    found = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]


def test_places_are_uniform_and_layers_are_independent() -> None:
    a, b = places(USERS, "a"), places(USERS, "b")
    for one in (a, b):
        assert chisquare(np.histogram(one, bins=100, range=(0, 1))[0]).pvalue > 1e-4
    both = np.histogram2d(a, b, bins=10, range=[[0, 1], [0, 1]])[0]
    assert chi2_contingency(both).pvalue > 1e-4


def test_arms_get_what_they_were_given() -> None:
    first, second = experiment(share=0.1), experiment("b", start=0.1, share=0.3)
    found = arms(USERS, first, [first, second], 1.0)
    control, challenger = expected_shares(first, [first, second], 1.0)
    assert (control, challenger) == (pytest.approx(0.6), 0.1)
    counts = [(found == 0).sum(), (found == 1).sum(), (found == -1).sum()]
    assert chisquare(counts, np.array([0.6, 0.1, 0.3]) * len(USERS)).pvalue > 1e-4
    # One experiment's challengers are nobody's control.
    assert not ((found == 1) & (arms(USERS, second, [first, second], 1.0) >= 0)).any()


def test_a_wider_share_moves_only_those_it_must() -> None:
    ramp = [RampStep(0.0, 0.05), RampStep(100.0, 0.2), RampStep(200.0, 0.5)]
    one = experiment(ramp=ramp)
    seen = [arms(USERS, one, [one], now) for now in (0.0, 150.0, 250.0)]
    for before, after in pairwise(seen):
        assert (after[before == 1] == 1).all()
        assert (after[before == 0] == 0).all()
    assert [round(float((found == 1).mean()), 2) for found in seen] == [0.05, 0.2, 0.5]
    other = experiment("b", start=0.5, share=0.1)
    grown = experiment("b", start=0.5, share=0.3)
    alone, beside = arms(USERS, one, [one, other], 0.0), arms(USERS, one, [one, grown], 0.0)
    assert ((alone == 1) == (beside == 1)).all()
    moved = alone != beside
    assert (alone[moved] == 0).all()
    assert moved.mean() == pytest.approx(0.2, abs=0.01)


def test_a_ramp_goes_by_its_own_start_and_a_first_step_at_once_by_no_clock() -> None:
    late = experiment(started=1_000, ramp=[RampStep(10.0, 0.1)])
    assert not (arms(USERS, late, [late], 1_009.0) == 1).any()
    assert (late.share(1_009.0), late.share(1_010.0)) == (0.0, 0.1)
    # A server whose clock is behind gives the same arms.
    at_once = experiment(started=1_000, ramp=[RampStep(0.0, 0.1), RampStep(10.0, 0.2)])
    assert [at_once.share(now) for now in (900.0, 1_000.0, 1_010.0)] == [0.1, 0.1, 0.2]


def test_an_epoch_begins_with_a_step_and_with_a_change_of_the_layer_whatever_the_clock() -> None:
    one = experiment(started=1_000, ramp=[RampStep(0.0, 0.1), RampStep(10.0, 0.2)])
    assert [one.epoch(now) for now in (900.0, 1_009.9, 1_010.0, 2_000.0)] == [1_000, 1_000, 1_010, 1_010]
    changed = experiment(started=1_000, ramp=one.ramp, changed=1_500, changes=1)
    assert [changed.epoch(now) for now in (1_009.9, 2_000.0)] == [1_500, 1_500]
    assert (one.part(), changed.part()) == (0.25, 0.125)
    assert one.id == "a@1000"


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("changes", [0, 1, 5, 60])
def test_all_epochs_together_use_no_more_than_the_whole_chance_of_a_false_alarm(steps: int, changes: int) -> None:
    ramp = [RampStep(10.0 * number, 0.01 * (number + 1)) for number in range(steps)]
    epochs = [(step, 0) for step in range(steps)]
    # Changes of the layer come at the step that makes the sum largest: each in turn.
    for at in range(steps):
        path = epochs[: at + 1] + [(at, n) for n in range(1, changes + 1)]
        path += [(step, changes) for step in range(at + 1, steps)]
        spent = sum(experiment(ramp=ramp, changes=number).part() for _, number in path)
        assert spent <= 1.0


def test_room_is_found_between_segments_and_refused_beyond_the_whole() -> None:
    held = [experiment("a", start=0.0, share=0.3), experiment("b", start=0.5, share=0.3)]
    assert room("l", 0.2, held) == 0.3
    assert room("other", 1.0, held) == 0.0
    assert room("l", 0.2, held[:1]) == 0.3
    for share in (0.3, 0.5):
        with pytest.raises(TesseraError, match="layer 'l': 60% of it is taken"):
            room("l", share, held)
    assert room("l", 0.2, [*held, experiment("c", start=0.3, share=0.2)]) == 0.8


@pytest.mark.parametrize(
    "ramp",
    [
        [],
        [RampStep(0, 0.0)],
        [RampStep(0, 1.1)],
        [RampStep(-1, 0.1)],
        [RampStep(0, 0.5), RampStep(10, 0.2)],
        [RampStep(0, 0.1), RampStep(0, 0.2)],
    ],
)
def test_shares_that_cannot_be_are_refused(ramp: list[RampStep]) -> None:
    with pytest.raises(TesseraError, match="rollout 'a'"):
        experiment(ramp=ramp).check()
    experiment(ramp=[RampStep(0, 0.1), RampStep(10, 1.0)]).check()
