"""Plots of the reports as inline SVG: no script, no image file; colours come from the page's style, light or dark.

Drawings are at most 400 units wide, so that their lettering is still legible at the width of a phone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

_WIDTH = 400
_NARROW = 320  # width of plots without row labels, which may be three in a row
_LEFT, _RIGHT = 118, 62  # room for row labels, room for values
_ROW, _HEAD, _AXIS = 20, 24, 26
_BINS = 32
_TAIL = 1.15  # a histogram ends at this multiple of its last mark


@dataclass(frozen=True)
class Row:
    """Mark of a row plot; `strong` highlights it, `shown` is the value as text, `between` its interval, for dots."""

    label: str
    value: float | None
    shown: str
    strong: bool = False
    between: tuple[float, float] | None = None


Group = tuple[str, Sequence[Row]]


def rows(
    groups: Sequence[Group],
    *,
    describe: str,
    low: float,
    high: float,
    form: Literal["dot", "bar"] = "bar",
    ticks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draws horizontal dots or bars in groups; a value of None leaves its row empty.

    Args:
        groups: Heading ("" for none) and rows.
        describe: Text for screen readers.
        low, high: Ends of the axis; values beyond are drawn at the end.
        ticks: Places of grid lines, and their labels under the plot.
    """
    span = max(high - low, 1e-12)

    def x(value: float) -> float:
        return _LEFT + (min(max(value, low), high) - low) / span * (_WIDTH - _LEFT - _RIGHT)

    parts: list[str] = []
    y = 4.0
    for heading, members in groups:
        if heading:
            parts.append(_text(0, y + 13, heading, "head"))
            y += _HEAD
        for row in members:
            between = None if row.between is None else (x(row.between[0]), x(row.between[1]))
            parts += _row(row, y + _ROW / 2, x(low), None if row.value is None else x(row.value), form, between)
            y += _ROW
        y += 6
    grid = [_line(x(at), 4, x(at), y, "grid") + _text(x(at), y + 14, label, "tick mid") for at, label in ticks]
    return _svg(y + (_AXIS if ticks else 0), describe, [*grid, *parts])


def _row(
    row: Row, y: float, start: float, end: float | None, form: str, between: tuple[float, float] | None
) -> list[str]:
    kind = "strong" if row.strong else "weak"
    parts = [_text(_LEFT - 12, y + 4, row.label, f"label end {kind}")]
    if end is not None and form == "dot":
        stem = (start, end) if between is None else between
        parts += [
            _line(stem[0], y, stem[1], y, f"stem {kind}"),
            f'<circle class="{kind}" cx="{end:.1f}" cy="{y:.1f}" r="5"/>',
        ]
        end = max(end, stem[1])
    elif end is not None:
        parts.append(_rect(start, y - 6, max(end - start, 1), 12, kind))
    parts.append(_text((start if end is None else end) + 9, y + 4, row.shown, f"value {kind}"))
    return parts


def histogram(values: Sequence[float], *, describe: str, marks: Sequence[tuple[str, float]], unit: str) -> str:
    """Draws how often each size of value occurs, from 0; values beyond the marks are counted in the last bin.

    Args:
        values: At least one, none negative.
        marks: Labelled vertical lines, ascending, such as percentiles.
        unit: Unit of the values, beside the last tick.
    """
    top, base = 40.0, 150.0
    end = max(min(max(values), marks[-1][1] * _TAIL), 1e-9)
    counts, edges = np.histogram(np.minimum(values, end), bins=_BINS, range=(0, end))
    step = _NARROW / _BINS
    scale = (base - top) / max(int(counts.max()), 1)
    # A bin with any value is visible, however tall the others are.
    tall = [max(float(count) * scale, 1.5) if count else 0.0 for count in counts]
    parts = [_rect(i * step + 0.5, base - height, step - 1, height, "weak") for i, height in enumerate(tall) if height]
    parts.append(_line(0, base, _NARROW, base, "axis"))
    for at in nice_ticks(float(edges[-1])):
        where = at / end * _NARROW
        side = "start" if where < 12 else "end" if where > _NARROW - 24 else "mid"
        parts.append(_text(where, base + 15, f"{at:g} {unit}" if at else "0", f"tick {side}"))
    for number, (label, value) in enumerate(marks):
        where = min(value / end, 1) * _NARROW
        # Each label has a line of its own, so that close percentiles do not overlap.
        height = 12 + 15 * (number % 2)
        parts.append(_line(where, height + 4, where, base, "mark"))
        parts.append(_text(where + (-5 if where > _NARROW / 2 else 5), height + 5, label, _side(where)))
    return _svg(base + _AXIS, describe, parts, width=_NARROW)


