"""`rollout`: simulated experiments, judged daily by the rule that serves: how often it is right.

Users come once in two weeks with one impression or more, and click at a rate of their own around the arm's. Every day
the arms are compared and the split is tested.

- A/A: both arms alike; an alarm of any kind is false.
- worse: the challenger's click rate is 5 % lower; it should be rolled back within 400,000 impressions an arm.
- split: 50.5 / 49.5 of 200,000 users where half was asked for; it should be caught.
- assignment: real ids through the real hash: balance, independence of two layers, and who moves when a share grows.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from scipy.stats import chi2_contingency, chisquare

from features.dataset import Dataset
from models.sequential import Arm
from serving.assignment import Experiment, Step, arms, places
from tessera.bench.result import BenchResult, Claim, at_least, at_most
from tessera.guardrail import Rule, Watch

_EXPERIMENTS, _DAYS = 2_000, 14
_BASE, _WORSE = 0.10, 0.05
_IMPRESSIONS, _PER_USER = 400_000, 4
_SPLIT_USERS, _SPLIT = 200_000, 0.505
# Of a user's own rate around the arm's, as a beta distribution's weight.
_SPREAD = 20.0
_USERS = 400_000


def rollout(dataset: Dataset, out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Simulates 2,000 experiments, whatever the seeds: each has a seed of its own."""
    users = _IMPRESSIONS // _PER_USER
    rule = Rule(planned=2 * users)
    found: dict[str, list[int]] = {"A/A": [], "worse": []}
    with Progress(console=console) as bar:
        task = bar.add_task("experiments", total=_EXPERIMENTS)
        for number in range(_EXPERIMENTS):
            kind = "A/A" if number % 2 == 0 else "worse"
            rate = _BASE if kind == "A/A" else _BASE * (1 - _WORSE)
            found[kind].append(_stopped(np.random.default_rng(number), rule, rate, users))
            bar.advance(task)
    caught = [_caught(np.random.default_rng(number)) for number in range(_EXPERIMENTS)]
    false = float(np.mean([day > 0 for day in found["A/A"]]))
    back = float(np.mean([day > 0 for day in found["worse"]]))
    days = [day for day in found["worse"] if day > 0]
    rows: list[dict[str, Any]] = [
        {"part": "A/A", "experiments": len(found["A/A"]), "stopped": false},
        {
            "part": "worse by 5 %",
            "experiments": len(found["worse"]),
            "stopped": back,
            "day_p50": float(np.median(days)),
        },
        {"part": "split 50.5 / 49.5", "experiments": len(caught), "stopped": float(np.mean(caught))},
        *_assignment(),
    ]
    return BenchResult("rollout", "simulated", 1, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    by = {row["part"]: row for row in rows}
    return [
        at_most("A/A, false alarms", by["A/A"]["stopped"], 0.05),
        at_least("worse by 5 %, rolled back", by["worse by 5 %"]["stopped"], 0.95),
        at_least("split of 50.5 / 49.5, caught", by["split 50.5 / 49.5"]["stopped"], 0.95),
        at_least("assignment is balanced, p", by["balance"]["p"], 0.001),
        at_least("two layers are independent, p", by["independence"]["p"], 0.001),
        at_most("share of users that moved and need not", by["a share grows"]["moved_needlessly"], 0.0),
    ]


def _stopped(rng: np.random.Generator, rule: Rule, rate: float, users: int) -> int:
    """The day on which the rule stops an experiment, 0 where it never does."""
    watch = Watch(rule, shares=(0.5, 0.5))
    control, challenger = Arm(), Arm()
    for day in range(1, _DAYS + 1):
        control += _day(rng, users // _DAYS, _BASE)
        challenger += _day(rng, users // _DAYS, rate)
        if watch.look(control, challenger).breaches:
            return day
    return 0


def _day(rng: np.random.Generator, users: int, rate: float) -> Arm:
    # Arrivals are random, so that the split is too.
    count = int(rng.poisson(users))
    impressions = 1 + rng.poisson(_PER_USER - 1, count)
    clicks = rng.binomial(impressions, rng.beta(_SPREAD * rate, _SPREAD * (1 - rate), count))
    return arm_of(impressions, clicks)


def arm_of(impressions: NDArray[np.integer], outcomes: NDArray[np.integer]) -> Arm:
    """The sums of users with so many impressions and outcomes."""
    i, c = impressions.astype(np.float64), outcomes.astype(np.float64)
    return Arm(len(i), int(i.sum()), int(c.sum()), float(i @ i), float(c @ c), float(i @ c))


def _caught(rng: np.random.Generator) -> bool:
    watch = Watch(Rule(planned=_SPLIT_USERS), shares=(0.5, 0.5))
    counts = [0, 0]
    for _ in range(_DAYS):
        first = int(rng.binomial(_SPLIT_USERS // _DAYS, _SPLIT))
        counts = [counts[0] + first, counts[1] + _SPLIT_USERS // _DAYS - first]
        watch.split.look(counts)
    return watch.split.mismatched


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
