"""A shuffle moves each row to its partition and keeps the order of rows."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from features.framing.split import Times, random_shares
from features.jobs.shard import read_shards, write_shards
from features.jobs.shuffle import gather, shuffle_shards, write_scattered


def table(rows: int) -> pl.DataFrame:
    rng = np.random.default_rng(rows)
    return pl.DataFrame(
        {
            "key": rng.integers(0, 7, rows),
            "place": np.arange(rows),
            "name": [None if n % 5 == 0 else f"n{n}" for n in range(rows)],
            "past": pl.Series([[n, n + 1][: n % 3] for n in range(rows)], dtype=pl.List(pl.UInt32)),
            "vector": pl.Series(rng.random((rows, 3)), dtype=pl.Array(pl.Float64, 3)),
        }
    )


@pytest.mark.parametrize("rows", [0, 1, 100])
def test_a_scattered_file_gives_each_partition_its_rows_in_order(tmp_path: Path, rows: int) -> None:
    frame = table(rows)
    write_scattered(frame, frame["key"].to_numpy(), 9, tmp_path / "a.arrow")
    for number in range(9):
        found = gather([tmp_path / "a.arrow"], number)
        assert found.equals(frame.filter(pl.col("key") == number))
        assert found.schema == frame.schema
    chosen = gather([tmp_path / "a.arrow"] * 2, 3, ["place"])
    assert chosen["place"].to_list() == frame.filter(pl.col("key") == 3)["place"].to_list() * 2


def _by_key(shard: pl.DataFrame) -> NDArray[np.int64]:
    return shard["key"].to_numpy()


def test_partitions_are_the_same_for_any_cut_into_shards(tmp_path: Path) -> None:
    frame, seen = table(200), []
    for rows in (200, 31):
        shards = write_shards(frame, tmp_path / f"in-{rows}", rows=rows)
        out = tmp_path / f"out-{rows}"
        progress: list[tuple[int, int]] = []
        report = shuffle_shards(
            _by_key,
            shards,
            out,
            partitions=7,
            label="deal",
            progress=lambda *at: progress.append(at),  # noqa: B023
        )
        assert report.rows_out == frame.height
        assert progress[-1] == (len(shards) + 7, len(shards) + 7)
        seen.append([path.read_bytes() for path in sorted(out.glob("part-*.parquet"))])
        assert read_shards(out).equals(frame.sort("key", maintain_order=True))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 7


@pytest.mark.parametrize("spread", [1, 5, 10**15])
def test_ranks_of_times_are_exact(tmp_path: Path, spread: int) -> None:
    times = np.random.default_rng(0).integers(-spread, spread, 1_000)
    shards = write_shards(pl.DataFrame({"time": times}), tmp_path, rows=300)
    ranks = [0, 1, 499, 998, 999]
    found = Times(shards, int(times.min()), int(times.max())).at(ranks)
    assert found == np.sort(times)[ranks].tolist()


def test_random_shares_are_even_and_differ_by_seed() -> None:
    events = np.arange(100_000, dtype=np.uint32)
    shares = random_shares(0, events)
    counts = np.histogram(shares, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 400
    assert abs(np.corrcoef(shares, random_shares(1, events))[0, 1]) < 0.02
    assert abs(np.corrcoef(shares, events)[0, 1]) < 0.02
