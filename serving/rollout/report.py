"""Computes the report of one experiment: arms over time, epochs, segments of users, guardrails, decision and reason.

The report depends on the log and the registry alone. Impressions and outcomes are folded in the order of their time, so
every reader of the log gets the same figures at any later time.
"""

import contextlib
import math
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import EventError, TesseraError
from features.shown.message import Impression, Outcome, Shadowed, decode_impression, decode_outcome
from models.registry.registry import Registry
from models.registry.release import CHAMPION
from serving.rollout.experiment import CHALLENGER, CONTROL, Experiment, expected_shares
from serving.rollout.guardrails import Guardrails
from serving.rollout.judge import finite, view
from serving.rollout.ledger import Arms, Ledger
from serving.rollout.lifecycle import PastExperiment, past, running
from serving.rollout.sequential import Arm, difference
from serving.rollout.tally import ANSWERS, OUTCOMES
from serving.rollout.time_slices import SlownessAllowance
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics

_POINTS, _BATCH, _HEAVY = 30, 2_000, 0.9
_NEVER = 1 << 62
# First byte of a stored message: its topic.
_SHOWN, _OUTCOME = b"s", b"o"


def report(
    registry: Registry,
    log: EventLog,
    topics: Topics,
    name: str,
    *,
    model: str | None,
    rule: Guardrails,
    known: Callable[[str], Mapping[str, int]] = lambda bundle: {},
    familiar: Callable[[str], frozenset[str]] = lambda bundle: frozenset(),
) -> dict[str, Any]:
    """Returns the report of an experiment as plain dicts, numbers and strings.

    Args:
        registry: Registry of the experiments.
        log: Log of the impressions and outcomes.
        topics: Names of the log's topics.
        name: Name of an experiment that runs or has ended.
        model: Name of the model. None: the registry holds one model.
        rule: Outcome to count, and the limits of the guardrails.
        known: Maps a bundle's id to the number of kept visits of each user of its training. All other users are new.
        familiar: Maps a bundle's id to the items with enough events in its training. All other items are new.

    Raises:
        TesseraError: No experiment has this name.
        LogError: The log is unavailable.
    """
    champion = registry.resolve(model, CHAMPION)
    subject, experiments = _selected(registry, champion.model, name)
    experiment = subject.experiment
    until = time.time() if subject.ended == _NEVER else float(subject.ended)
    allowed = SlownessAllowance(rule.slower, rule.least_ms)
    ledger = Ledger(outcome=rule.outcome, familiar=familiar(experiment.control), allowed=allowed)
    with contextlib.closing(TimeOrder()) as messages:
        start_ms, end_ms = experiment.started * 1_000, until * 1_000
        shown = _read(log, topics, start_ms, end_ms, champion.model)
        messages.put((message.time_ms, payload) for message, payload in shown)
        points, history = _walked(experiment, experiments, messages, until, rule, ledger)
    epochs = ledger.epochs(experiment.id)
    last = ledger.arms(experiment.id, max(epochs, default=experiment.epoch(until)))
    return _facts(experiment, champion.model) | {
        "outcome": rule.outcome,
        "started": _moment(experiment.started),
        "until": _moment(until),
        "decision": subject.why,
        "epochs": [
            {"since": _moment(since)} | {arm: asdict(view(tally, tally.sums())) for arm, tally in arms.items()}
            for since, arms in epochs.items()
        ],
        "arms": {arm: asdict(view(tally, tally.sums())) for arm, tally in last.items()},
        "points": points,
        "segments": _segments(last, known(experiment.control), rule, part=experiment.part()),
        "guardrails": history,
        "aside": dict(ledger.aside) | ({"unknown impression": ledger.waiting} if ledger.waiting else {}),
    }


