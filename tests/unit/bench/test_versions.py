"""The bench of two versions: ratios of neighbours, their mean beside the claim, and errors with the version's name."""

import sys
from pathlib import Path

import pytest

from features.errors import TesseraError
from tessera.bench.versions import ratios


def _row(part: str, batch: int, seed: int, this: float, other: float) -> dict[str, object]:
    name = "events_per_cpu_s"
    return ratios._row(part, batch, seed, {name: this, "own": 1.0}, {name: other}, name)


def test_a_row_holds_both_versions_and_a_claim_the_mean_of_the_ratios() -> None:
    rows = [_row("step", 256, 0, 30.0, 10.0), _row("step", 256, 1, 10.0, 10.0), _row("step", 1_024, 0, 10.0, 10.0)]
    assert rows[0]["ratio"] == 3.0
    assert (rows[0]["events_per_cpu_s"], rows[0]["other_events_per_cpu_s"], "own" in rows[0]) == (30.0, 10.0, False)
    first, second = ratios._claims(rows)
    assert (first.value, first.target, first.holds) == (2.0, 1.7, True)
    assert "batch 256" in first.claim
    assert "1.00 to 3.00" in first.claim
    assert not second.holds


def test_a_version_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(TesseraError, match=r"step of old: FileNotFoundError: .*bundle.txt"):
        ratios._run(Path(sys.executable), tmp_path, "old", "step", 256, 0)
