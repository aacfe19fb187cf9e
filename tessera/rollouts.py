"""The experiments of a model in the registry: started, judged, ended. Servers follow what stands there."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from features.error import BundleError, EventError, TesseraError
from models.impression import Impression, Shadowed, decode_impression, decode_outcome
from models.registry import CHAMPION, Registry, Release
from serving.assignment import CHALLENGER, CONTROL, Experiment, Step, expected_shares, room
from streaming.log import EventLog, Reader
from streaming.topic import Topics
from tessera.experiment import Ledger, Tally
from tessera.guardrail import Look, Rule, Watch

_BATCH, _WAIT_S = 2_000, 0.2


_KEPT = 20


class Past(msgspec.Struct, frozen=True):
    """An experiment that ended: when, in seconds since 1970, and why."""

    experiment: Experiment
    ended: int
    why: str


def past(registry: Registry, model: str) -> list[Past]:
    """The last experiments that ended on a model, oldest first."""
    text = registry.ended_rollouts(model)
    return msgspec.json.decode(text, type=list[Past]) if text else []


def running(registry: Registry, model: str) -> list[Experiment]:
    """The experiments that run on a model."""
    text = registry.rollouts(model)
    try:
        return msgspec.json.decode(text, type=list[Experiment]) if text else []
    except msgspec.DecodeError as error:
        raise BundleError(f"model {model!r}: the rollouts in the registry cannot be read: {error}") from error


def start(
    registry: Registry,
    model: str | None,
    challenger: str,
    ramp: Sequence[Step],
    *,
    name: str | None = None,
    layer: str = "models",
    shadow: bool = False,
) -> Experiment:
    """Starts an experiment of a release against the champion.

    Args:
        challenger: an alias, a version, or a bundle's id.
        ramp: shares by time.

    Raises:
        TesseraError: no such release, it is the champion, or the layer has no room.
    """
    champion = registry.resolve(model, CHAMPION)
    release = registry.release(champion.model, challenger)
    if release.bundle == champion.bundle:
        raise TesseraError(f"{challenger}: this is the champion, which already serves; name another version")
    held = running(registry, champion.model)
    made = Experiment(
        name=name or f"{champion.model}-{release.version}",
        challenger=release.bundle,
        control=champion.bundle,
        layer=layer,
        start=0.0,
        ramp=list(ramp),
        started=int(time.time()),
        shadow=shadow,
    )
    made.check()
    if any(one.name == made.name for one in held):
        raise TesseraError(f"rollout {made.name!r} runs already; end it by `tessera rollout stop`, or choose a --name")
    made = msgspec.structs.replace(made, start=room(layer, made.reserved, held))
    _set(registry, champion.model, [*_changed(held, {layer}), made])
    return made


def stop(registry: Registry, model: str | None, name: str, *, why: str) -> Release:
    """Ends an experiment: its users get the champion, and the reason stands with the challenger."""
    champion = registry.resolve(model, CHAMPION)
    held = running(registry, champion.model)
    ended = next((one for one in held if one.name == name), None)
    if ended is None:
        known = ", ".join(one.name for one in held) or "none"
        raise TesseraError(f"rollout {name!r}: there is no such; there are: {known}")
    _end(registry, champion.model, held, [ended], why)
    release = registry.release(champion.model, ended.challenger)
    # The reason stands with a challenger that no other experiment still tries.
    if not any(one.challenger == ended.challenger for one in held if one.name != name):
        registry.end_challenge(release, why=why)
    return release


def promoted(registry: Registry, release: Release) -> Release:
    """Makes a release the champion, and ends the experiments that this decides: those against the champion before."""
    now = registry.promote(release)
    held = running(registry, release.model)
    over = [one for one in held if one.control != now.bundle]
    if over:
        _end(registry, release.model, held, over, f"{now.bundle} was promoted")
    return now


@dataclass(frozen=True)
class ArmView:
    """One arm as a report shows it."""

    requests: int
    users: int
    outcomes: int
    rate: float
    failed: float
    empty: float
    p99_ms: float
    calibration: float | None


@dataclass(frozen=True)
class Standing:
    """How an experiment stands.

    Attributes:
        estimate, low, high: the challenger's rate less the control's, and the bounds that hold at every look.
        split_p: how surprising the split of users is.
        breaches: what ends it; empty where it goes on.
    """

    experiment: str
    challenger: str
    control: str
    share: float
    shadow: bool
    arms: dict[str, ArmView]
    estimate: float
    low: float
    high: float
    split_p: float
    breaches: tuple[str, ...]
    shadowed: dict[str, Any] = field(default_factory=dict)


class Judge:
    """Reads impressions and outcomes from their beginning, and goes on; says how experiments stand.

    Args:
        rule: see `Rule`.
    """

    def __init__(
        self,
        registry: Registry,
        log: EventLog,
        topics: Topics,
        *,
        model: str | None,
        rule: Rule = Rule(),  # noqa: B008
    ) -> None:
        self._registry = registry
        self._log = log
        self._topics = topics
        self._model = registry.resolve(model, CHAMPION).model
        self._rule = rule
        self._watches: dict[str, Watch] = {}
        self._bad = 0
        self.experiments = running(registry, self._model)
        self.ledger = Ledger(one.name for one in self.experiments)
        log.create_topics(topics.partitions())
        self._reader: Reader = log.reader(
            [topics.impressions, topics.outcomes], group=f"rollout-{time.time_ns()}", sole=True
        )

    def close(self) -> None:
        """Lets go of the log."""
        self._reader.close()

    def look(self, *, now: float | None = None) -> list[Standing]:
        """Takes in what has come, and judges every experiment that runs."""
        self._read()
        moment = time.time() if now is None else now
        self.experiments = [one for one in running(self._registry, self._model) if one.name in self.ledger.tallies]
        return [self._stand(one, moment) for one in self.experiments]

    def act(self, standings: Sequence[Standing]) -> list[Release]:
        """Rolls back what breached; the reason goes to the registry."""
        return [
            stop(self._registry, self._model, one.experiment, why="rolled back: " + "; ".join(one.breaches))
            for one in standings
            if one.breaches
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
        if isinstance(message, Shadowed) or message.model == self._model:
            self.ledger.show(message)

    def _stand(self, one: Experiment, now: float) -> Standing:
        shares = expected_shares(one, self.experiments, now)
        tallies = self.ledger.tallies[one.name]
        control, challenger = tallies[CONTROL], tallies[CHALLENGER]
        look: Look | None = None
        breaches: list[str] = []
        if not one.shadow and min(shares) > 0:
            # A step of the ramp changes what is asked for: from there on, who is seen is tested by a watch of its own.
            watch = self._watches.setdefault(f"{one.name}@{shares}", Watch(self._rule, shares=shares))
            since = 1_000 * one.step_began(now)
            users = control.users_since(since), challenger.users_since(since)
            look = watch.look(control.arm(), challenger.arm(), users)
            breaches = [*look.breaches, *self._rule.operational(control, challenger)]
        interval = look.interval if look else None
        return Standing(
            experiment=one.name,
            challenger=one.challenger,
            control=one.control,
            share=one.share(now),
            shadow=one.shadow,
            arms={name: _view(tally) for name, tally in tallies.items()},
            estimate=interval.estimate if interval else 0.0,
            low=interval.low if interval else -1.0,
            high=interval.high if interval else 1.0,
            split_p=look.split_p if look else 1.0,
            breaches=tuple(breaches),
            shadowed=_shadowed(self.ledger.shadows[one.name]) if one.shadow else {},
        )


@contextlib.contextmanager
def judging(registry: Registry, log: EventLog, topics: Topics, *, model: str | None, rule: Rule) -> Iterator[Judge]:
    """A judge, closed in order."""
    judge = Judge(registry, log, topics, model=model, rule=rule)
    with contextlib.closing(judge):
        yield judge


def parse_ramp(text: str | None, share: float) -> list[Step]:
    """`0:.01,3600:.1` as steps of seconds and shares; without a text one share from the start.

    Raises:
        TesseraError: it is not of that form.
    """
    if text is None:
        return [Step(0.0, share)]
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return [Step(float(after), float(value)) for after, value in pairs]
    except ValueError as error:
        raise TesseraError(f"--ramp {text}: expected SECONDS:SHARE,…, like 0:.01,3600:.1") from error


def _changed(experiments: Sequence[Experiment], layers: set[str]) -> list[Experiment]:
    """Experiments whose layer gains or loses another: from now on their control is another one."""
    now = int(time.time())
    return [msgspec.structs.replace(one, changed=now) if one.layer in layers else one for one in experiments]


def _end(registry: Registry, model: str, held: Sequence[Experiment], ended: Sequence[Experiment], why: str) -> None:
    """Servers stop first; what ended is noted after."""
    kept_on = [one for one in held if one not in ended]
    _set(registry, model, _changed(kept_on, {one.layer for one in ended}))
    moment = int(time.time())
    kept = [*past(registry, model), *(Past(one, moment, why) for one in ended)][-_KEPT:]
    registry.set_ended_rollouts(model, msgspec.json.encode(kept).decode())


def _set(registry: Registry, model: str, experiments: Sequence[Experiment]) -> None:
    registry.set_rollouts(model, msgspec.json.encode(list(experiments)).decode())


def _view(tally: Tally) -> ArmView:
    arm = tally.arm()
    requests = max(tally.requests, 1)
    return ArmView(
        requests=tally.requests,
        users=arm.users,
        outcomes=arm.outcomes,
        rate=arm.rate,
        failed=tally.failed / requests,
        empty=tally.empty / requests,
        p99_ms=tally.p99_ms,
        calibration=tally.calibration,
    )


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