def _selected(registry: Registry, model: str, name: str) -> tuple[PastExperiment, list[PastExperiment]]:
    """Returns the experiment with a name, and all experiments of a model. A running experiment ends at `_NEVER`.

    If a running and an ended experiment have the name, the running experiment is returned.
    """
    going = {each.name: PastExperiment(each, _NEVER, "running") for each in running(registry, model)}
    ended = {each.experiment.name: each for each in past(registry, model)}
    if name not in going and name not in ended:
        raise TesseraError(
            f"no rollout named {name!r}; running: {', '.join(going) or 'none'}; ended: {', '.join(ended) or 'none'}"
        )
    return going.get(name) or ended[name], [*ended.values(), *going.values()]


def _facts(experiment: Experiment, model: str) -> dict[str, Any]:
    """Returns the settings of an experiment for the report."""
    return {
        "experiment": experiment.name,
        "model": model,
        "challenger": experiment.challenger,
        "control": experiment.control,
        "layer": experiment.layer,
        "ramp": [[step.after_s, step.share] for step in experiment.ramp],
        "shadow": experiment.shadow,
    }


class TimeOrder:
    """Sorts messages by time in a temporary file, so that memory does not grow with their number."""

    def __init__(self) -> None:
        self._file = sqlite3.connect("")
        self._file.execute("CREATE TABLE message(time_ms INTEGER, payload BLOB)")

    def put(self, messages: Iterable[tuple[int, bytes]]) -> None:
        """Stores messages.

        Args:
            messages: Time in milliseconds and payload of each.
        """
        self._file.executemany("INSERT INTO message VALUES (?, ?)", messages)
        self._file.execute("CREATE INDEX IF NOT EXISTS by_time ON message(time_ms)")

    def __len__(self) -> int:
        return int(self._file.execute("SELECT COUNT(*) FROM message").fetchone()[0])

    def __iter__(self) -> Iterator[bytes]:
        """Yields the payloads by time. Payloads of one time come in the order in which they were stored."""
        for (payload,) in self._file.execute("SELECT payload FROM message ORDER BY time_ms, rowid"):
            yield payload

    def close(self) -> None:
        """Removes the file."""
        self._file.close()


def _read(
    log: EventLog, topics: Topics, start_ms: float, end_ms: float, model: str
) -> Iterator[tuple[Impression | Shadowed | Outcome, bytes]]:
    """Yields the messages of a model from `start_ms` to `end_ms`, each with its payload for `TimeOrder`."""
    log.create_topics(topics.partitions())
    names = (topics.impressions, topics.outcomes)
    ends = {(topic, number): end for topic in names for number, end in log.end_offsets(topic).items()}
    reader = log.reader(list(names), group=f"report-{time.time_ns()}", sole=True)
    with contextlib.closing(reader):
        while any(reader.position().get(partition, 0) < end for partition, end in ends.items()):
            for message in reader.poll(_BATCH, 0.2):
                payload = (_OUTCOME if message.topic == topics.outcomes else _SHOWN) + message.value
                with contextlib.suppress(EventError):
                    decoded = _decoded(payload)
                    of_model = not isinstance(decoded, Impression) or decoded.model == model
                    if of_model and start_ms <= decoded.time_ms <= end_ms:
                        yield decoded, payload


def _decoded(payload: bytes) -> Impression | Shadowed | Outcome:
    """Decodes a payload, whose first byte names its topic."""
    return decode_outcome(payload[1:]) if payload[:1] == _OUTCOME else decode_impression(payload[1:])