def curve(values: Sequence[float], *, describe: str, shown: Sequence[str]) -> str:
    """Draws a value per epoch, numbered from 1; the lowest is marked, and it, the first and the last are labelled."""
    top, base, left, right = 30.0, 130.0, 30.0, _NARROW - 30.0
    low, high = min(values), max(values)
    best = list(values).index(low)
    step = (right - left) / max(len(values) - 1, 1)
    points = [
        (left + step * number, base - 12 - (value - low) / max(high - low, 1e-12) * (base - 12 - top))
        for number, value in enumerate(values)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [_line(0, base, _NARROW, base, "axis"), f'<polyline class="path" points="{path}"/>']
    for number, (x, y) in enumerate(points):
        kind = "strong" if number == best else "weak"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if number == best else 3.5}"/>')
        if number in (0, best, len(points) - 1):
            side = "start" if number == 0 < len(points) - 1 else "end" if number == len(points) - 1 > 0 else "mid"
            parts.append(_text(x, y - 10, shown[number], f"value {side} {kind}"))
        parts.append(_text(x, base + 15, str(number + 1), "tick mid"))
    return _svg(base + _AXIS, describe, parts, width=_NARROW)


def band(points: Sequence[tuple[str, float, float, float]], *, describe: str) -> str:
    """Draws an estimate and its interval over time, with the line of zero.

    Args:
        points: Label, estimate, lower and upper bound, in the order of time; at least one.
    """
    top, base, left, right = 14.0, 150.0, 52.0, _WIDTH - 12.0
    low = min(0.0, *(point[2] for point in points))
    high = max(0.0, *(point[3] for point in points))
    span = max(high - low, 1e-12)

    def at(number: int, value: float) -> str:
        x = left + (right - left) * (number / max(len(points) - 1, 1))
        return f"{x:.1f},{base - (value - low) / span * (base - top):.1f}"

    upper = [at(number, point[3]) for number, point in enumerate(points)]
    lower = [at(number, point[2]) for number, point in enumerate(points)]
    middle = [at(number, point[1]) for number, point in enumerate(points)]
    zero = base - (0.0 - low) / span * (base - top)
    parts = [
        f'<polygon class="band" points="{" ".join([*upper, *reversed(lower)])}"/>',
        _line(left, zero, right, zero, "axis"),
        f'<polyline class="path" points="{" ".join(middle)}"/>',
        _text(left - 6, zero + 4, "0", "tick end"),
    ]
    for value in (low, high):
        y = base - (value - low) / span * (base - top)
        if abs(y - zero) > 12:
            parts.append(_text(left - 6, y + 4, f"{value:+.3f}", "tick end"))
    parts.append(_text(left, base + 16, points[0][0], "tick start"))
    if len(points) > 1:
        parts.append(_text(right, base + 16, points[-1][0], "tick end"))
    return _svg(base + _AXIS, describe, parts)


def spark(values: Sequence[float], *, describe: str) -> str:
    """Draws a count over time without axes, from 0; the last value has a mark."""
    top, base, right = 4.0, 44.0, _NARROW - 6.0
    high = max(max(values, default=0.0), 1e-9)
    step = right / max(len(values) - 1, 1)
    points = [(step * number, base - value / high * (base - top)) for number, value in enumerate(values)]
    parts = [_line(0, base, _NARROW, base, "axis")]
    if points:
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polygon class="band" points="0,{base} {line} {points[-1][0]:.1f},{base}"/>')
        parts.append(f'<polyline class="path strong" points="{line}"/>')
        parts.append(f'<circle class="strong" cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="3"/>')
    return _svg(base + 4, describe, parts, width=_NARROW)


def interval(estimate: float, low: float, high: float, *, reach: float, describe: str) -> str:
    """Draws one estimate and its interval on a line around zero; bounds beyond `reach` end at the edge."""
    middle, half, y = _NARROW / 2, _NARROW / 2 - 8.0, 14.0

    def x(value: float) -> float:
        return middle + min(max(value / max(reach, 1e-12), -1.0), 1.0) * half

    parts = [
        _line(8, y, _NARROW - 8, y, "grid"),
        _line(middle, 4, middle, y + 10, "axis"),
        _rect(x(low), y - 4, max(x(high) - x(low), 2), 8, "strong" if low > 0 or high < 0 else "weak"),
        f'<circle class="strong" cx="{x(estimate):.1f}" cy="{y:.1f}" r="5"/>',
        _text(8, y + 24, f"{-reach:+.3g}", "tick start"),
        _text(middle, y + 24, "0", "tick mid"),
        _text(_NARROW - 8, y + 24, f"{reach:+.3g}", "tick end"),
    ]
    return _svg(y + 30, describe, parts, width=_NARROW)


def nice_ticks(end: float, about: int = 4) -> list[float]:
    """Returns round numbers from 0 up to `end`, about `about` of them."""
    rough = end / about
    power = 10.0 ** np.floor(np.log10(rough))
    step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda size: abs(size - rough))
    return [float(round(number * step, 12)) for number in range(int(end / step + 1e-9) + 1)]


def _side(x: float) -> str:
    return "value end" if x > _NARROW / 2 else "value start"


def _svg(height: float, describe: str, parts: Sequence[str], *, width: int = _WIDTH) -> str:
    label = escape(describe)
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _rect(x: float, y: float, width: float, height: float, classes: str) -> str:
    return f'<rect class="{classes}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'
