"""The judge of experiments: it reads impressions and outcomes, and rolls back breaches of a guardrail."""

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from features.errors import EventError
from features.lock import locked
from features.shown.message import Impression, Shadowed, decode_impression, decode_outcome
from models.registry.registry import Registry
from models.registry.release import CHAMPION, Release
from serving.rollout.experiment import CHALLENGER, CONTROL, Experiment, expected_shares
from serving.rollout.guardrails import Guardrails, Sums
from serving.rollout.ledger import Ledger
from serving.rollout.lifecycle import running, stop
from serving.rollout.tally import Tally
from serving.rollout.time_slices import SlownessAllowance
from streaming.forget.request import ForgottenFeed
from streaming.log.protocol import EventLog, Positions, Reader
from streaming.log.topics import Topics

_BATCH, _WAIT_S, _TURN_S = 2_000, 0.2, 5.0
_FEW = 5


@dataclass(frozen=True)
class ArmView:
    """Arm as a report shows it.

    Attributes:
        requests: Number of requests.
        users: Number of users with an impression.
        outcomes: Number of outcomes that count.
        rate: Outcomes by answers.
        failed, empty: Shares of the requests without an answer, and with an answer without an item.
        p99_ms: p99 of the answers' times, milliseconds.
        calibration: Outcomes by predicted outcomes. None without predictions.
        novelty: Share of shown items that training hardly knew. None without shown items.
        kinds: Number of all outcomes by kind.
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
class ExperimentState:
    """State of an experiment at a look.

    Attributes:
        experiment: Name of the experiment.
        challenger, control: Ids of the bundles.
        share: Share of the layer that the challenger has now.
        shadow: True if the challenger's rankings are never shown.
        since: Start of the present epoch, Unix seconds. Earlier data are not compared.
        arms: View of each arm, by its name.
        estimate: Challenger's rate minus the control's.
        low, high: Always-valid interval of the difference. None without data.
        split_p: p-value of the split of users.
        breaches: Sentences about breaches that end the experiment. Empty if the experiment continues.
        shadowed: Figures of the shadow rankings. Empty without a shadow.
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
    """Judge of experiments. Reads impressions and outcomes from the ledger's position on and reports their state.

    Attributes:
        ledger: Fold of the messages.
        experiments: Experiments that ran at the last look.

    Args:
        registry: Registry of the experiments.
        log: Log of the impressions and outcomes.
        topics: Names of the topics.
        model: Name of the model. None: the registry holds one model.
        rule: Guardrails of the experiments.
        familiar: Maps a bundle's id to the items with enough events in its training. Other shown items are novel.
        ledger: File of the ledger, locked while this judge runs. None reads both topics from their beginning.
        copy: True starts from a copy of the ledger and never changes the ledger.
    """

    def __init__(
        self,
        registry: Registry,
        log: EventLog,
        topics: Topics,
        *,
        model: str | None,
        rule: Guardrails = Guardrails(),  # noqa: B008
        familiar: Callable[[str], frozenset[str]] = lambda bundle: frozenset(),
        ledger: Path | None = None,
        copy: bool = False,
    ) -> None:
        self._registry = registry
        self._log = log
        self._topics = topics
        self._rule = rule
        self._familiar = familiar
        self._champion = registry.resolve(model, CHAMPION)
        self._bad = 0
        self.experiments: list[Experiment] = []
        log.create_topics(topics.partitions())
        with contextlib.ExitStack() as stack:
            if ledger is not None and not copy:
                stack.enter_context(locked(ledger, wait_s=_TURN_S))
            allowed = SlownessAllowance(rule.slower, rule.least_ms)
            known = familiar(self._champion.bundle)
            self.ledger = Ledger(ledger, copy=copy, outcome=rule.outcome, familiar=known, allowed=allowed)
            stack.callback(self.ledger.close)
            ends, start = self._ends(), self.ledger.positions
            if any(position > ends.get(partition, 0) for partition, position in start.items()):
                # The log was replaced, so the folded messages are not messages of this log.
                self.ledger.restart()
                start = {}
            self._reader: Reader = log.reader(
                [topics.impressions, topics.outcomes], group=f"rollout-{time.time_ns()}", sole=True, start=start
            )
            stack.callback(self._reader.close)
            self._forgotten = ForgottenFeed(log, topics)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Closes the ledger and the connection to the log."""
        self._stack.close()

    def look(self, *, now: float | None = None) -> list[ExperimentState]:
        """Reads new messages, and judges every running experiment.

        Args:
            now: Time of the look, Unix seconds. Default: the present time.
        """
        model = self._champion.model
        champion = self._registry.resolve(model, CHAMPION)
        if champion.bundle != self._champion.bundle:
            self._champion, self.ledger.familiar = champion, self._familiar(champion.bundle)
        self._read()
        moment = time.time() if now is None else now
        # The registry is read after the topics, so every experiment with a message has started or ended by now.
        self.experiments = running(self._registry, model)
        self.ledger.close_slices(int(1_000 * moment))
        self.ledger.forget(int(1_000 * moment), [experiment.id for experiment in self.experiments])
        self.ledger.keep(self._reader.position())
        return [self._state(experiment, self.experiments, moment) for experiment in self.experiments]

    def act(self, states: Sequence[ExperimentState]) -> list[Release]:
        """Rolls back running experiments with breaches, and writes the reasons to the registry.

        Args:
            states: Result of `look`.

        Returns:
            Releases of the challengers that were rolled back.
        """
        model = self._champion.model
        names = {state.name for state in running(self._registry, model)}
        return [
            stop(self._registry, model, state.experiment, why="rolled back: " + "; ".join(state.breaches))
            for state in states
            if state.breaches and state.experiment in names
        ]

    @property
    def aside(self) -> dict[str, int]:
        """Counts quarantined messages by reason."""
        counts = dict(self.ledger.aside)
        if self.ledger.waiting:
            counts["unknown impression"] = self.ledger.waiting
        if self._bad:
            counts["undecodable"] = self._bad
        return counts

    def _ends(self) -> Positions:
        return {
            (topic, part): end
            for topic in (self._topics.impressions, self._topics.outcomes)
            for part, end in self._log.end_offsets(topic).items()
        }

    def _read(self) -> None:
        ends = self._ends()
        self.ledger.hide(self._forgotten.read_on())
        while any(self._reader.position().get(partition, 0) < end for partition, end in ends.items()):
            for message in self._reader.poll(_BATCH, _WAIT_S):
                try:
                    if message.topic == self._topics.outcomes:
                        self.ledger.note(decode_outcome(message.value))
                    else:
                        self._show(decode_impression(message.value))
                except EventError:
                    self._bad += 1
            self.ledger.keep(self._reader.position())

    def _show(self, message: Impression | Shadowed) -> None:
        if isinstance(message, Shadowed) or message.model == self._champion.model:
            if isinstance(message, Impression):
                user = self._forgotten.users.alias(message.user, 1_000 * message.time_ms)
                message = message if user == message.user else msgspec.structs.replace(message, user=user)
            self.ledger.show(message)

    def _state(self, experiment: Experiment, experiments: Sequence[Experiment], now: float) -> ExperimentState:
        shares = expected_shares(experiment, experiments, now)
        arms = self.ledger.arms(experiment.id, experiment.epoch(now))
        sums = {name: tally.sums() for name, tally in arms.items()}
        slower = self.ledger.slower(experiment.id, experiment.epoch(now))
        look = None
        if not experiment.shadow and min(shares) > 0:
            look = self._rule.look(
                sums[CONTROL], sums[CHALLENGER], shares=shares, part=experiment.part(), slower=slower
            )
        return ExperimentState(
            experiment=experiment.name,
            challenger=experiment.challenger,
            control=experiment.control,
            share=experiment.share(now),
            shadow=experiment.shadow,
            since=experiment.epoch(now),
            arms={name: view(tally, sums[name]) for name, tally in arms.items()},
            estimate=look.interval.estimate if look else 0.0,
            low=finite(look.interval.low) if look else None,
            high=finite(look.interval.high) if look else None,
            split_p=look.split_p if look else 1.0,
            breaches=look.breaches if look else (),
            shadowed=self.ledger.shadowed(experiment.id) if experiment.shadow else {},
        )


@contextlib.contextmanager
def judging(
    registry: Registry,
    log: EventLog,
    topics: Topics,
    *,
    model: str | None,
    rule: Guardrails,
    familiar: Callable[[str], frozenset[str]] = lambda bundle: frozenset(),
    ledger: Path | None = None,
    copy: bool = False,
) -> Iterator[Judge]:
    """Yields a judge and closes its parts in order."""
    judge = Judge(registry, log, topics, model=model, rule=rule, familiar=familiar, ledger=ledger, copy=copy)
    with contextlib.closing(judge):
        yield judge


def ledger_path(home: Path, log: str, topics: Topics, model: str, rule: Guardrails) -> Path:
    """Returns the path of the ledger of a model's experiments. Each log, model and counting rule has its own file."""
    content = "\0".join((log, topics.impressions, model, rule.outcome, str(rule.slower), str(rule.least_ms)))
    return home / "judge" / f"{hashlib.sha256(content.encode()).hexdigest()[:16]}.sqlite"


def familiar_items(registry: Registry, model: str | None, cache: Path) -> Callable[[str], frozenset[str]]:
    """Returns a function from a bundle's id to the items with five or more positive events in its training."""

    def find(bundle: str) -> frozenset[str]:
        items = registry.open(registry.release(model, bundle), cache).items
        return frozenset(items.filter(pl.col("train_positives") >= _FEW)["item_id"].to_list())

    return find


def view(tally: Tally, sums: Sums) -> ArmView:
    """Returns an arm as a report shows it."""
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
    """Returns a bound, or None for an infinite bound, since JSON has no infinite numbers."""
    return bound if math.isfinite(bound) else None


def interval_text(low: float | None, high: float | None) -> str:
    """Formats the always-valid interval of a difference."""
    if low is None or high is None:
        return "too few users for an interval"
    return f"always-valid interval [{low:+.4f}, {high:+.4f}]"
