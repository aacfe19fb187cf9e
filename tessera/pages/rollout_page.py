"""Draws the report of one experiment: arms over time with intervals, segments, guardrails and decision."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from serving.rollout.experiment import CHALLENGER, CONTROL
from serving.rollout.judge import interval_text
from tessera.pages import markup
from tessera.pages import svg as plot

_ABOUT_EPOCHS = (
    "A step of the ramp, or another experiment that starts or ends on the layer, begins an epoch: within each the arms "
    "are the same ones, and only within it are they compared."
)


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
        markup.section("Quarantined", _aside(document["aside"])),
    ]
    markup.write_page(path, f"Rollout {document['experiment']}", "\n".join(body))


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
