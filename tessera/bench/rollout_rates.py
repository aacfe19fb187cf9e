"""`rollout`: simulated experiments, judged daily by the rule that serves: how often it is right.

Users come once in two weeks with one impression or more, and click at a rate of their own around the arm's; some meet a
failure, or an empty answer, and every answer has scores, novel items and a time. Every day the whole rule looks.

- A/A: both arms alike; an alarm of any kind is false.
- worse: the challenger's click rate is 5 % lower; it should be rolled back within 400,000 impressions an arm.
- failing: three in a hundred of the challenger's users meet a failure; how soon it is rolled back.
- split: 50.5 / 49.5 of 200,000 users where half was asked for; it should be caught.
- assignment: real ids through the real hash: balance, independence of two layers, and who moves when a share grows.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from scipy.stats import chi2_contingency, chisquare

from features.dataset import Dataset
from models.sequential import Arm, mismatched
from serving.assignment import Experiment, Step, arms, places
from tessera.bench.result import BenchResult, Claim, at_least, at_most
from tessera.guardrail import Rule, Sums

_EXPERIMENTS, _DAYS = 2_000, 14
_IMPRESSIONS, _PER_USER = 400_000, 4
_SPLIT_USERS, _SPLIT = 200_000, 0.505
# Of a user's own rate around the arm's, as a beta distribution's weight.
_SPREAD = 20.0
_SHOWN, _TIMES = 10, 1_000
_USERS = 400_000


@dataclass(frozen=True)
class Arms:
    """What an arm is like.

    Attributes:
        rate: clicks an impression.
        failed, empty: chances that a user meets one.
        novel: share of the items shown.
    """

    rate: float = 0.10
    failed: float = 0.005
    empty: float = 0.01
    novel: float = 0.05


_ALIKE = Arms()
_KINDS = {"A/A": _ALIKE, "worse by 5 %": replace(_ALIKE, rate=0.095), "failing": replace(_ALIKE, failed=0.03)}


def rollout(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Simulates 2,000 experiments of each kind, whatever the seeds: each has a seed of its own."""
    users = _IMPRESSIONS // _PER_USER
    rule = Rule(planned=2 * users)
    rows: list[dict[str, Any]] = []
    with Progress(console=console) as bar:
        for number, (name, challenger) in enumerate(_KINDS.items()):
            found = [
                _stopped(np.random.default_rng([number, seed]), rule, challenger, users)
                for seed in bar.track(range(_EXPERIMENTS), description=name)
            ]
            days = [day for day in found if day > 0]
            row = {"part": name, "experiments": len(found), "stopped": len(days) / len(found)}
            rows.append(row | {"day_p50": float(np.median(days)) if days else None})
    caught = [_caught(np.random.default_rng(number)) for number in range(_EXPERIMENTS)]
    rows.append({"part": "split 50.5 / 49.5", "experiments": len(caught), "stopped": float(np.mean(caught))})
    rows += _assignment()
    return BenchResult("rollout", "simulated", 1, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    by = {row["part"]: row for row in rows}
    return [
        at_most("A/A, false alarms of any guardrail", by["A/A"]["stopped"], 0.05),
        at_least("worse by 5 %, rolled back", by["worse by 5 %"]["stopped"], 0.95),
        at_least("failing for 3 % of the users, rolled back", by["failing"]["stopped"], 0.95),
        at_least("split of 50.5 / 49.5, caught", by["split 50.5 / 49.5"]["stopped"], 0.95),
        at_least("assignment is balanced, p", by["balance"]["p"], 0.001),
        at_least("two layers are independent, p", by["independence"]["p"], 0.001),
        at_most("share of users that moved and need not", by["a share grows"]["moved_needlessly"], 0.0),
    ]


def _stopped(rng: np.random.Generator, rule: Rule, challenger: Arms, users: int) -> int:
    """The day on which the rule stops an experiment, 0 where it never does."""
    sums = [Sums(), Sums()]
    for day in range(1, _DAYS + 1):
        sums = [
            _grown(before, rng, users // _DAYS, arm) for before, arm in zip(sums, (_ALIKE, challenger), strict=True)
        ]
        if rule.look(*sums, shares=(0.5, 0.5)).breaches:
            return day
    return 0


def _grown(before: Sums, rng: np.random.Generator, users: int, arm: Arms) -> Sums:
    """An arm after another day."""
    # Arrivals are random, so that the split is too.
    count = int(rng.poisson(users))
    impressions = 1 + rng.poisson(_PER_USER - 1, count)
    chance = rng.beta(_SPREAD * arm.rate, _SPREAD * (1 - arm.rate), count)
    clicks = rng.binomial(impressions, chance)
    shown = _SHOWN * impressions
    return Sums(
        rate=before.rate + Arm.of(impressions, clicks),
        # Scores are right on average, and off for each user.
        calibration=before.calibration + Arm.of(impressions * arm.rate * rng.gamma(4.0, 0.25, count), clicks),
        novelty=before.novelty + Arm.of(shown, rng.binomial(shown, arm.novel)),
        users=before.users + count,
        failed=before.failed + int(rng.binomial(count, arm.failed)),
        empty=before.empty + int(rng.binomial(count, arm.empty)),
        # Of the last requests, as the judge keeps them; a fresh draw is what a day's traffic leaves of the day before.
        ms=rng.lognormal(1.5, 0.6, _TIMES),
    )


def _caught(rng: np.random.Generator) -> bool:
    rule = Rule(planned=_SPLIT_USERS)
    counts = [0, 0]
    for _ in range(_DAYS):
        first = int(rng.binomial(_SPLIT_USERS // _DAYS, _SPLIT))
        counts = [counts[0] + first, counts[1] + _SPLIT_USERS // _DAYS - first]
        if mismatched(counts, (0.5, 0.5), alpha=rule.split_alpha, planned=rule.planned):
            return True
    return False


def _assignment() -> list[dict[str, Any]]:
    users = [f"user-{number}" for number in range(_USERS)]
    a, b = places(users, "one"), places(users, "two")
    balance = chisquare(np.histogram(a, bins=1_000, range=(0, 1))[0]).pvalue
    both = np.histogram2d(a, b, bins=20, range=[[0, 1], [0, 1]])[0]
    one = Experiment("a", "b-2", "b-1", "one", 0.0, [Step(0.0, 0.1), Step(10.0, 0.3)], 0)
    before, after = (arms(users, one, [one], now) for now in (1.0, 11.0))
    moved = (before != after) & ~((a >= 0.1) & (a < 0.3))
    return [
        {"part": "balance", "users": _USERS, "p": float(balance)},
        {"part": "independence", "users": _USERS, "p": float(chi2_contingency(both).pvalue)},
        {"part": "a share grows", "users": _USERS, "moved_needlessly": float(moved.mean())},
    ]
