"""The console shows what is followed, how far, and says whether the follower runs."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from streaming.shared.ledger import FollowedBundle, FollowEntry
from tessera.pages.console import view
from tessera.pages.console.followed import followed

TRAINING = FollowedBundle(
    "b-1",
    ("champion",),
    "training",
    seq=1_200,
    positions=(("events", 0, 34_567),),
    lag=12,
    counts={"events": 9_000, "bad": 3},
    freshness_ms=(12.4, 55.1),
    log_loss=0.51234,
)
PAUSED = FollowedBundle("b-2", ("challenger",), "paused", "<b>no such file</b>")


def page(entry: FollowEntry | None, now: float) -> str:
    pages = Environment(loader=PackageLoader("tessera.pages.console"), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"moment": view.moment, "count": view.count, "ratio": view.ratio, "ago": view.ago}
    content: dict[str, Any] = {"ranges": (), "servers": []}
    content |= {"champion": None, "items": 0, "fresh_s": None, "lag": [], "span_s": 0.0, "rates": [], "running": []}
    return str(
        pages.get_template("live.html").render(bundle="b-1", letters={}, followed=followed(entry, now), **content)
    )


def test_each_bundle_has_its_positions_lag_and_figures() -> None:
    shown = page(FollowEntry(100.0, "host:7", "shop", (TRAINING, PAUSED)), 120.0)
    for text in ("host:7", "b-1", "champion", "1,200", "events-0 34,567", "9,000", "12, 55 ms", "0.5123"):
        assert text in shown, text
    assert "runs as" in shown
    assert "paused: &lt;b&gt;no such file" in shown


def test_a_follower_that_ended_or_is_silent_is_told_apart() -> None:
    ended = page(FollowEntry(100.0, "host:7", "shop", (), ended=True), 120.0)
    silent = page(FollowEntry(100.0, "host:7", "shop", (), registry="no answer"), 300.0)
    assert "has ended" in ended
    assert "wrote its last entry" in silent
    assert "no answer" in silent
    assert "Followed" not in page(None, 300.0)
