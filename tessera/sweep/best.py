"""The best trial as a `[run]` table to paste into a descriptor."""

import re
from collections.abc import Mapping
from typing import Any

from tessera.pipeline.options import known_choices
from tessera.sweep.space import Base, text_of
from tessera.sweep.study import TrialReport

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_PER_KIND = "encoder_options"


def best_of(reports: list[TrialReport]) -> TrialReport | None:
    """Returns the finished trial with the lowest validation log loss, the first of equals; None without any."""
    finished = [one for one in reports if one.state == "finished" and one.log_loss is not None]
    return min(finished, key=lambda one: (one.log_loss, one.number), default=None)


def run_table(base: Base, best: TrialReport, parts: tuple[str, ...] | None) -> str:
    """Returns the `[run]` table of a trial, which replaces that of the descriptor.

    Args:
        base: Starting point of the sweep.
        best: Trial.
        parts: Parts of an item that the trials read, if the sweep chose them.
    """
    written = base.written(best.choices)
    if parts is not None:
        written = {"reads": list(parts)} | written
    return as_toml("run", written)


def as_toml(table: str, values: Mapping[str, Any]) -> str:
    """Returns a TOML table of values by dotted name of a choice of `[run]`."""
    lines = [f"{_key(name)} = {_value(value)}" for name, value in sorted(values.items())]
    return "\n".join([f"[{table}]", *lines]) + "\n"


def _key(name: str) -> str:
    """Returns a dotted key; a key of a choice that is a table is one part, since names of features have dots."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        above = ".".join(parts[:count])
        if above in known_choices():
            below = parts[count:]
            own = [below[0], ".".join(below[1:])] if above == _PER_KIND and len(below) > 1 else [".".join(below)]
            parts = [*parts[:count], *own]
            break
    return ".".join(part if _BARE.fullmatch(part) else text_of([part])[1:-1] for part in parts)


def _value(value: Any) -> str:
    """Returns a value in TOML, whose numbers, strings and lists are written as in JSON."""
    return text_of(["auto" if value is None else value])[1:-1]
