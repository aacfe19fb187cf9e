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
    *(
        {"measured": "quality", "seed": seed, "order": order, "test_auc": 0.8}
        for seed in (0, 1)
        for order in bench.ORDERS
    ),
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
    other = bench.in_another_order(FRAME, 0)
    assert len(other.blocks("train")) == 1
    assert not other.part("train").equals(FRAME.part("train"))
    assert other.part("train").sort("event", "label").equals(FRAME.part("train").sort("event", "label"))
    assert other.part("test").equals(FRAME.part("test"))


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({0: {"peak_gb": 0.9}}, [0]),
        # Row 3 has eight blocks in seed 0, row 6 in seed 1; row 4 is another order of one block.
        ({3: {"test_auc": 0.8011}, 6: {"test_auc": 0.8011}}, [1]),
        ({3: {"test_auc": 0.8016}, 6: {"test_auc": 0.7990}}, [2]),
        ({3: {"test_auc": 0.8016}, 6: {"test_auc": 0.7990}, 4: {"test_auc": 0.8012}}, []),
    ],
)
def test_a_claim_fails_by_the_mean_and_by_the_worst_row(changes: dict[int, dict[str, float]], fails: list[int]) -> None:
    assert all(claim.holds for claim in bench.claims(ROWS))
    rows = [row | changes.get(number, {}) for number, row in enumerate(ROWS)]
    assert [number for number, claim in enumerate(bench.claims(rows)) if not claim.holds] == fails


def test_a_process_trains_on_the_blocks_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "load_dataset", lambda path: coloured_dataset())
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", FRAME.height("train"))
    bench.write_repeated(FRAME, tmp_path, 3)
    found = bench.train_once(tmp_path / "no-such.toml", tmp_path)
    assert (found["examples"], found["blocks"]) == (3 * FRAME.height("train"), 3)
    # A process that imports torch holds some hundred megabytes.
    assert 0.1 < found["peak_gb"] < 50
