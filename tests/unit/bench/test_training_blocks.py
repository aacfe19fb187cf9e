"""The benchmark of blocks: its frames are those it says, and its claims follow its rows."""

from pathlib import Path

import polars as pl
import pytest

from features import frame_blocks
from features.dataset.split import PARTS
from features.frame import stored_frame
from tessera.bench.offline import training_blocks as bench
from tests.build import coloured_dataset, coloured_frame

FRAME = coloured_frame(events=300)
ROWS = [
    {"measured": "memory", "times": 1, "peak_gb": 1.0},
    {"measured": "memory", "times": 10, "peak_gb": 1.1},
    *({"measured": "quality", "seed": seed, "blocks": blocks, "test_auc": 0.8} for seed in (0, 1) for blocks in (1, 8)),
]


def test_repeated_examples_are_the_same_but_for_their_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", 100)
    bench.write_repeated(FRAME, tmp_path, 3)
    found = stored_frame(tmp_path)
    for part in PARTS:
        rows = FRAME.part(part)
        assert len(found.blocks(part)) == -(-3 * rows.height // 100)
        assert found.part(part).drop("event").equals(pl.concat([rows] * 3).drop("event"))
    assert found.examples["event"].n_unique() == 3 * FRAME.examples.height
    assert found.items.equals(FRAME.items)


def test_the_same_examples_are_in_one_block_and_in_many() -> None:
    one, many = bench.in_blocks(FRAME, 1), bench.in_blocks(FRAME, 8)
    for part in PARTS:
        assert (len(one.blocks(part)), len(many.blocks(part))) == (1, 8)
        assert one.part(part).equals(FRAME.part(part))
        assert many.part(part).equals(FRAME.part(part))


@pytest.mark.parametrize(
    ("place", "change", "fails"), [(0, {"peak_gb": 0.9}, 0), (3, {"test_auc": 0.8011}, 1), (4, {"test_auc": 0.7989}, 1)]
)
def test_a_claim_fails_by_the_worst_row(place: int, change: dict[str, float], fails: int) -> None:
    assert all(claim.holds for claim in bench.claims(ROWS))
    rows = [{**row, **change} if number == place else row for number, row in enumerate(ROWS)]
    assert [number for number, claim in enumerate(bench.claims(rows)) if not claim.holds] == [fails]


def test_a_process_trains_on_the_blocks_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_dataset", lambda path: coloured_dataset())
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", FRAME.height("train"))
    bench.write_repeated(FRAME, tmp_path, 3)
    found = bench.train_once(tmp_path / "no-such.toml", tmp_path)
    assert (found["examples"], found["blocks"]) == (3 * FRAME.height("train"), 3)
    # A process that imports torch holds some hundred megabytes.
    assert 0.1 < found["peak_gb"] < 50