def _walked(
    experiment: Experiment,
    beside: Sequence[PastExperiment],
    messages: TimeOrder,
    until: float,
    rule: Guardrails,
    ledger: Ledger,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Folds the messages into the ledger. Returns the arms at up to 30 moments, and the breaches with their times.

    Args:
        experiment: Experiment of the report.
        beside: All experiments of the model, this experiment too. Experiments of a layer share its users.
        messages: Impressions and outcomes, by time.
        until: End of the report, Unix seconds.
        rule: Outcome to count, and the limits of the guardrails.
        ledger: Ledger to fill.
    """
    points: list[dict[str, Any]] = []
    history: list[dict[str, str]] = []
    cuts = np.linspace(experiment.started, until, min(_POINTS, max(2, len(messages))) + 1)[1:]
    following = map(_decoded, messages)
    message = next(following, None)
    for cut in cuts.tolist():
        while message is not None and message.time_ms <= 1_000 * cut:
            ledger.note(message) if isinstance(message, Outcome) else ledger.show(message)
            message = next(following, None)
        # The newest epoch with an impression is compared.
        ledger.close_slices(int(1_000 * cut))
        epoch = max(ledger.epochs(experiment.id), default=experiment.epoch(cut))
        arms, slower = ledger.arms(experiment.id, epoch), ledger.slower(experiment.id, epoch)
        control, challenger = arms[CONTROL].sums(), arms[CHALLENGER].sums()
        points.append({"at": _moment(cut)} | _compared(control.rate, challenger.rate, rule, part=experiment.part()))
        running_then = [other.experiment for other in beside if other.experiment.started <= cut <= other.ended]
        shares = expected_shares(experiment, running_then, cut)
        if not experiment.shadow and min(shares) > 0:
            look = rule.look(control, challenger, shares=shares, part=experiment.part(), slower=slower)
            # Each kind of breach is reported once, at the first moment.
            kinds = {line["breach"].partition(":")[0] for line in history}
            history += [
                {"at": _moment(cut), "breach": breach}
                for breach in look.breaches
                if breach.partition(":")[0] not in kinds
            ]
    return points, history


def _compared(control: Arm, challenger: Arm, rule: Guardrails, *, part: float = 1.0) -> dict[str, Any]:
    """Returns two rates, and their difference with its interval."""
    interval = difference(control, challenger, alpha=part * rule.alpha, planned=rule.planned)
    return {
        "users": control.users + challenger.users,
        "control": control.rate,
        "challenger": challenger.rate,
        "estimate": interval.estimate,
        "low": finite(interval.low),
        "high": finite(interval.high),
    }


def _segments(arms: Arms, known: Mapping[str, int], rule: Guardrails, *, part: float) -> list[dict[str, Any]]:
    """Compares the arms on segments: new users, known users, the heaviest tenth of users, and new items.

    A segment is chosen by data from before the experiment. Values that the experiment changes, such as the frequency of
    visits, would choose different users in each arm. The segments share the error probability.
    """
    visits = np.array(list(known.values()))
    heavy = float(np.quantile(visits, _HEAVY)) if len(visits) else math.inf
    tests: dict[str, Callable[[str], bool]] = {
        "new users": lambda user: user not in known,
        "known users": lambda user: user in known,
        "heavy users, by their visits before": lambda user: known.get(user, -1) >= heavy,
    }
    by_user = {arm: tally.by_user() for arm, tally in arms.items()}
    alpha = part / (len(tests) + 1)
    segments: list[dict[str, Any]] = []
    for name, test in tests.items():
        control, challenger = (_rate(*by_user[arm], test) for arm in (CONTROL, CHALLENGER))
        segments.append({"segment": name} | _compared(control, challenger, rule, part=alpha))
    new = _compared(arms[CONTROL].of_novel_items(), arms[CHALLENGER].of_novel_items(), rule, part=alpha)
    return [*segments, {"segment": "new items, outcomes for each that was shown"} | new]


def _rate(users: Sequence[str], sums: NDArray[np.float64], test: Callable[[str], bool]) -> Arm:
    """Returns outcomes by answers of the selected users with any answer."""
    chosen = sums[[test(user) for user in users]].reshape(-1, sums.shape[1]) if users else sums
    answered = chosen[chosen[:, ANSWERS] > 0]
    return Arm.of(answered[:, ANSWERS], answered[:, OUTCOMES])


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
