"""Two versions' rows side by side, and what happens where the other version cannot be had."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from features.errors import TesseraError
from tessera.bench.harness.against import ROOT, against, compared


def test_rows_meet_by_their_words_and_numbers_by_their_medians() -> None:
    other = [[{"arm": "redis", "batch": "256", "rate": 100.0}], [{"arm": "redis", "batch": "256", "rate": 300.0}]]
    this = [
        [{"arm": "redis", "batch": "256", "rate": 400, "new": 1.0}, {"arm": "mirror", "rate": 9.0}],
        [{"arm": "redis", "batch": "256", "rate": 400, "new": 1.0}, {"arm": "mirror", "rate": 9.0}],
    ]
    assert compared(other, this) == [
        {"row": "redis · 256", "what": "rate", "other": 200.0, "this": 400.0, "ratio": 2.0},
    ]


def test_rows_are_told_apart_by_the_numbers_that_both_were_given_and_not_by_what_was_measured() -> None:
    def row(share: float, ms: float, **more: str | None) -> dict[str, float | str | None]:
        return {"method": "ours", "seed": 0, "share": share, "p50_ms": ms} | more

    other = [[row(1.0, 4.0, plan="exact"), row(0.1, 8.0, plan="lists")]]
    this = [[row(1.0, 2.0, plan=None), row(0.1, 2.0, state="warm", plan="exact"), row(0.1, 16.0, state="cold")]]
    assert [(one["row"], one["what"], one["ratio"], one.get("only_here")) for one in compared(other, this)] == [
        ("ours · share 1", "p50_ms", 0.5, None),
        ("ours · share 0.1 · warm · exact", "p50_ms", 0.25, "state"),
        ("ours · share 0.1 · cold", "p50_ms", 2.0, "state"),
    ]


def test_two_versions_that_print_no_row_of_the_same_words_are_an_error() -> None:
    with pytest.raises(TesseraError, match="no row of the other version meets a row of this one: its rows have arm"):
        compared([[{"arm": "a", "rate": 1.0}]], [[{"arm": "b", "rate": 1.0}]])


def test_a_commit_that_is_not_in_the_clone_is_refused_by_name(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git clone")
    with pytest.raises(TesseraError, match="0123abc is not in this clone; fetch it"):
        against("0123abc", "filtered", [], tmp_path, rounds=1, console=Console(file=io.StringIO()))
