"""The report of one experiment: arms over time with intervals, segments of users, guardrails, decision and reason.

It is made from the log alone, from the impressions and outcomes in the order of their time, so every run of it gives
the same figures.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.errors import EventError, TesseraError
from models.registry.registry import CHAMPION, Registry
from serving.rollout.experiment import CHALLENGER, CONTROL, Experiment, expected_shares
from serving.rollout.guardrails import Guardrails
from serving.rollout.impression import Impression, Outcome, Shadowed, decode_impression, decode_outcome
from serving.rollout.judge import finite, interval_text, view
from serving.rollout.ledger import Arms, Ledger
from serving.rollout.lifecycle import PastExperiment, past, running
from serving.rollout.sequential import Arm, difference
from serving.rollout.tally import ANSWERS, OUTCOMES
from serving.rollout.time_slices import SlownessAllowance
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from tessera.pages import markup
from tessera.pages import svg as plot

_POINTS, _BATCH, _HEAVY = 30, 2_000, 0.9
_NEVER = 1 << 62
_ABOUT_EPOCHS = (
    "A step of the ramp, or another experiment that starts or ends on the layer, begins an epoch: within each the arms "
    "are the same ones, and only within it are they compared."
)
Message = Impression | Shadowed | Outcome


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
    """Returns a report of an experiment, as plain dicts, numbers and strings.

    Args:
        name: Name of a running or ended experiment.
        known: Users in a bundle's training with the number of their visits, by the bundle's id; all others are new.
        familiar: Items that its training knew well; all others are new.

    Raises:
        TesseraError: There is no such experiment.
    """
    champion = registry.resolve(model, CHAMPION)
    going = running(registry, champion.model)
    ended = {one.experiment.name: one for one in past(registry, champion.model)}
    found = next((one for one in going if one.name == name), None)
    if found is None and name not in ended:
        names = ", ".join(one.name for one in going) or "none"
        raise TesseraError(f"no rollout named {name!r}; running: {names}; ended: {', '.join(ended) or 'none'}")
    experiment = found or ended[name].experiment
    until = time.time() if found else float(ended[name].ended)
    messages = _ordered(log, topics, experiment.started * 1_000, until * 1_000, champion.model)
    allowed = SlownessAllowance(rule.slower, rule.least_ms)
    ledger = Ledger(outcome=rule.outcome, familiar=familiar(experiment.control), allowed=allowed)
    points, history = _walked(
        experiment,
        [*ended.values(), *(PastExperiment(one, _NEVER, "") for one in going)],
        messages,
        until,
        rule,
        ledger,
    )
    epochs = ledger.epochs(experiment.id)
    last = ledger.arms(experiment.id, max(epochs, default=experiment.epoch(until)))
    return {
        "experiment": name,
        "model": champion.model,
        "challenger": experiment.challenger,
        "control": experiment.control,
        "layer": experiment.layer,
        "ramp": [[step.after_s, step.share] for step in experiment.ramp],
        "shadow": experiment.shadow,
        "outcome": rule.outcome,
        "started": _moment(experiment.started),
        "until": _moment(until),
        "decision": "running" if found else ended[name].why,
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


def write_page(document: dict[str, Any], path: Path) -> None:
    """Writes a report as a page."""
    points, arms = document["points"], document["arms"]
    about = (
        f"{document['challenger']} against {document['control']}, from {document['started']} to {document['until']}; "
        f"layer {document['layer']}, shares {', '.join(f'{share:.1%}' for _, share in document['ramp'])}."
    )
    measures: tuple[tuple[str, str, str], ...] = (
        ("requests", "requests", ","),
        ("users", "users", ","),
        ("outcomes", "outcomes", ","),
        ("outcomes an answer", "rate", ".4f"),
        ("failed", "failed", ".2%"),
        ("empty", "empty", ".2%"),
        ("p99 ms", "p99_ms", ".1f"),
        ("outcomes by prediction", "calibration", ".3f"),
        ("items hardly known", "novelty", ".1%"),
    )
    rows = [
        (label, *("–" if arms[arm][key] is None else format(arms[arm][key], form) for arm in (CONTROL, CHALLENGER)))
        for label, key, form in measures
    ]
    kinds = sorted({kind for arm in arms.values() for kind in arm["kinds"]})
    rows += [
        (f"“{kind}”", *(f"{arms[arm]['kinds'].get(kind, 0):,}" for arm in (CONTROL, CHALLENGER))) for kind in kinds
    ]
    drawn = [
        (point["at"], point["estimate"], point["low"], point["high"]) for point in points if point["low"] is not None
    ]
    body = [
        f"<h1>Rollout {escape(document['experiment'])}</h1>\n{markup.caption(about)}",
        markup.section("Decision", f"<p>{escape(document['decision'])}</p>"),
        markup.section(
            "Arms",
            markup.cards(
                markup.figure(
                    "The challenger's rate less the control's",
                    plot.band(drawn, describe="difference of the arms' rates over time, with its interval"),
                    "The band holds the truth at every moment at once; below zero as a whole, it ends the experiment.",
                )
                if drawn
                else markup.card("The challenger's rate less the control's", markup.none("Nothing was shown yet.")),
                markup.card(
                    "Since the last change of the arms", markup.table(("", f">{CONTROL}", f">{CHALLENGER}"), rows)
                ),
            ),
        ),
        markup.section("Epochs", markup.caption(_ABOUT_EPOCHS), _epoch_table(document["epochs"])),
        markup.section("Segments", _segment_table(document["segments"])),
        markup.section("Guardrails", _history(document["guardrails"])),
        markup.section("Set aside", _aside(document["aside"])),
    ]
    markup.write_page(path, f"Rollout {document['experiment']}", "\n".join(body))


def _ordered(log: EventLog, topics: Topics, start_ms: float, end_ms: float, model: str) -> list[Message]:
    """Returns the experiment's messages in the order of their time."""
    log.create_topics(topics.partitions())
    names = (topics.impressions, topics.outcomes)
    ends = {(topic, part): end for topic in names for part, end in log.end_offsets(topic).items()}
    found: list[Message] = []
    reader = log.reader(list(names), group=f"report-{time.time_ns()}", sole=True)
    with contextlib.closing(reader):
        while any(reader.position().get(place, 0) < end for place, end in ends.items()):
            for message in reader.poll(_BATCH, 0.2):
                with contextlib.suppress(EventError):
                    one: Message = (
                        decode_outcome(message.value)
                        if message.topic == topics.outcomes
                        else decode_impression(message.value)
                    )
                    if not isinstance(one, Impression) or one.model == model:
                        found.append(one)
    return sorted((one for one in found if start_ms <= one.time_ms <= end_ms), key=lambda one: one.time_ms)


