"""The rule ends what is worse or split wrongly, says why, and lets the rest go on."""

import numpy as np

from models.sequential import Arm
from tessera.bench.rollout_rates import arm_of
from tessera.guardrail import Rule, Watch

RULE = Rule(planned=40_000)


def shown(rng: np.random.Generator, users: int, rate: float) -> Arm:
    impressions = 1 + rng.poisson(3, users)
    return arm_of(impressions, rng.binomial(impressions, rate))


def test_a_worse_challenger_is_stopped_with_the_reason_and_a_better_one_is_not() -> None:
    for rate, stopped in ((0.07, True), (0.1, False), (0.13, False)):
        rng, watch = np.random.default_rng(0), Watch(RULE, shares=(0.5, 0.5))
        control, challenger, breaches = Arm(), Arm(), ()
        for _ in range(10):
            control, challenger = control + shown(rng, 2_000, 0.1), challenger + shown(rng, 2_000, rate)
            breaches = breaches or watch.look(control, challenger).breaches
        assert bool(breaches) == stopped
        assert not stopped or breaches[0].startswith("rate: 0.07")


def test_harm_that_is_allowed_for_is_no_breach() -> None:
    rng = np.random.default_rng(1)
    control, challenger = shown(rng, 20_000, 0.1), shown(rng, 20_000, 0.09)
    assert Watch(RULE, shares=(0.5, 0.5)).look(control, challenger).breaches
    lenient = Rule(planned=40_000, harm=0.3)
    assert not Watch(lenient, shares=(0.5, 0.5)).look(control, challenger).breaches


def test_a_wrong_split_is_a_breach_whatever_the_rates() -> None:
    rng = np.random.default_rng(2)
    look = Watch(RULE, shares=(0.9, 0.1)).look(shown(rng, 20_000, 0.1), shown(rng, 20_000, 0.1))
    assert look.breaches[0].startswith("sample ratio: 20,000 and 20,000 users where 0.900 to 0.100 was asked for")
    assert look.split_p < 1e-6


def test_the_rates_together_leave_a_false_alarm_its_share() -> None:
    # A drop is one side of the interval; what is left of 5 % is for the operational guardrails.
    assert RULE.alpha / 2 + RULE.split_alpha < 0.05
