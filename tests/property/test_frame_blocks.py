"""Laws of the blocks of a frame: they partition a part, keep its order, and are the same in memory and in files."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import frame_blocks
from features.dataset.split import PARTS
from features.frame import Frame, stored_frame, write_examples
from features.frame_blocks import block_count, block_of, block_path, example_files, held_blocks
from tests.build import coloured_frame

NOBODY = pl.DataFrame({"user_id": ["u0"]}), pl.DataFrame({"item_id": ["i0"]})


def examples(events: list[int]) -> pl.DataFrame:
    """Examples in order of their events; an event that occurs twice is a positive with a drawn negative."""
    return pl.DataFrame(
        {
            "event": pl.Series(sorted(events), dtype=pl.UInt32),
            "place": np.arange(len(events)),
            "history": pl.Series(
                [[event, event + 1][: event % 3] for event in sorted(events)], dtype=pl.List(pl.UInt32)
            ),
        }
    )


EVENTS = st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 50), max_size=60)


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(1, 80))
def test_blocks_partition_a_part_and_keep_its_order(events: list[int], rows: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(frame_blocks, "BLOCK_ROWS", rows)
        part = examples(events)
        blocks, again = held_blocks(part), held_blocks(part.clone())
        assert len(blocks) == block_count(part.height) == max(1, -(-part.height // rows))
        read = list(blocks.frames())
        assert [block.height for block in read] == list(blocks.heights)
        assert blocks.height == part.height
        # Each event is in one block, with its negatives, at the place that its hash says.
        for number, block in enumerate(read):
            assert (block_of(block["event"].to_numpy(), len(blocks)) == number).all()
            assert block["place"].is_sorted()
            assert block.equals(again.read(number))
            assert block.select("history", "event").equals(blocks.read(number, ["history", "event"]))
        assert blocks.whole().equals(part)
        assert blocks.whole("place").equals(part.select("place"))
        assert blocks.arranged([block["place"].to_numpy() for block in read]).tolist() == part["place"].to_list()
        assert pl.concat(read).sort("place").equals(part)


def test_blocks_are_of_like_size_and_a_uniform_sample() -> None:
    events = np.arange(200_000)
    blocks = block_of(events, 7)
    counts = np.bincount(blocks, minlength=7)
    assert abs(counts - len(events) / 7).max() < 5 * np.sqrt(len(events) / 7)
    means = [events[blocks == block].mean() for block in range(7)]
    assert np.abs(np.array(means) - events.mean()).max() < 5 * events.std() / np.sqrt(len(events) / 7)


def test_the_block_of_an_event_is_frozen() -> None:
    assert block_of(np.array([0, 1, 2, 3, 1_000, 2**32 - 1], dtype=np.uint32), 5).tolist() == [0, 4, 0, 1, 1, 4]


@pytest.mark.parametrize("rows", [10**6, 37])
def test_a_frame_read_from_files_is_the_frame_that_was_written(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", rows)
    frame = coloured_frame()
    frame.users.write_parquet(tmp_path / "users.parquet")
    frame.items.write_parquet(tmp_path / "items.parquet")
    write_examples(frame, tmp_path)
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", 1)
    found = stored_frame(tmp_path)
    assert found.users.equals(frame.users)
    assert found.items.equals(frame.items)
    assert found.examples.equals(frame.examples)
    for part in PARTS:
        monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", rows)
        held, stored = frame.blocks(part), found.blocks(part)
        assert stored.heights == held.heights
        assert len(stored) == max(1, -(-frame.height(part) // rows))
        assert all(one.equals(other) for one, other in zip(held.frames(), stored.frames(), strict=True))
        assert found.height(part) == frame.height(part) == stored.height
        assert found.part(part).equals(frame.part(part))
        assert stored.whole("event", "label").equals(frame.part(part).select("event", "label"))
    assert len(example_files(tmp_path)) == sum(len(found.blocks(part)) for part in PARTS)


def test_blocks_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    frame = coloured_frame()
    write_examples(frame, tmp_path)
    found = stored_frame(tmp_path)
    assert found.height("train") == frame.height("train")
    block_path(tmp_path, "train", 0).unlink()
    with pytest.raises(FileNotFoundError):
        found.part("train")
    assert found.part("test").equals(frame.part("test"))


def test_the_one_file_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    frame = coloured_frame()
    for name in ("users", "items", "examples"):
        getattr(frame, name).write_parquet(tmp_path / f"{name}.parquet")
    found = stored_frame(tmp_path)
    assert found.examples.equals(frame.examples)
    assert found.part("validation").equals(frame.part("validation"))
    assert found.blocks("train").heights == (frame.height("train"),)
    assert example_files(tmp_path) == [tmp_path / "examples.parquet"]


def test_an_empty_part_is_one_empty_block_with_all_columns(tmp_path: Path) -> None:
    frame = coloured_frame()
    bare = Frame(*NOBODY, frame.examples.filter(pl.col("split") != "validation"))
    write_examples(bare, tmp_path)
    blocks = stored_frame(tmp_path).blocks("validation")
    assert blocks.heights == (0,)
    assert blocks.read(0).schema == frame.examples.schema


def test_a_mapped_block_is_changed_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_blocks, "BLOCK_ROWS", 50)
    frame = coloured_frame()
    changed = frame.blocks("train").mapped(lambda block: block.with_columns(new=pl.col("event") + 1))
    assert changed.whole("new")["new"].to_list() == (frame.part("train")["event"] + 1).to_list()
