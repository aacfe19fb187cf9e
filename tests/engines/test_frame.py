"""Real engines shuffle rows and build a frame with the bytes of one process."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from features.jobs.shuffle import shuffle_shards
from tests.engines.catalogue import contents
from tests.integration.pipeline.test_frame_jobs import by_jobs, dataset, write_tables

PARTITIONS = 4


def by_length(shard: pl.DataFrame) -> NDArray[np.int64]:
    """Returns the partition of each row, by the length of its text."""
    return (shard["text"].str.len_bytes() % PARTITIONS).cast(pl.Int64).to_numpy()


@pytest.mark.parametrize("name", ["direct", "dask", "flink", "spark", "prism"])
def test_a_shuffle_gives_the_bytes_of_one_process(
    name: str, shards: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    shuffle_shards(by_length, shards, tmp_path / "one", partitions=PARTITIONS, label="deal")
    shuffle_shards(by_length, shards, tmp_path / "out", partitions=PARTITIONS, label="deal", engine=engine)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.parametrize("name", ["direct", "dask", "flink"])
def test_the_jobs_of_a_frame_give_the_bytes_of_one_process(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    by_jobs(shop, tmp_path / "one", PARTITIONS)
    by_jobs(shop, tmp_path / "out", PARTITIONS, engine)
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
