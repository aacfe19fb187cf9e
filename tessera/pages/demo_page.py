"""The demo's report: one self-contained page, and the same key figures for the terminal.

The page has no script and refers to nothing outside itself, so it can be mailed, archived and printed. Whatever was not
measured is said to be missing, so that no empty plot can be taken for a result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.ranker.evaluate import PARTS
from tessera.pages import markup
from tessera.pages import svg as plot
from tessera.pages.new_items import NewItem, NewItemRanks, Ranked, item_section, rank_figures, ranks_section

Quality = Mapping[str, Mapping[str, Mapping[str, float | None]]]
_RANKER = "ranker"
_PARTS = {**PARTS, "all": "all items"}
_CHANCE = 0.5


@dataclass(frozen=True)
class StreamFigures:
    """Work of the stream: messages by kind, with `bad` ones quarantined, and their rate."""

    events: int
    items: int
    bad: int
    seconds: float
    rate_per_s: float
    batches: int


@dataclass(frozen=True)
class CountedRates:
    """Rates of one user and one item before and after the stream, as a ranking of the item for the user reads them.

    Attributes:
        user: Id of the user.
        item: Title of the item.
        before, after: (rate, events behind the rate) by name, in the same order.
    """

    user: str
    item: str
    before: Mapping[str, tuple[float, float]]
    after: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class DemoSummary:
    """Content of the report.

    Attributes:
        created: when, as text.
        profile: (label, value) of the dataset.
        quality: model → part of `models.ranker.evaluate.PARTS` → rows, auc, log_loss, normalized_entropy, as in
            metrics.json.
        semantic_ids: report.json of the assign stage, None for a dataset without content.
        validation_log_loss: of the ranker, one an epoch.
        freshness_ms: from an event's arrival to where a ranker can read what it changed.
        serving_ms: latency of each request to rank.
        new_items: ranks of many new items, None where they were not measured.
        top_before, top_after: (item id, title, score) for the new item's user, best first.
        counted: rates that the stream counted, None for a dataset without aggregates.
    """

    title: str
    dataset: str
    synthetic: bool
    bundle: str
    created: str
    profile: Sequence[tuple[str, str]] = ()
    quality: Quality | None = None
    semantic_ids: Mapping[str, Any] | None = None
    stage_seconds: Mapping[str, float] | None = None
    validation_log_loss: Sequence[float] = ()
    stream: StreamFigures | None = None
    freshness_ms: Sequence[float] = ()
    serving_ms: Sequence[float] = ()
    new_items: NewItemRanks | None = None
    new_item: NewItem | None = None
    top_before: Sequence[Ranked] = ()
    top_after: Sequence[Ranked] = ()
    counted: CountedRates | None = None


def write_report(path: Path, summary: DemoSummary) -> None:
    """Writes the page, UTF-8, and the directories above it where they are missing."""
    sections = [_header, _tiles, _new_items, _ranking, _new_item, _online, _semantic_ids, _background]
    body = "\n".join(section(summary) for section in sections)
    markup.write_page(path, summary.title, body)


def render_summary(console: Console, summary: DemoSummary) -> None:
    """Prints the key figures: the tiles of the page, one a line."""
    kind = "synthetic data" if summary.synthetic else "data"
    console.print(Text(summary.title, style="bold"))
    console.print(Text(f"{kind}: {summary.dataset}, bundle {summary.bundle}, {summary.created}", style="dim"))
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column(justify="right", style="bold cyan", no_wrap=True)
    for label, value, note in key_figures(summary):
        grid.add_row(Text(value), Text(label), Text(note, style="dim"))
    console.print(grid)


def key_figures(summary: DemoSummary) -> list[tuple[str, str, str]]:
    """(label, value, note) of what was measured, the most telling first."""
    found = rank_figures(summary.new_items) if summary.new_items is not None else []
    for part in ("all", "unseen", "unseen_users"):
        aucs = {model: parts[part]["auc"] for model, parts in (summary.quality or {}).items() if part in parts}
        ranker = aucs.pop(_RANKER, None)
        if ranker is not None:
            note = ", ".join(f"{model} {_ratio(value)}" for model, value in aucs.items())
            found.append((f"AUC of the ranker, {_PARTS[part]}", _ratio(ranker), note))
    if (item := summary.new_item) is not None:
        note = f"{item.title}: rank {item.rank:,} of {item.of:,} for user {item.user}"
        found.append(("from a new item's message until it is ranked", _seconds(item.seconds_to_rankable), note))
    if (stream := summary.stream) is not None:
        note = f"{stream.events:,} events in {_seconds(stream.seconds)}, {stream.bad:,} bad"
        found.append(("events a second, streamed", f"{stream.rate_per_s:,.0f}", note))
    for label, values in (("freshness, p50", summary.freshness_ms), ("request to rank, p50", summary.serving_ms)):
        if values:
            note = f"p99 {_ms(_at(values, 99))}, max {_ms(max(values))} of {len(values):,}"
            found.append((label, _ms(_at(values, 50)), note))
    return found


def _header(summary: DemoSummary) -> str:
    facts = {"dataset": summary.dataset, "bundle": summary.bundle, "made": summary.created}
    about = " · ".join(f"{escape(label)} <b>{escape(value)}</b>" for label, value in facts.items())
    badge = (
        '<p class="badge">The data are synthetic: generated, so that the parts can be seen working together. '
        "How much better the ranker is on your data, only your data can say.</p>"
        if summary.synthetic
        else ""
    )
    return f'<header>\n<h1>{escape(summary.title)}</h1>\n<p class="about">{about}</p>\n{badge}</header>'


def _tiles(summary: DemoSummary) -> str:
    tiles = "\n".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span><small>{escape(note)}</small></div>'
        for label, value, note in key_figures(summary)
    )
    return f'<div class="tiles">\n{tiles}\n</div>' if tiles else markup.none("Nothing was measured.")


def _ranking(summary: DemoSummary) -> str:
    quality = summary.quality
    if not quality:
        return markup.section("Ranking quality", markup.none("No model was evaluated."))
    parts = [part for part in _PARTS if all(part in found for found in quality.values())]
    values = [value for found in quality.values() for part in parts if (value := found[part]["auc"]) is not None]
    groups = [
        (_PARTS[part], [plot.Row(m, f[part]["auc"], _ratio(f[part]["auc"]), m == _RANKER) for m, f in quality.items()])
        for part in parts
    ]
    low, high = np.floor(min([_CHANCE, *values]) * 20) / 20, np.ceil(max([0.55, *values]) * 20) / 20
    ticks = [(low, f"{low:.2f}")] if low < _CHANCE else []
    ticks += [(_CHANCE, "0.5 = chance"), (high, f"{high:.2f}")]
    drawing = plot.rows(groups, describe="AUC by model", low=low, high=high, form="dot", ticks=ticks)
    caption = (
        f"The chance that a clicked item is ranked above one that was not. The axis starts at {low:.2f}, not at 0; "
        "look at the unseen items and users, which no training example contains."
    )
    body = []
    for part in parts:
        count = max(found[part]["rows"] or 0 for found in quality.values())
        body.append([f"{_PARTS[part]}, {count:,.0f} test examples"])
        for model, found in quality.items():
            measures = (found[part][name] for name in ("auc", "log_loss", "normalized_entropy"))
            body.append([model, *(_ratio(value) for value in measures)])
    table = markup.table(["model", ">AUC", ">log loss", ">NE"], body, strong=_RANKER)
    note = markup.caption("NE: log loss over that of always predicting the mean; below 1 is better than that.")
    return markup.section(
        "Ranking quality",
        markup.cards(markup.figure("AUC by model", drawing, caption), markup.card("Measures", table + note)),
    )


def _new_items(summary: DemoSummary) -> str:
    if summary.new_items is None:
        return markup.section("New items", markup.none("New items were not ranked for several users."))
    return ranks_section(summary.new_items)


def _new_item(summary: DemoSummary) -> str:
    item = summary.new_item
    seconds = _seconds(item.seconds_to_rankable) if item else ""
    return item_section(item, summary.top_before, summary.top_after, seconds=seconds)


def _online(summary: DemoSummary) -> str:
    figures = []
    if stream := summary.stream:
        body = [
            ["events", f"{stream.events:,}"],
            ["items", f"{stream.items:,}"],
            ["bad messages, quarantined", f"{stream.bad:,}"],
            ["micro-batches", f"{stream.batches:,}"],
            ["seconds", f"{stream.seconds:,.2f}"],
            ["events a second", f"{stream.rate_per_s:,.0f}"],
        ]
        figures.append(markup.card("The stream", markup.table(["", ">"], body)))
    timings = (
        ("Freshness", summary.freshness_ms, "From an event's arrival until a ranker reads what it changed"),
        ("Requests to rank", summary.serving_ms, "Latency of /v1/rank as its caller sees it"),
    )
    for heading, values, what in timings:
        if values:
            marks = [(f"p{p} {_ms(_at(values, p))}", _at(values, p)) for p in (50, 99)]
            drawing = plot.histogram(values, describe=f"{heading}, histogram", marks=marks, unit="ms")
            caption = (
                f"{what}, {len(values):,} times; the longest took {_ms(max(values))} and counts in the last bar. "
                "Look at how far p99 lies from p50."
            )
            figures.append(markup.figure(heading, drawing, caption))
        else:
            figures.append(markup.card(heading, markup.none("Not measured.")))
    counted = [markup.card("What the stream counted", _counted(summary.counted))] if summary.counted else []
    return markup.section("Streaming and serving", markup.cards(*figures), *counted)


def _counted(counted: CountedRates) -> str:
    rows = []
    for name, before in counted.before.items():
        shown = [f"{100 * rate:.1f} % of {events:,.0f}" for rate, events in (before, counted.after[name])]
        rows.append([name, *shown])
    about = (
        f"Smoothed rates that a ranking of “{counted.item}” for user {counted.user} reads, and the events behind each. "
        "Compare the columns: each held-back event counts at once, without training."
    )
    return markup.table(["", ">before", ">after"], rows) + markup.caption(about)


def _semantic_ids(summary: DemoSummary) -> str:
    report = summary.semantic_ids
    if report is None:
        return markup.section(
            "Semantic IDs", markup.none("The dataset has no items with text, so there are no Semantic IDs.")
        )
    groups = [
        (
            f"level {level}",
            [
                plot.Row("usage", usage, f"{100 * usage:.1f} %"),
                plot.Row("perplexity", perplexity, f"{100 * perplexity:.1f} %", strong=True),
            ],
        )
        for level, (usage, perplexity) in enumerate(zip(report["usage"], report["perplexity"], strict=True), 1)
    ]
    ticks = [(0.0, "0"), (0.5, "50 %"), (1.0, "100 %")]
    drawing = plot.rows(groups, describe="Codebook usage and perplexity by level", low=0, high=1, ticks=ticks)
    caption = (
        f"Share of a level's {report['codes']:,} codes that some item has, and how evenly items spread over them. "
        "Look for a short perplexity bar: a few codes take most items there."
    )
    body = [
        ["items", f"{report['items']:,}"],
        ["codes a level × levels", f"{report['codes']:,} × {report['levels']:,}"],
        *([["items with a zero content vector", f"{n:,}"]] if (n := report.get("zero_vectors")) is not None else []),
        ["distinct Semantic IDs over items", f"{100 * report['unique']:.1f} %"],
        ["most items with one Semantic ID", f"{report['largest_group']:,}"],
        *([f"reconstruction error, {n.replace('_', ' ')}", f"{v:.4f}"] for n, v in report["error"].items()),
        ["collapsed levels", ", ".join(map(str, report.get("collapsed") or ())) or "none"],
    ]
    table = markup.table(["", ">"], body)
    return markup.section(
        "Semantic IDs",
        markup.cards(markup.figure("Use of the codes", drawing, caption), markup.card("The codebook", table)),
    )


def _background(summary: DemoSummary) -> str:
    cards = []
    if summary.profile:
        cards.append(markup.card("The data", markup.table(["", ">"], [list(row) for row in summary.profile])))
    if losses := summary.validation_log_loss:
        drawing = plot.curve(losses, describe="Validation log loss by epoch", shown=[_ratio(loss) for loss in losses])
        caption = "Validation log loss after each epoch; the large dot is the epoch that was kept, lower is better."
        cards.append(markup.figure("Training", drawing, caption))
    if stages := summary.stage_seconds:
        longest = max(stages, key=lambda name: stages[name])
        rows = [plot.Row(name, spent, _seconds(spent), name == longest) for name, spent in stages.items()]
        drawing = plot.rows([("", rows)], describe="Seconds by stage", low=0, high=max(stages.values()))
        caption = f"Time by stage, {_seconds(sum(stages.values()))} in all; the longest, {longest}, is marked."
        cards.append(markup.figure("Where the time went", drawing, caption))
    return markup.section("The run", markup.cards(*cards) if cards else markup.none("Nothing was recorded."))


def _at(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ms(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 10 else f"{value:.2f} s"
