"""`rollout`: measures how often the serving guardrails are right, on simulated experiments.

Two weeks of users with one impression or more, who click at a rate of their own around the arm's; some meet a failure,
or an empty answer, and every answer has scores, novel items and a time. The whole rule judges.

- A/A, watched: users come again, by day more than by night. Everybody is slow for a while every few hours. The
  challenger has .01, .1 or .5 of the users, and there is a look each minute, as `watch` takes them. An alarm of any
  kind is false.
- A/A, worse, failing: users come once, halves, a look a day. The challenger is alike; or its click rate is 5 % lower,
  and it should be rolled back within 400,000 impressions an arm; or three in a hundred of its users meet a failure.
- split: 50.5 / 49.5 of 200,000 users with an expected half; it should be caught.
- assignment: real ids through the real hash: balance, independence of two layers, and who moves when a share grows.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from scipy.stats import chi2_contingency, chisquare

from features.dataset.descriptor import Dataset
from serving.rollout.experiment import Experiment, RampStep, arms, places
from serving.rollout.guardrails import Guardrails, Sums
from serving.rollout.sequential import Arm, Slower, mismatched
from serving.rollout.time_slices import SlownessAllowance
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.bench.harness.rows import measured_rows

_EXPERIMENTS, _DAYS = 2_000, 14
_IMPRESSIONS, _PER_USER = 400_000, 4
_SPLIT_USERS, _SPLIT = 200_000, 0.505
# Of a user's own rate around the arm's, as a beta distribution's weight.
_SPREAD = 20.0
_SHOWN = 10
_USERS = 400_000
# A/A, watched: users of the layer, requests a minute on average, experiments for each share and seed.
_REGULARS, _A_MINUTE, _WATCHED = 20_000, 60, 2
_SHARES = (0.01, 0.1, 0.5)
_MINUTES = 1_440


@dataclass(frozen=True)
class Arms:
    """Properties of an arm.

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
    rule = Guardrails(planned=2 * users)
    rows = measured_rows()
    with Progress(console=console) as bar:
        for number, (name, challenger) in enumerate(_KINDS.items()):
            stops = [
                _stopped(np.random.default_rng([number, seed]), rule, challenger, users)
                for seed in bar.track(range(_EXPERIMENTS), description=name)
            ]
            days = [day for day in stops if day > 0]
            row = {"part": name, "experiments": len(stops), "stopped": len(days) / len(stops)}
            rows.append(row | {"day_p50": float(np.median(days)) if days else None})
        for share in _SHARES:
            count = _WATCHED * seeds
            name = f"A/A, watched, {share:g}"
            stops = [_watched(seed, share) for seed in bar.track(range(count), description=name)]
            rows.append(
                {"part": name, "experiments": count, "stopped": float(np.mean([minute > 0 for minute in stops]))}
            )
    caught = [_caught(np.random.default_rng(number)) for number in range(_EXPERIMENTS)]
    rows.append({"part": "split 50.5 / 49.5", "experiments": len(caught), "stopped": float(np.mean(caught))})
    rows += _assignment()
    return BenchResult("rollout", "simulated", 1, rows, _claims(rows))


def _claims(rows: list[dict[str, Any]]) -> list[Claim]:
    by = {row["part"]: row for row in rows}
    watched = [row for row in rows if row["part"].startswith("A/A, watched")]
    count = sum(row["experiments"] for row in watched)
    alarms = sum(row["stopped"] * row["experiments"] for row in watched) / count
    return [
        at_most("A/A, false alarms of any guardrail", by["A/A"]["stopped"], 0.05),
        # Two standard errors of so few experiments: each takes 20,160 looks.
        at_most("A/A, watched, false alarms of any guardrail", alarms, 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5),
        at_least("worse by 5 %, rolled back", by["worse by 5 %"]["stopped"], 0.95),
        at_least("failing for 3 % of the users, rolled back", by["failing"]["stopped"], 0.95),
        at_least("split of 50.5 / 49.5, caught", by["split 50.5 / 49.5"]["stopped"], 0.95),
        at_least("assignment is balanced, p", by["balance"]["p"], 0.001),
        at_least("two layers are independent, p", by["independence"]["p"], 0.001),
        at_most("share of users that moved and need not", by["a share grows"]["moved_needlessly"], 0.0),
    ]


def _stopped(rng: np.random.Generator, rule: Guardrails, challenger: Arms, users: int) -> int:
    """Returns the day on which the rule stops an experiment, 0 where it never does."""
    sums = [Sums(), Sums()]
    for day in range(1, _DAYS + 1):
        sums = [
            _grown(before, rng, users // _DAYS, arm) for before, arm in zip(sums, (_ALIKE, challenger), strict=True)
        ]
        if rule.look(*sums, shares=(0.5, 0.5)).breaches:
            return day
    return 0


def _grown(before: Sums, rng: np.random.Generator, users: int, arm: Arms) -> Sums:
    """Returns an arm after another day."""
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
    )


