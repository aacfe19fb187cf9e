"""The list of a job's shards is handed out in ranges, and the records of its workers add up."""

import os
from pathlib import Path

import pytest

from features.jobs.worklist import MOST_BLOCKS, Block, BlockCount, Failure, JobReport, Worklist, report


def listed(work: Worklist, blocks: list[Block]) -> list[Path]:
    return [shard for block in blocks for shard in work.shards(block)]


@pytest.mark.parametrize("count", [1, 3, MOST_BLOCKS, MOST_BLOCKS + 1, 3 * MOST_BLOCKS + 7])
def test_every_shard_is_in_one_block_and_blocks_are_of_one_size(tmp_path: Path, count: int) -> None:
    shards = [tmp_path / f"part-{number:05d}.parquet" for number in range(count)]
    work = Worklist(tmp_path / "job")
    blocks = work.create(shards)
    assert sorted(listed(work, blocks)) == shards
    assert len(blocks) == min(count, MOST_BLOCKS)
    sizes = {len(work.shards(block)) for block in blocks}
    assert max(sizes) - min(sizes) <= 1


def test_paths_are_absolute_on_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    work = Worklist(tmp_path / "job")
    blocks = work.create([Path("in/part-0.parquet"), Path("part-1.parquet"), Path("../x/part-2.parquet")])
    monkeypatch.chdir("/")
    expected = [tmp_path / "in/part-0.parquet", tmp_path / "part-1.parquet", tmp_path.parent / "x/part-2.parquet"]
    assert listed(work, blocks) == expected


def test_no_shards_are_no_blocks(tmp_path: Path) -> None:
    assert Worklist(tmp_path / "job").create([]) == []


def test_a_block_that_is_done_twice_counts_once(tmp_path: Path) -> None:
    driver, worker = Worklist(tmp_path / "job"), Worklist(tmp_path / "job")
    blocks = driver.create([tmp_path / f"{number}.parquet" for number in range(3)])
    assert not driver.begun
    worker.begin()
    for number, name in ((0, "a:1"), (0, "b:1"), (2, "a:1")):
        worker.finish(blocks[number], BlockCount(1, 10, 8, 2, name))
    assert driver.begun
    assert sorted(driver.finished()) == [0, 2]
    assert report(list(driver.finished().values())) == JobReport(2, 20, 16, 4, {"b:1": 1, "a:1": 1})
    assert driver.failure is None
    worker.fail(Failure("0.parquet", "ValueError: no", False))
    assert driver.failure == Failure("0.parquet", "ValueError: no", False)
    driver.wait()
    assert not driver.begun
    driver.remove()
    assert not os.listdir(tmp_path)


def test_a_new_job_starts_without_the_records_of_the_last(tmp_path: Path) -> None:
    last = Worklist(tmp_path / "job")
    blocks = last.create([tmp_path / "0.parquet"])
    last.finish(blocks[0], BlockCount(1, 1, 1, 0, "a:1"))
    work = Worklist(tmp_path / "job")
    work.create([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert work.finished() == {}
