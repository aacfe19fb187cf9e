"""A frame is cut into the longest shards that hold to both bounds, and shards are read in their order."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.jobs.shard import each_shard, read_shards, shard_paths, write_shards


def _heights(sizes: list[int], rows: int, size_bytes: int) -> list[int]:
    """Heights of the shards, row by row: the slow twin."""
    heights, held = [0], 0
    for size in sizes:
        if heights[-1] and (heights[-1] == rows or held + size > size_bytes):
            heights.append(0)
            held = 0
        heights[-1] += 1
        held += size
    return heights


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 6), st.integers(1, 60))
def test_shards_are_as_long_as_both_bounds_allow(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], rows: int, size_bytes: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    frame = pl.DataFrame({"text": pl.Series(["x" * size for size in sizes], dtype=pl.String)})
    paths = write_shards(frame, directory, rows=rows, size_bytes=size_bytes + 8)
    assert shard_paths(directory) == paths
    assert [shard.height for shard in each_shard(directory)] == _heights([s + 8 for s in sizes], rows, size_bytes + 8)
    assert read_shards(directory).equals(frame)


def test_chosen_columns_are_read_alone(tmp_path: Path) -> None:
    frame = pl.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "z"]})
    write_shards(frame, tmp_path, rows=2)
    assert read_shards(tmp_path, ["b"]).equals(frame.select("b"))
    assert [shard.columns for shard in each_shard(tmp_path, ["b", "a"])] == [["b", "a"]] * 2
