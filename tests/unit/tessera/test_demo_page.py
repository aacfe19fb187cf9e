"""The report page holds every figure of its summary, stands alone, and takes whatever is missing in its stride."""

import io
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tessera.pages import svg as plot
from tessera.pages.demo_page import CountedRates, DemoSummary, StreamFigures, key_figures, render_summary, write_report
from tessera.pages.new_items import NewItem, NewItemRanks, Ranks

VOID = {"meta", "br", "hr", "img", "link", "input"}


def measured(auc: float | None, rows: int) -> dict[str, float | None]:
    other = None if auc is None else auc / 2
    return {"rows": rows, "positives": 0.3, "auc": auc, "log_loss": other, "normalized_entropy": other and other + 0.5}


QUALITY = {
    "popularity": {"all": measured(0.6101, 912), "known": measured(0.6202, 800), "unseen": measured(0.5, 112)},
    "user-item": {"all": measured(0.6111, 912), "known": measured(0.6222, 800), "unseen": measured(0.5333, 112)},
    "user-item-running": {
        "all": measured(0.6444, 912),
        "known": measured(0.6555, 800),
        "unseen": measured(0.6222, 112),
    },
    "hashed-id": {"all": measured(0.6303, 912), "known": measured(0.6404, 800), "unseen": measured(0.4805, 112)},
    "ranker": {"all": measured(0.7506, 912), "known": measured(0.7607, 800), "unseen": measured(0.7308, 112)},
}
SEMANTIC_IDS = {
    "items": 1503,
    "levels": 3,
    "codes": 32,
    "usage": [1.0, 0.969, 0.875],
    "perplexity": [0.901, 0.587, 0.495],
    "unique": 0.527,
    "largest_group": 9,
    "error": {"fitted": 0.2177, "held_out": 0.2792},
    "collapsed": [],
}
FULL = DemoSummary(
    title="Tessera <demo>",
    dataset="synthetic",
    synthetic=True,
    bundle="b-8454d2b9",
    created="2025-11-23 21:40 UTC",
    profile=[("users", "1,911"), ("positive & kept", "30.1 %")],
    quality=QUALITY,
    semantic_ids=SEMANTIC_IDS,
    stage_seconds={"encode": 1.23, "assign": 45.6, "train": 789.0},
    validation_log_loss=[0.6112, 0.5831, 0.5904],
    stream=StreamFigures(events=20_001, items=41, bad=7, seconds=4.31, rate_per_s=4_640.4, batches=81),
    freshness_ms=[float(value) for value in range(1, 202)],
    serving_ms=[2.0, 2.5, 3.0, 3.5, 44.4],
    new_items=NewItemRanks(
        items=61,
        users=103,
        catalogue=1_507,
        seed=5,
        kind="generated",
        fans_are="those with <taste>",
        others_are="the rest",
        with_content=Ranks(fans=[11, 123, 400], others=[877, 901, 1_203]),
        without_content=Ranks(fans=[431, 512, 600], others=[433, 499, 602]),
    ),
    new_item=NewItem(
        id="new-1",
        title="Bees & <b>honey</b>",
        user="r01770",
        rank=3,
        of=1_501,
        seconds_to_rankable=0.418,
        neighbours=[("a1", 'Hives "R" us', 0.934)],
    ),
    top_before=[("a2", "Owls > bats", 0.8123), ("a3", "Whales", 0.7456)],
    top_after=[("a2", "Owls > bats", 0.8012), ("new-1", "Bees & <b>honey</b>", 0.7901)],
    counted=CountedRates(
        user="r01770",
        item="Owls > bats",
        before={"item": (0.5121, 1_200.0), "user × item.topic": (0.25, 4.0)},
        after={"item": (0.5342, 1_290.0), "user × item.topic": (0.625, 9.0)},
    ),
)
EMPTY = DemoSummary(title="Events alone", dataset="criteo", synthetic=False, bundle="b-0", created="today")


