"""Output of `tessera table`: a bundle's table as rich tables and as one drawing."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.insight.reader import Angles
from models.insight.table_report import Insight, Norms

_NONE = "–"
_SURE = 3.0  # deviations within which a count is explained by chance
_INK, _ACCENT, _SOFT, _WARN = "#23211e", "#0b6b6b", "#b9c4c2", "#9a4b00"
_DRAWN = 20  # most rows of a panel


def render(insight: Insight, console: Console) -> None:
    """Prints all figures, the features first."""
    shape = f"{insight.rows:,} rows of {insight.dim} floats, {insight.hashed_rows:,} of them shared"
    console.print(Text(f"{insight.bundle}: {shape}", "bold"))
    for table in (_features(insight), _collisions(insight), _angles(insight), _norms(insight), _hot(insight)):
        console.print(table)
    console.print(_sizes(insight))
    console.print(_widening(insight))


def plot(insight: Insight, path: Path) -> None:
    """Draws a PNG: collisions compared with chance, readers' angles, row norms, and features to widen."""
    figure = Figure(figsize=(13, 10), layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_collisions(panels[0, 0], insight)
    _draw_angles(panels[0, 1], insight.mlp)
    _draw_norms(panels[1, 0], insight)
    _draw_widening(panels[1, 1], insight)
    figure.suptitle(
        f"The unified table of {insight.bundle}: {insight.rows:,} rows of {insight.dim} floats, "
        f"{insight.sizes.values:,} known values",
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _grid(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in words:
        table.add_column(column)
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _features(insight: Insight) -> Table:
    table = _grid("features", ("feature", "rows"), ("chunks", "lookups", "values", "reading", "mean ‖e‖", "‖reader‖"))
    for one in insight.features:
        kind = "its own" if one.exact else "shared"
        counts = (_count(one.chunks), _count(one.lookups), _count(one.values), _count(one.reading))
        table.add_row(Text(one.name), kind, *counts, _number(one.norm), _number(one.reader))
    if any(one.values is None for one in insight.features):
        table.caption = f"{_NONE}: a feature of the events, of which a bundle keeps no values"
    return table


def _collisions(insight: Insight) -> Table:
    table = _grid("collisions: pairs of values on one row", ("of", "pairs"), ("measured", "expected", "±σ", "z"))
    shown = [*insight.collisions, insight.total_within, insight.total_between]
    for one in sorted(shown, key=lambda one: ("within", "fully", "between").index(one.kind)):
        style = "" if abs(one.z) <= _SURE else "yellow"
        cells = (f"{one.pairs:,}", f"{one.expected:,.2f}", f"{one.deviation:,.2f}", f"{one.z:+.1f}")
        table.add_row(Text(one.of), {"fully": "merged in all chunks"}.get(one.kind, one.kind), *cells, style=style)
    return table


def _angles(insight: Insight) -> Table:
    table = _grid("angles between readers, degrees", ("readers", "closest pair"), ("at the start", "mean", "smallest"))
    for name, one in (("MLP, first layer", insight.mlp), ("head, first order", insight.head)):
        pair = " and ".join(one.pair) if one.pair else _NONE
        table.add_row(name, Text(pair), _number(one.start_mean, 1), _number(one.mean, 1), _number(one.smallest, 1))
    return table


def _norms(insight: Insight) -> Table:
    table = _grid("row norms ‖e‖", ("rows",), ("count", "never trained", "mean", "p50", "p90", "p99"))
    for name, one in (("shared", insight.hashed), ("exact features", insight.exact)):
        measured = (_number(value) for value in (one.mean, one.p50, one.p90, one.p99))
        table.add_row(name, _count(one.rows), _dead(one), *measured)
    return table


def _dead(norms: Norms) -> str:
    return f"{norms.dead:,} ({norms.dead / norms.rows:.1%})" if norms.rows else _NONE


def _hot(insight: Insight) -> Table:
    table = _grid("outlier rows", ("by", "row", "read, among others, by"), ("values", "accumulator", "‖e‖"))
    for one in insight.hot:
        samples = ", ".join(one.samples) or "no known value"
        numbers = (_count(one.values), f"{one.accumulator:.3g}", _number(one.norm))
        table.add_row(one.why, _count(one.row), Text(samples, overflow="ellipsis", no_wrap=True), *numbers)
    if insight.hot_share is not None:
        table.caption = f"the top 1 % of the rows take {insight.hot_share:.1%} of all values' reads"
    return table


def _sizes(insight: Insight) -> Table:
    sizes = insight.sizes
    table = _grid("bytes", ("what",), ("bytes",))
    for name in ("weights", "accumulators", "sketch", "network", "total"):
        table.add_row(name, _count(getattr(sizes, name)))
    table.add_row("weights per known value", _number(sizes.weights_per_value, 1))
    table.add_row("weights of one row per known value", _count(sizes.one_row_per_value))
    if sizes.one_row_per_value:
        table.caption = f"the weights are {sizes.weights / sizes.one_row_per_value:.2f} of one row per value"
    return table


def _widening(insight: Insight) -> Table:
    columns = ("chunks", "merged", "crowded", "resolved", "reliance", "gain")
    table = _grid("features to widen: another chunk, by estimated gain", ("feature",), columns)
    for one in insight.widening:
        shares = (one.merged, one.crowded, one.resolved, one.reliance, one.gain)
        table.add_row(Text(one.salt), _count(one.chunks), *(f"{share:.2%}" for share in shares))
    table.caption = (
        "merged: sightings whose value shares all rows with another; crowded: it shares each row with some value; "
        "reliance: share of the first layer's input; an estimate, not retrained"
    )
    return table


def _count(value: int | None) -> str:
    return _NONE if value is None else f"{value:,}"


def _number(value: float | None, digits: int = 3) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _plain(axes: Axes, title: str, names: Sequence[str], xlabel: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.tick_params(axis="y", length=0)


def _draw_collisions(axes: Axes, insight: Insight) -> None:
    """Draws z of each count; the band is the range of chance."""
    kinds = ("within", "fully", "between")
    drawn = sorted(insight.collisions, key=lambda one: (kinds.index(one.kind), -one.pairs))[:_DRAWN]
    # A count that is expected to be far below one pair is not normally distributed.
    drawn = [one for one in drawn if one.expected >= 1]
    names = [f"{one.of}, merged" if one.kind == "fully" else one.of for one in drawn]
    axes.axvspan(-_SURE, _SURE, color=_ACCENT, alpha=0.08)
    axes.axvline(0, color=_SOFT, linewidth=1)
    for place, one in enumerate(drawn):
        inside = abs(one.z) <= _SURE
        axes.plot(one.z, place, "o", color=_ACCENT if inside else _WARN, markersize=6)
        axes.text(1.01, place, f"{one.pairs:,}", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    _plain(axes, "Colliding pairs compared with chance", names, "(measured − expected) / σ; right: pairs measured")
    reach = max([_SURE + 1.0, *(abs(one.z) + 0.5 for one in drawn)])
    axes.set_xlim(-reach, reach)


def _draw_angles(axes: Axes, angles: Angles) -> None:
    count = len(angles.readers)
    degrees = np.array(angles.degrees).reshape(count, count)
    axes.imshow(np.ma.masked_array(degrees, np.eye(count, dtype=bool)), cmap="YlGnBu", vmin=0, vmax=90)
    if count <= _DRAWN:
        for row, column in np.argwhere(~np.eye(count, dtype=bool)):
            value = degrees[row, column]
            colour = "white" if value > 50 else _INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(count), angles.readers, rotation=90)
    axes.set_yticks(range(count), angles.readers)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    title = "Angles between readers"
    if angles.mean is not None and angles.start_mean is not None:
        title += f"\nmean {angles.mean:.0f}°, at the start {angles.start_mean:.0f}°"
    axes.set_title(title, loc="left", fontweight="bold")


def _draw_norms(axes: Axes, insight: Insight) -> None:
    drawn = [one for one in insight.features if one.norm is not None][:_DRAWN]
    colours = [_SOFT if one.exact else _ACCENT for one in drawn]
    axes.barh(range(len(drawn)), [one.norm or 0.0 for one in drawn], color=colours, height=0.6)
    axes.set_xlim(right=1.1 * max([one.norm or 0.0 for one in drawn], default=1.0) or 1.0)
    if insight.hashed.mean is not None:
        axes.axvline(insight.hashed.mean, color=_INK, linewidth=1, linestyle=":")
    _plain(
        axes,
        "Mean norm of the rows that a feature reads",
        [one.name for one in drawn],
        "‖e‖; grey: exact features, dotted: mean of all shared rows",
    )


def _draw_widening(axes: Axes, insight: Insight) -> None:
    drawn = insight.widening[:_DRAWN]
    places = np.arange(len(drawn))
    crowded, reliance = [one.crowded * 100 for one in drawn], [one.reliance * 100 for one in drawn]
    axes.barh(places - 0.19, crowded, color=_WARN, height=0.34, label="sightings of values without a row of their own")
    axes.barh(places + 0.19, reliance, color=_SOFT, height=0.34, label="share of the first layer's input")
    names = [f"{one.salt} ({one.chunks})" for one in drawn]
    _plain(axes, "Features to widen first, from the top", names, "per cent; in brackets the chunks it has")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.02, -0.12))
