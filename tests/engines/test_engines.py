"""Real engines do a job in several processes and give the bytes of one, also where a process is killed meanwhile.

`make test-engines` starts the clusters. Without them the tests of Flink and Spark are skipped.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from features.errors import TesseraError
from features.jobs.beam import map_shards
from features.jobs.encode import encode_catalogue
from features.jobs.engine import Engine
from features.jobs.worklist import JobReport, Worklist
from models.semantic_id.assign import assign_catalogue
from tests.engines.catalogue import ROOT, SHARDS, TEXTS, assign_on, contents, encode_on

DISTRIBUTED = ("direct", "dask", "flink", "spark")
_LONG_WORK_S = 2.0
_KILL_WITHIN_S = 1_000
_REGISTERS_S = 60


def check_shares(report: JobReport) -> None:
    """Asserts that two processes did a quarter of the shards at least, and that none of them is the driver."""
    assert (report.shards, report.rows_in, report.rows_out) == (SHARDS, len(TEXTS), len(TEXTS))
    assert len(report.workers) >= 2, report.workers
    assert sorted(report.workers.values())[-2] >= SHARDS / 4, report.workers
    assert not any(worker.endswith(f":{os.getpid()}") for worker in report.workers)


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes_share_the_shards_and_give_the_bytes_of_one(
    name: str,
    shards: list[Path],
    encoder: Path,
    vectors: Path,
    codebook: Path,
    codes: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    engine = request.getfixturevalue(name)
    encoded = encode_on(engine, shards, encoder, tmp_path / "vectors")
    assert contents(tmp_path / "vectors") == contents(vectors)
    check_shares(encoded)
    assigned = assign_on(engine, tmp_path / "vectors", codebook, tmp_path / "codes")
    assert contents(tmp_path / "codes") == contents(codes)
    check_shares(assigned)


def test_prism_gives_the_bytes_of_one_process(
    prism: Engine, shards: list[Path], encoder: Path, vectors: Path, codebook: Path, codes: Path, tmp_path: Path
) -> None:
    encode_catalogue(shards, encoder, tmp_path / "vectors", engine=prism)
    assert contents(tmp_path / "vectors") == contents(vectors)
    assign_catalogue(sorted((tmp_path / "vectors").iterdir()), codebook, tmp_path / "codes", engine=prism)
    assert contents(tmp_path / "codes") == contents(codes)


@contextmanager
def killing(out: Path, victim: Callable[[Path], int]) -> Iterator[list[int]]:
    """Kills a process once the job in `out` has finished two of its blocks; yields the pids that were killed."""
    killed: list[int] = []

    def wait() -> None:
        give_up = time.monotonic() + _KILL_WITHIN_S
        while time.monotonic() < give_up and not killed:
            if len(list(out.glob(".job/done-*"))) >= 2:
                killed.append(victim(out))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    thread = threading.Thread(target=wait)
    thread.start()
    yield killed
    thread.join()


def worker(out: Path) -> int:
    """Pid of a process that did a block of the job."""
    return int(next(iter(Worklist(out / ".job").finished().values())).worker.rpartition(":")[2])


def task_manager(out: Path) -> int:
    """Pid of the second TaskManager."""
    return int((ROOT / "infra/flink/.run/taskmanager-2.pid").read_text().split()[0])


def check_killed(
    engine: Engine, victim: Callable[[Path], int], shards: list[Path], encoder: Path, vectors: Path, out: Path
) -> None:
    """Asserts that a job ends with the bytes of one process, though a process is killed while shards are missing."""
    missing: list[int] = []

    def kill(out: Path) -> int:
        missing.append(SHARDS - len(list(out.glob("part-*.parquet"))))
        return victim(out)

    with killing(out, kill) as killed:
        report = encode_on(engine, shards, encoder, out, _LONG_WORK_S)
    assert killed
    assert missing[0] > SHARDS / 3
    assert contents(out) == contents(vectors)
    assert report.shards == SHARDS


def test_a_worker_of_dask_that_is_killed_changes_no_byte(
    dask: Engine, shards: list[Path], encoder: Path, vectors: Path, tmp_path: Path
) -> None:
    check_killed(dask, worker, shards, encoder, vectors, tmp_path / "out")


def _fail(shard: pl.DataFrame) -> pl.DataFrame:
    raise ValueError("this shard cannot be done")


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_a_shard_that_fails_ends_a_job_with_its_name(
    name: str, shards: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    with pytest.raises(RuntimeError, match=r"fail: part-000\d\d.parquet: ValueError: this shard cannot be done"):
        map_shards(_fail, shards, tmp_path, label="fail", engine=engine)


@pytest.fixture
def whole(flink: Engine) -> Iterator[Engine]:
    """Flink, whose TaskManagers are all there again after the test."""
    before = flink.check()
    yield flink
    subprocess.run([ROOT / "infra/flink.sh", "start", "2"], check=True)
    wait_for_slots(flink, before)


def wait_for_slots(flink: Engine, options: list[str]) -> None:
    """Waits until as many task slots are free as an earlier `check` found."""
    give_up = time.monotonic() + _REGISTERS_S
    while True:
        try:
            if flink.check() == options:
                return
        except TesseraError:
            pass
        assert time.monotonic() < give_up, "task slots of the cluster are still taken or lost"
        time.sleep(0.2)


@pytest.mark.parametrize("victim", [worker, task_manager])
def test_a_process_of_flink_that_is_killed_changes_no_byte(
    victim: Callable[[Path], int], whole: Engine, shards: list[Path], encoder: Path, vectors: Path, tmp_path: Path
) -> None:
    check_killed(whole, victim, shards, encoder, vectors, tmp_path / "out")
