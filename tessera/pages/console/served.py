"""Content of the console's page of skew and drift: the newest report that `tessera skew --keep` kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from tessera.pages import svg

_DRAWN = 12
_LABEL = 15


def report(document: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the counts, differences and distributions of a report; none without a report."""
    if document is None:
        return {"found": None}
    drift = document["drift"] or {}
    measures = drift.get("measures", [])
    return {
        "found": document,
        "differences": [_difference(one) for one in document["differences"]],
        "drift": drift,
        "measures": [_measure(one) for one in measures],
        "drawn": Markup(_drawn(measures)),
        "shown": min(len(measures), _DRAWN),
    }


def _difference(one: Mapping[str, Any]) -> dict[str, Any]:
    examples = [
        f"request {found['request']}{' item ' + str(found['item']) if found['item'] else ''}: "
        f"served {found['served']}, expected {found['expected']}"
        for found in one["examples"]
    ]
    return {"feature": one["feature"], "kind": one["kind"], "count": one["count"], "examples": examples}


def _measure(one: Mapping[str, Any]) -> dict[str, Any]:
    interval = "–" if one["psi_low"] is None else f"{one['psi_low']:.3f} to {one['psi_high']:.3f}"
    change = f"{one['cell']}: {one['trained']:.1%} to {one['served']:.1%}"
    return dict(one) | {"name": _name(one), "interval": interval, "change": change}


def _name(one: Mapping[str, Any]) -> str:
    return str(one["feature"]) if one["measure"] == "values" else f"{one['feature']} {one['measure']}"


def _drawn(measures: Sequence[Mapping[str, Any]]) -> str:
    """Draws the measures with the largest indices, alarms first, each with its interval."""
    chosen = measures[:_DRAWN]
    if not chosen:
        return ""
    rows = [
        svg.Row(
            _short(_name(one)),
            one["psi"],
            f"{one['psi']:.3f}",
            strong=one["alarm"],
            between=None if one["psi_low"] is None else (one["psi_low"], one["psi_high"]),
        )
        for one in chosen
    ]
    end = max(0.25, *(max(one["psi"], one["psi_high"] or 0.0) for one in chosen))
    ticks = [(at, f"{at:g}") for at in svg.nice_ticks(end)]
    described = "Population stability index of each measure with its interval; alarms are strong"
    return svg.rows([("", rows)], describe=described, low=0.0, high=end, form="dot", ticks=ticks)


def _short(name: str) -> str:
    # Long names differ at their end.
    return name if len(name) <= _LABEL else "…" + name[1 - _LABEL :]
