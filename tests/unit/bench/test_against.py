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


def test_a_commit_that_is_not_in_the_clone_is_refused_by_name(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git clone")
    with pytest.raises(TesseraError, match="0123abc is not in this clone; fetch it"):
        against("0123abc", "filtered", [], tmp_path, rounds=1, console=Console(file=io.StringIO()))
