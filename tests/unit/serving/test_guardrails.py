"""The rule ends what is worse, broken or split wrongly, says why, and lets the rest go on."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.rollout.guardrails import Guardrails, Look, Sums
from serving.rollout.sequential import Arm, Slower

RULE = Guardrails(planned=40_000)
HALVES = (0.5, 0.5)


def shown(seed: int, users: int, rate: float, *, scores: float = 0.1, novel: float = 0.05, **fields: Any) -> Sums:
    rng = np.random.default_rng(seed)
    impressions = 1 + rng.poisson(3, users)
    clicks = rng.binomial(impressions, rate)
    made = Sums(
        rate=Arm.of(impressions, clicks),
        calibration=Arm.of(impressions * scores, clicks),
        novelty=Arm.of(10 * impressions, rng.binomial(10 * impressions, novel)),
        users=users,
        requests=int(impressions.sum()),
        p99_ms=12.0,
    )
    return replace(made, **fields)


def looked(control: Sums, challenger: Sums, rule: Guardrails = RULE, shares: tuple[float, float] = HALVES) -> Look:
    return rule.look(control, challenger, shares=shares)


CONTROL = shown(0, 20_000, 0.1)


def test_what_is_alike_goes_on() -> None:
    for seed in range(1, 20):
        assert looked(CONTROL, shown(seed, 20_000, 0.1)).breaches == ()


def test_a_worse_challenger_is_stopped_with_the_reason_and_a_better_one_is_not() -> None:
    assert looked(CONTROL, shown(1, 20_000, 0.08)).breaches[0].startswith("rate: 0.0")
    assert looked(CONTROL, shown(1, 20_000, 0.12, scores=0.12)).breaches == ()


def test_harm_that_is_allowed_for_is_no_breach() -> None:
    worse = shown(1, 20_000, 0.088)
    assert looked(CONTROL, worse).breaches
    assert not looked(CONTROL, worse, Guardrails(planned=40_000, harm=0.3)).breaches


def test_the_first_users_end_nothing_by_what_they_click() -> None:
    control = Sums(rate=Arm.of([9, 9, 9], [8, 9, 9]), users=3)
    challenger = Sums(rate=Arm.of([9, 9], [0, 0]), users=2)
    few = Guardrails(planned=5)
    assert looked(control, challenger, few).interval.high < 0
    assert looked(control, challenger, few).breaches == ()
    assert looked(control, challenger).breaches == ()


def test_a_wrong_split_is_a_breach_whatever_the_rates() -> None:
    look = looked(CONTROL, shown(2, 20_000, 0.1), shares=(0.9, 0.1))
    assert look.breaches[0].startswith("sample ratio: 20,000 and 20,000 users, expected 90.0% to 10.0%")
    assert look.split_p < 1e-6


@pytest.mark.parametrize(
    ("fields", "breach"),
    [
        ({"failed": 700}, "requests failed: 3.5% of the challenger's users met it, 0.0% of the control's"),
        ({"empty": 900}, "answers without an item: 4.5% of the challenger's users met it"),
        ({"scores": 0.3}, "calibration: 0.32"),
        ({"scores": 0.04}, "calibration: 2.4"),
        ({"novel": 0.4}, "novelty: 39.9%"),
    ],
)
def test_each_guardrail_sees_what_it_is_for_and_nothing_else_does(fields: dict[str, Any], breach: str) -> None:
    (found,) = looked(CONTROL, shown(4, 20_000, 0.1, **fields)).breaches
    assert found.startswith(breach)


def test_answers_that_take_longer_are_a_breach_where_more_than_one_user_waits_and_enough_were_timed() -> None:
    slower = Slower().with_slice(10, 10, 500, 500).with_slice(10, 10, 500, 500)
    found = shown(4, 20_000, 0.1, slow=20, p99_ms=40.0)
    (breach,) = RULE.look(CONTROL, found, shares=HALVES, slower=slower).breaches
    assert breach == "p99: 40.0 ms against 12.0"
    for other in (replace(found, slow=1), replace(found, requests=100)):
        assert RULE.look(CONTROL, other, shares=HALVES, slower=slower).breaches == ()
    assert RULE.look(CONTROL, found, shares=HALVES, slower=Slower().with_slice(5, 10, 500, 500)).breaches == ()


def test_a_challenger_that_mends_the_calibration_goes_on() -> None:
    control = shown(9, 20_000, 0.1, scores=0.3)
    assert looked(control, shown(10, 20_000, 0.1, scores=0.11)).breaches == ()
    assert looked(control, shown(10, 20_000, 0.1, scores=0.9)).breaches[0].startswith("calibration: 0.11")


def test_items_that_nobody_new_sees_any_more_are_a_breach() -> None:
    control = shown(5, 20_000, 0.1, novel=0.4)
    (found,) = looked(control, shown(6, 20_000, 0.1, novel=0.02)).breaches
    assert found.startswith("novelty: 2.0% of the items shown were hardly known to training, 40.0%")


def test_a_challenger_that_answers_nobody_is_stopped_after_a_handful_of_users() -> None:
    control = shown(7, 12, 0.1)
    dead = Sums(users=8, failed=8)
    (found,) = looked(control, dead).breaches
    assert found.startswith("requests failed: 100.0%")
    assert looked(control, Sums(users=2, failed=2)).breaches == ()


def test_the_parts_together_leave_a_false_alarm_its_share() -> None:
    # A drop is one side of the interval; failures, empty answers, times, calibration and novelty have a part each.
    assert RULE.alpha / 2 + RULE.split_alpha + 5 * RULE.fault_alpha <= 0.05


def test_a_part_of_the_chance_makes_intervals_wider() -> None:
    challenger = shown(8, 20_000, 0.1)
    whole = RULE.look(CONTROL, challenger, shares=HALVES).interval
    fifth = RULE.look(CONTROL, challenger, shares=HALVES, part=0.2).interval
    assert fifth.low < whole.low < whole.high < fifth.high