class Balance(HTMLParser):
    """Collects the visible text and refuses a tag that closes another one than was opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)


def page(summary: DemoSummary, tmp_path: Path) -> tuple[str, Balance]:
    path = tmp_path / "made" / "report.html"
    write_report(path, summary)
    source = path.read_text(encoding="utf-8")
    found = Balance()
    found.feed(source)
    found.close()
    return source, found


def variants() -> dict[str, DemoSummary]:
    undecided: dict[str, Any] = {
        model: parts | {"unseen": dict.fromkeys(parts["unseen"], None) | {"rows": 0}}
        for model, parts in QUALITY.items()
    }
    return {
        "full": FULL,
        "empty": EMPTY,
        "without content": replace(FULL, semantic_ids=None, new_items=None, new_item=None, top_before=(), top_after=()),
        "without unseen items": replace(FULL, quality=undecided),
        "one of each": replace(FULL, freshness_ms=[0.0], serving_ms=[5.0], validation_log_loss=[0.6]),
        "stages of no time": replace(FULL, stage_seconds={"encode": 0.0}),
        "collapsed": replace(FULL, semantic_ids=SEMANTIC_IDS | {"collapsed": [2, 3], "error": {}}),
    }


@pytest.mark.parametrize("name", variants())
def test_tags_balance_and_nothing_outside_is_referred_to(name: str, tmp_path: Path) -> None:
    source, found = page(variants()[name], tmp_path)
    assert found.open == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not re.search(r"https?://|<script|url\(|@import|\bsrc=|\bhref=", source)
    assert not re.search(r"\b(nan|inf|None)\b", source)


def test_every_figure_of_the_summary_is_in_the_page(tmp_path: Path) -> None:
    text = " ".join(page(FULL, tmp_path)[1].text)
    expected = ["b-8454d2b9", "2025-11-23 21:40 UTC", "synthetic", "1,911", "positive & kept", "30.1 %"]
    for parts in QUALITY.values():
        for part in parts.values():
            expected += [f"{part[name]:.4f}" for name in ("auc", "log_loss", "normalized_entropy")]
    expected += ["912", "800", "112"]
    expected += ["1,503", "32 × 3", "100.0 %", "96.9 %", "87.5 %", "90.1 %", "58.7 %", "49.5 %", "52.7 %", "9"]
    expected += ["0.2177", "0.2792", "1.23 s", "45.6 s", "789 s", "0.6112", "0.5831", "0.5904"]
    expected += ["20,001", "41", "7", "4.31", "4,640", "81"]
    expected += ["p50 101 ms", "p99 199 ms", "201 ms", "201 times", "p50 3.00 ms", "p99 42.8 ms", "44.4 ms", "5 times"]
    expected += ["new-1", "r01770", "1,501", "0.42 s", 'Hives "R" us (a1)', "0.934"]
    expected += ["Owls > bats", "Whales", "0.8123", "0.7456", "0.8012", "0.7901"]
    expected += ["61", "103", "1,507", "seed 5", "those with <taste>", "the rest"]
    expected += ["123 vs 901", "512 vs 499", "67", "262", "889", "1,052", "472", "556", "466", "550", "67 %", "0 %"]
    assert [figure for figure in expected if figure not in text] == []


def test_the_ranks_of_new_items_come_first_with_content_then_without() -> None:
    (_, with_content, draw), (_, without_content, _), *_ = key_figures(FULL)
    assert (with_content, without_content) == ("123 vs 901", "512 vs 499")
    assert draw == "among 1,507 items; 61 new items, 103 users, seed 5"
    out = io.StringIO()
    render_summary(Console(file=out, width=80), FULL)
    first_screen = out.getvalue().splitlines()[:10]
    for figure in ("123 vs 901", "512 vs 499", "61 new items", "103", "seed 5"):
        assert any(figure in line for line in first_screen)


@pytest.mark.parametrize(("fans", "others", "ratio"), [([1, 2, 9], [4, 4, 5], 0.5), ([7], [7], 1.0)])
def test_the_ratio_is_of_medians(fans: list[int], others: list[int], ratio: float) -> None:
    assert Ranks(fans, others).ratio == ratio


def test_titles_are_text_and_never_markup(tmp_path: Path) -> None:
    source, found = page(FULL, tmp_path)
    assert "<b>honey</b>" not in source
    assert "Bees &amp; &lt;b&gt;honey&lt;/b&gt;" in source
    assert found.text.count("Bees & <b>honey</b>") == 1
    assert "<title>Tessera &lt;demo&gt;</title>" in source


def test_the_new_item_stands_out_in_the_list(tmp_path: Path) -> None:
    source, _ = page(FULL, tmp_path)
    marked = re.findall(r'<li class="strong">(.*?)</li>', source)
    assert len(marked) == 1
    assert unescape(marked[0]).startswith("Bees & <b>honey</b>")


def test_what_is_missing_is_said_and_not_drawn(tmp_path: Path) -> None:
    source, found = page(EMPTY, tmp_path)
    assert "svg" not in found.tags
    for words in (
        "No model was evaluated",
        "no Semantic IDs",
        "No new item",
        "New items were not ranked",
        "Not measured",
        "Nothing was recorded",
    ):
        assert words in source
    assert key_figures(EMPTY) == []


def test_only_synthetic_data_are_called_so(tmp_path: Path) -> None:
    assert "The data are synthetic" in page(FULL, tmp_path)[0]
    assert "The data are synthetic" not in page(replace(FULL, synthetic=False), tmp_path)[0]


def test_the_page_follows_the_readers_colour_scheme_width_and_printer(tmp_path: Path) -> None:
    source, _ = page(FULL, tmp_path)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 480px", "width=device-width"):
        assert rule in source


def test_the_terminal_shows_the_same_key_figures() -> None:
    out = io.StringIO()
    render_summary(Console(file=out, width=160), replace(FULL, title="[bold]not markup[/bold]"))
    for figure in (
        "[bold]not markup[/bold]",
        "0.7506",
        "0.7308",
        "0.4805",
        "1,501",
        "4,640",
        "101 ms",
        "3.00 ms",
        "123 vs 901",
    ):
        assert figure in out.getvalue()
    render_summary(Console(file=out, width=160), EMPTY)
    assert "criteo" in out.getvalue()


def test_a_histogram_counts_what_lies_beyond_its_end_in_its_last_bin() -> None:
    drawn = plot.histogram([1.0] * 99 + [500.0], describe="d", marks=[("p50", 1.0), ("p99", 2.0)], unit="ms")
    bars = re.findall(r'<rect class="weak" x="([\d.]+)"', drawn)
    assert len(bars) == 2
    assert float(bars[1]) > 300


@pytest.mark.parametrize("end", [0.003, 0.7, 1.0, 3.2, 10, 199, 48_000])
def test_ticks_are_round_few_and_within_the_axis(end: float) -> None:
    ticks = plot.nice_ticks(end)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 7
    assert ticks[-1] <= end * (1 + 1e-9)
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)


def test_what_the_stream_counted_is_shown_before_and_after(tmp_path: Path) -> None:
    text = " ".join("".join(page(FULL, tmp_path)[1].text).split())
    assert "51.2 % of 1,200" in text
    assert "53.4 % of 1,290" in text
    assert "What the stream counted" not in "".join(page(EMPTY, tmp_path)[1].text)