def _walked(
    experiment: Experiment,
    beside: Sequence[PastExperiment],
    messages: Sequence[Message],
    until: float,
    rule: Guardrails,
    ledger: Ledger,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Returns the arms at up to 30 moments, and the breaches with their times; it fills the ledger on the way.

    Args:
        beside: All experiments with their ends, this one included: they share the layer with it at a moment.
    """
    points: list[dict[str, Any]] = []
    history: list[dict[str, str]] = []
    cuts = np.linspace(experiment.started, until, min(_POINTS, max(2, len(messages))) + 1)[1:]
    at = 0
    for cut in cuts.tolist():
        while at < len(messages) and messages[at].time_ms <= 1_000 * cut:
            one = messages[at]
            ledger.note(one) if isinstance(one, Outcome) else ledger.show(one)
            at += 1
        # The last message decides the epoch.
        ledger.close_slices(int(1_000 * cut))
        epoch = max(ledger.epochs(experiment.id), default=experiment.epoch(cut))
        arms, slower = ledger.arms(experiment.id, epoch), ledger.slower(experiment.id, epoch)
        control, challenger = arms[CONTROL].sums(), arms[CHALLENGER].sums()
        points.append({"at": _moment(cut)} | _compared(control.rate, challenger.rate, rule, part=experiment.part()))
        there = [one.experiment for one in beside if one.experiment.started <= cut <= one.ended]
        shares = expected_shares(experiment, there, cut)
        if not experiment.shadow and min(shares) > 0:
            look = rule.look(control, challenger, shares=shares, part=experiment.part(), slower=slower)
            # The first breach of each kind is kept.
            kinds = {line["breach"].partition(":")[0] for line in history}
            history += [
                {"at": _moment(cut), "breach": one} for one in look.breaches if one.partition(":")[0] not in kinds
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
    """Compares segments as the whole: new and known users, the heaviest tenth, and new items by their impressions.

    A segment is chosen by data from before the experiment: values that the experiment changes, such as how often users
    come, would choose different users in each arm. The segments share the chance of a miss.
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
    found: list[dict[str, Any]] = []
    for name, test in tests.items():
        control, challenger = (_rate(*by_user[arm], test) for arm in (CONTROL, CHALLENGER))
        found.append({"segment": name} | _compared(control, challenger, rule, part=alpha))
    new = _compared(arms[CONTROL].of_novel_items(), arms[CHALLENGER].of_novel_items(), rule, part=alpha)
    return [*found, {"segment": "new items, outcomes for each that was shown"} | new]


def _rate(users: Sequence[str], sums: NDArray[np.float64], test: Callable[[str], bool]) -> Arm:
    """Returns outcomes by answers of the selected users with any answer."""
    chosen = sums[[test(user) for user in users]].reshape(-1, sums.shape[1]) if users else sums
    answered = chosen[chosen[:, ANSWERS] > 0]
    return Arm.of(answered[:, ANSWERS], answered[:, OUTCOMES])


def _segment_table(segments: Sequence[dict[str, Any]]) -> str:
    rows: list[Sequence[str]] = []
    for one in segments:
        rows += [
            (f"{one['segment']}, {one['users']:,}",),
            (CONTROL, f"{one['control']:.4f}"),
            (CHALLENGER, f"{one['challenger']:.4f}"),
            ("difference", f"{one['estimate']:+.4f}, {interval_text(one['low'], one['high'])}"),
        ]
    return markup.table(("", ">outcomes an answer"), rows)


def _epoch_table(epochs: Sequence[dict[str, Any]]) -> str:
    if not epochs:
        return markup.none("Nothing was shown yet.")
    rows = [
        (one["since"], *(f"{one[arm]['requests']:,} · {one[arm]['rate']:.4f}" for arm in (CONTROL, CHALLENGER)))
        for one in epochs
    ]
    return markup.table(("since", f">{CONTROL}: requests · rate", f">{CHALLENGER}: requests · rate"), rows)


def _history(history: Sequence[dict[str, str]]) -> str:
    if not history:
        return markup.none("No guardrail was breached.")
    return markup.table(("when", "what"), [(one["at"], one["breach"]) for one in history])


def _aside(aside: dict[str, int]) -> str:
    if not aside:
        return markup.none("Every outcome was joined with its impression.")
    return markup.table(("why", ">messages"), [(why, f"{count:,}") for why, count in aside.items()])


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