class _Side:
    """Arm of users who return: each user's sums, and the arm's."""

    def __init__(self, rng: np.random.Generator, users: int) -> None:
        self._chance = rng.beta(_SPREAD * _ALIKE.rate, _SPREAD * (1 - _ALIKE.rate), users)
        # Answers, outcomes, predictions, items shown, novel items, failures, empty answers.
        self._sums = np.zeros((7, users))
        self._seen = np.zeros(users, dtype=bool)
        self._slow = np.zeros(users, dtype=bool)
        self._total = Sums()

    def come(self, rng: np.random.Generator, users: NDArray[np.int64]) -> Sums:
        """Returns the arm after some of its users, each of them once, have come again."""
        before, was = self._parts(users), self._seen[users].copy()
        faulty = self._sums[5:, users] > 0
        failed, empty = rng.random((2, len(users))) < np.array([[1e-3], [2e-3]])
        answered = ~failed
        self._seen[users] = True
        self._sums[0, users] += answered
        self._sums[1, users] += answered & (rng.random(len(users)) < self._chance[users])
        self._sums[2, users] += answered * _ALIKE.rate * rng.gamma(4.0, 0.25, len(users))
        self._sums[3, users] += answered * _SHOWN
        self._sums[4, users] += answered * rng.binomial(_SHOWN, _ALIKE.novel, len(users))
        self._sums[5, users] += failed
        self._sums[6, users] += answered & empty
        more = (self._sums[5:, users] > 0) & ~faulty
        total = (self._total.rate, self._total.calibration, self._total.novelty)
        rate, calibration, novelty = (
            _less(old + after, gone) for old, gone, after in zip(total, before, self._parts(users), strict=True)
        )
        self._total = Sums(
            rate,
            calibration,
            novelty,
            users=self._total.users + int((~was).sum()),
            failed=self._total.failed + int(more[0].sum()),
            empty=self._total.empty + int(more[1].sum()),
            slow=int(self._slow.sum()),
            requests=self._total.requests + len(users),
        )
        return self._total

    def mark(self, users: NDArray[np.int64]) -> None:
        """Marks the users among the slowest."""
        self._slow[users] = True

    def _parts(self, users: NDArray[np.int64]) -> tuple[Arm, Arm, Arm]:
        answers, outcomes, predicted, shown, novel, *_ = self._sums[:, users[self._sums[0, users] > 0]]
        return Arm.of(answers, outcomes), Arm.of(predicted, outcomes), Arm.of(shown, novel)


def _less(arm: Arm, other: Arm) -> Arm:
    """Returns the sums of the users of an arm who are not another's."""
    return Arm(
        arm.users - other.users,
        arm.exposure - other.exposure,
        arm.outcomes - other.outcomes,
        arm.ee - other.ee,
        arm.cc - other.cc,
        arm.ec - other.ec,
    )


def _watched(seed: int, share: float) -> int:
    """Returns the minute in which an A/A experiment is stopped, 0 where it never is."""
    rng = np.random.default_rng([seed, int(1_000 * share)])
    rule, slower = Guardrails(planned=_REGULARS), Slower()
    mine = rng.random(_REGULARS) < share
    number = np.where(mine, np.cumsum(mine), np.cumsum(~mine)) - 1
    sides = _Side(rng, int((~mine).sum())), _Side(rng, int(mine.sum()))
    for minute in range(1, _DAYS * _MINUTES + 1):
        by_day = 1 + 0.8 * np.sin(2 * np.pi * minute / _MINUTES)
        users = np.unique(rng.integers(0, _REGULARS, rng.poisson(_A_MINUTE * by_day)))
        # For two minutes in five hours every user waits long; for two more minutes three in ten do.
        stall = 300 * ((minute % 300 < 2) | ((minute % 300 < 4) & (rng.random(len(users)) < 0.3)))
        ms = rng.lognormal(1.5, 0.4, len(users)) + stall
        compared = np.where(mine[users], SlownessAllowance().less(ms), ms)
        top = users[np.argsort(-compared)[: -(-len(users) // 100)]]
        slower = slower.with_slice(
            int(mine[top].sum()), len(top), int(mine[users].sum()), len(users) - int(mine[users].sum())
        )
        sides[1].mark(number[top[mine[top]]])
        observed = [side.come(rng, number[users[mine[users] == arm]]) for arm, side in enumerate(sides)]
        if rule.look(*observed, shares=(1 - share, share), slower=slower).breaches:
            return minute
    return 0


def _caught(rng: np.random.Generator) -> bool:
    rule = Guardrails(planned=_SPLIT_USERS)
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
    experiment = Experiment("a", "b-2", "b-1", "one", 0.0, [RampStep(0.0, 0.1), RampStep(10.0, 0.3)], 0)
    before, after = (arms(users, experiment, [experiment], now) for now in (1.0, 11.0))
    moved = (before != after) & ~((a >= 0.1) & (a < 0.3))
    return [
        {"part": "balance", "users": _USERS, "p": float(balance)},
        {"part": "independence", "users": _USERS, "p": float(chi2_contingency(both).pvalue)},
        {"part": "a share grows", "users": _USERS, "moved_needlessly": float(moved.mean())},
    ]
