"""The judge of running experiments: reads what was shown and what came of it, and rolls back what breaches its rule."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from features.error import EventError
from models.impression import Impression, Shadowed, decode_impression, decode_outcome
from models.registry import CHAMPION, Registry, Release
from serving.assignment import CHALLENGER, CONTROL, Experiment, expected_shares
from streaming.log import EventLog, Reader
from streaming.topic import Topics
from tessera.experiment import Ledger, Tally
from tessera.guardrail import Rule, Sums
from tessera.rollouts import running, stop

_BATCH, _WAIT_S = 2_000, 0.2
_FEW = 5


@dataclass(frozen=True)
class ArmView:
    """One arm as a report shows it.

    Attributes:
        users: who were shown something; outcomes: those that count, kinds: all of them by what they are.
        failed, empty: shares of the requests.
    """

    requests: int
    users: int
    outcomes: int
    rate: float
    failed: float
    empty: float
    p99_ms: float
    calibration: float | None
    novelty: float | None
    kinds: dict[str, int]


@dataclass(frozen=True)
class Standing:
    """How an experiment stands.

    Attributes:
        since: since when its arms are what they are, in seconds since 1970; nothing before is compared.
        estimate, low, high: the challenger's rate less the control's, and the bounds that hold at every look; None
            where nothing is known.
        split_p: how surprising the split of users is.
        breaches: what ends it; empty where it goes on.
    """

    experiment: str
    challenger: str
    control: str
    share: float
    shadow: bool
    since: int
    arms: dict[str, ArmView]
    estimate: float
    low: float | None
    high: float | None
    split_p: float
    breaches: tuple[str, ...]
    shadowed: dict[str, Any] = field(default_factory=dict)


class Judge:
    """Reads impressions and outcomes from their beginning, and goes on; says how experiments stand.

    Args:
        rule: see `Rule`.
        familiar: items that a bundle's training knew well, by the bundle's id; the others shown are novel.
    """

    def __init__(
        self,
        registry: Registry,
        log: EventLog,
        topics: Topics,
        *,
        model: str | None,
        rule: Rule = Rule(),  # noqa: B008
        familiar: Callable[[str], frozenset[str]] = lambda bundle: frozenset(),
    ) -> None:
        self._registry = registry
        self._log = log
        self._topics = topics
        self._rule = rule
        self._familiar = familiar
        self._champion = registry.resolve(model, CHAMPION)
        self._bad = 0
        self.experiments: list[Experiment] = []
        self.ledger = Ledger(outcome=rule.outcome, familiar=familiar(self._champion.bundle))
        log.create_topics(topics.partitions())
        self._reader: Reader = log.reader(
            [topics.impressions, topics.outcomes], group=f"rollout-{time.time_ns()}", sole=True
        )

    def close(self) -> None:
        """Lets go of the log."""
        self._reader.close()

    def look(self, *, now: float | None = None) -> list[Standing]:
        """Takes in what has come, and judges every experiment that runs."""
        model = self._champion.model
        champion = self._registry.resolve(model, CHAMPION)
        if champion.bundle != self._champion.bundle:
            self._champion, self.ledger.familiar = champion, self._familiar(champion.bundle)
        self._read()
        moment = time.time() if now is None else now
        self.experiments = running(self._registry, model)
        return [self._stand(one, self.experiments, moment) for one in self.experiments]

    def act(self, standings: Sequence[Standing]) -> list[Release]:
        """Rolls back what breached and still runs; the reason goes to the registry."""
        model = self._champion.model
        going = {one.name for one in running(self._registry, model)}
        return [
            stop(self._registry, model, one.experiment, why="rolled back: " + "; ".join(one.breaches))
            for one in standings
            if one.breaches and one.experiment in going
        ]

    @property
    def aside(self) -> dict[str, int]:
        """Messages that were set aside, by reason."""
        found = dict(self.ledger.aside)
        if self.ledger.waiting:
            found["unknown impression"] = self.ledger.waiting
        if self._bad:
            found["undecodable"] = self._bad
        return found

    def _read(self) -> None:
        ends = {
            (topic, part): end
            for topic in (self._topics.impressions, self._topics.outcomes)
            for part, end in self._log.end_offsets(topic).items()
        }
        while any(self._reader.position().get(place, 0) < end for place, end in ends.items()):
            for message in self._reader.poll(_BATCH, _WAIT_S):
                try:
                    if message.topic == self._topics.outcomes:
                        self.ledger.note(decode_outcome(message.value))
                    else:
                        self._show(decode_impression(message.value))
                except EventError:
                    self._bad += 1

    def _show(self, message: Impression | Shadowed) -> None:
        if isinstance(message, Shadowed) or message.model == self._champion.model:
            self.ledger.show(message)

    def _stand(self, one: Experiment, experiments: Sequence[Experiment], now: float) -> Standing:
        shares = expected_shares(one, experiments, now)
        arms = self.ledger.arms(one.id, one.epoch(now))
        sums = {name: tally.sums() for name, tally in arms.items()}
        look = None
        if not one.shadow and min(shares) > 0:
            look = self._rule.look(sums[CONTROL], sums[CHALLENGER], shares=shares, part=one.part())
        return Standing(
            experiment=one.name,
            challenger=one.challenger,
            control=one.control,
            share=one.share(now),
            shadow=one.shadow,
            since=one.epoch(now),
            arms={name: view(tally, sums[name]) for name, tally in arms.items()},
            estimate=look.interval.estimate if look else 0.0,
            low=finite(look.interval.low) if look else None,
            high=finite(look.interval.high) if look else None,
            split_p=look.split_p if look else 1.0,
            breaches=look.breaches if look else (),
            shadowed=_shadowed(self.ledger.shadows.get(one.id, ())) if one.shadow else {},
        )


@contextlib.contextmanager
def judging(
    registry: Registry,
    log: EventLog,
    topics: Topics,
    *,
    model: str | None,
    rule: Rule,
    familiar: Callable[[str], frozenset[str]] = lambda bundle: frozenset(),
) -> Iterator[Judge]:
    """A judge, closed in order."""
    judge = Judge(registry, log, topics, model=model, rule=rule, familiar=familiar)
    with contextlib.closing(judge):
        yield judge


def familiar_items(registry: Registry, model: str | None, cache: Path) -> Callable[[str], frozenset[str]]:
    """Items with five positive events or more in a bundle's training, by the bundle's id."""

    def find(bundle: str) -> frozenset[str]:
        items = registry.open(registry.release(model, bundle), cache).items
        return frozenset(items.filter(pl.col("train_positives") >= _FEW)["item_id"].to_list())

    return find


def view(tally: Tally, sums: Sums) -> ArmView:
    """An arm for those who read."""
    requests, (failed, empty) = tally.requests, tally.faults()
    return ArmView(
        requests=requests,
        users=sums.rate.users,
        outcomes=int(sums.rate.outcomes),
        rate=sums.rate.rate,
        failed=failed / max(requests, 1),
        empty=empty / max(requests, 1),
        p99_ms=sums.p99_ms,
        calibration=sums.calibration.rate if sums.calibration.exposure else None,
        novelty=sums.novelty.rate if sums.novelty.exposure else None,
        kinds=dict(tally.kinds.most_common()),
    )


def finite(bound: float) -> float | None:
    """A bound, or None for an infinite one, which JSON cannot say."""
    return bound if math.isfinite(bound) else None


def surely(low: float | None, high: float | None) -> str:
    """Bounds in words."""
    return "too few users for bounds" if low is None or high is None else f"surely in {low:+.4f} to {high:+.4f}"


def _shadowed(found: Sequence[Shadowed]) -> dict[str, Any]:
    """What the shadow's rankings say: how many, how alike, how far off, how slow, how often broken."""
    sound = [one for one in found if not one.failed]
    alike = [one.correlation for one in sound if one.correlation is not None]
    times = sorted(one.ms for one in sound)
    return {
        "ranked": len(sound),
        "failed": len(found) - len(sound),
        "rank_correlation": sum(alike) / len(alike) if alike else None,
        "score_drift": sum(one.drift for one in sound) / len(sound) if sound else None,
        "p50_ms": times[len(times) // 2] if times else None,
        "p99_ms": times[int(0.99 * (len(times) - 1))] if times else None,
    }
