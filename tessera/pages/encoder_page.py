"""Sections of the encoder report, for the page that the command writes and for the console's."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tessera.pages import markup, svg

_NOTES = {
    "spaces": (
        "Spaces",
        "recall new: co-liked items among the 50 nearest of items without a like in training. recall later: by likes "
        "after training. concepts: pairs of a carried and a missing value of a column that a probe of other items puts "
        "in the right order. Higher is better for these. Lower uniformity and alignment are better.",
    ),
    "aspects": ("Aspects", "Share of the 10 nearest items that share a value of the column."),
    "conditional": (
        "An item and a value",
        "Asks for items like an item that have a value which the item lacks: share of the 10 nearest that have the "
        "value and one of the item's own. The item alone and the value alone are the controls.",
    ),
    "search": ("Text search", "Phrases of a text, without the words of its title: the item is among the first 10."),
    "passages": ("Passages", "Words beyond the first 40 of a long text: mean reciprocal rank of its item."),
    "encoders": ("Encoders", "Items a second on one core, tokenising counted."),
}
_EMPTY = {
    "search": "Too few texts have a title and a body.",
    "passages": "No text is long enough.",
    "aspects": "No column has values that items share.",
    "conditional": "No column has values that items share.",
}
_DRAWN = ("recall_new", "recall_later", "concepts")


class Section(NamedTuple):
    """Part of the report.

    Attributes:
        title: Heading.
        note: Meaning of the columns.
        columns: Names of the columns; the name of a column of numbers begins with >.
        rows: Cells as text, row by row; empty if nothing was measured.
        drawing: Plot as SVG, or "".
        empty: Reason for no rows.
    """

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    drawing: str
    empty: str


def sections(document: Mapping[str, Any]) -> list[Section]:
    """Returns the sections of a report.

    Args:
        document: Report, as `tessera encoder report --json` prints it. A section that an earlier release did not
            measure is left out.
    """
    several = len({row["run"] for row in document["encoders"]}) > 1
    return [
        Section(
            title,
            note,
            *_cells(document[name], several),
            spaces_drawn(document[name], several) if name == "spaces" else "",
            _EMPTY.get(name, "Nothing was measured."),
        )
        for name, (title, note) in _NOTES.items()
        if name in document
    ]


def report_page(document: Mapping[str, Any]) -> str:
    """Returns a report as the body of a page."""
    parts = ["<h1>Encoder report</h1>"]
    for one in sections(document):
        shown_table = markup.table(one.columns, one.rows) if one.rows else markup.none(one.empty)
        drawing = f'<div class="plot">{one.drawing}</div>' if one.drawing else ""
        parts.append(markup.section(one.title, drawing, shown_table, markup.caption(one.note)))
    return "\n".join(parts)


def spaces_drawn(rows: Sequence[Mapping[str, Any]], several: bool = False) -> str:
    """Draws the measures of each space as bars in [0, 1], the control weak."""
    groups = [
        (
            measure.replace("_", " "),
            [
                svg.Row(_label(row, several), row[measure], shown(row[measure]), strong=row is not rows[-1])
                for row in rows
            ],
        )
        for measure in _DRAWN
        if any(row.get(measure) is not None for row in rows) and all(measure in row for row in rows)
    ]
    if not groups:
        return ""
    ticks = [(at, f"{at:g}") for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return svg.rows(groups, describe="Measures of each space beside random vectors", low=0, high=1, ticks=ticks)


def _label(row: Mapping[str, Any], several: bool) -> str:
    return f"{row['space']} ({str(row['run']).rpartition('/')[2]})" if several else str(row["space"])


def _cells(rows: Sequence[Mapping[str, Any]], several: bool) -> tuple[list[str], list[list[str]]]:
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if several or name != "run"]
    numbers = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    columns = [f"{'>' * number}{name.replace('_', ' ')}" for name, number in zip(names, numbers, strict=True)]
    return columns, [[shown(row.get(name)) for name in names] for row in rows]


def shown(value: Any) -> str:
    """Returns a cell's text; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if isinstance(value, float) else str(value)
