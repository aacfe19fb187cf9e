"""The Beam job gives the same bytes whatever runs it, and does no shard twice."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest

from features.content import lsa
from features.content.kinds import load_encoder
from features.durable import write_directory
from features.errors import TesseraError
from features.jobs import beam as beam_job
from features.jobs.beam import ShardFunction, map_shards
from features.jobs.dask_cluster import dask_cluster
from features.jobs.encode import encode_catalogue
from features.jobs.engine import Engine
from features.jobs.shard import Sifted, read_shards, write_parquet, write_shards
from features.jobs.worklist import MOST_BLOCKS, Block, JobReport, Worklist
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import rqvae_fit
from tests.build import SMALL_CODEBOOK
from tests.servers import until

WORDS = ("space", "ocean", "robot", "love", "murder", "kitchen", "war", "music")
TEXTS = [" ".join(WORDS[number * step % 8] for step in (1, 3, 5)) + f" tale{number % 11}" for number in range(90)]
ITEMS = pl.DataFrame({"item_id": [f"i{number}" for number in range(len(TEXTS))], "text": TEXTS}).with_columns(
    text=pl.when(pl.col("item_id") == "i7").then(pl.lit("")).otherwise("text")
)
ROWS = 20
_WORK_S = 0.25


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(ITEMS, tmp_path_factory.mktemp("texts"), rows=ROWS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "encoder"
    write_directory(directory, lsa.fit(TEXTS, dim=6, seed=0).save)
    return directory


@pytest.fixture(scope="module")
def one_worker(shards: list[Path], encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    encode_catalogue(shards, encoder, out)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_shards_hold_the_vectors_of_their_items_in_order(one_worker: Path, encoder: Path, shards: list[Path]) -> None:
    found = read_shards(one_worker)
    assert found["item_id"].to_list() == ITEMS["item_id"].to_list()
    expected = load_encoder(encoder).encode(ITEMS["text"].to_list())
    assert found["vector"].to_numpy().tobytes() == expected.tobytes()
    assert list(contents(one_worker)) == [path.name for path in shards]
    assert not found["vector"][7].to_numpy().any()


@pytest.mark.parametrize(
    ("runner", "options"),
    [
        pytest.param("DirectRunner", ("--direct_num_workers=2", "--direct_running_mode=multi_threading"), id="threads"),
        pytest.param(
            "DirectRunner",
            ("--direct_num_workers=2", "--direct_running_mode=multi_processing"),
            marks=pytest.mark.slow,
            id="processes",
        ),
        pytest.param("DaskRunner", (), marks=pytest.mark.slow, id="dask"),
    ],
)
def test_every_shard_has_the_same_bytes_whatever_runs_the_job(
    shards: list[Path], encoder: Path, one_worker: Path, tmp_path: Path, runner: str, options: tuple[str, ...]
) -> None:
    encode_catalogue(shards, encoder, tmp_path, engine=Engine(runner, options=options))
    assert contents(tmp_path) == contents(one_worker)


def _signed(shard: pl.DataFrame) -> pl.DataFrame:
    began = time.monotonic()
    time.sleep(_WORK_S)
    worker = os.getpid() * 10_000_000 + threading.get_ident() % 10_000_000
    return shard.with_columns(process=os.getpid(), worker=worker, began=began, ended=time.monotonic())


@pytest.mark.parametrize(
    ("runner", "options", "counted"),
    [
        pytest.param(
            "DirectRunner", ("--direct_num_workers=2", "--direct_running_mode=multi_threading"), "worker", id="threads"
        ),
        pytest.param(
            "DirectRunner",
            ("--direct_num_workers=2", "--direct_running_mode=multi_processing"),
            "process",
            marks=pytest.mark.slow,
            id="processes",
        ),
        pytest.param("DaskRunner", (), "process", marks=pytest.mark.slow, id="dask"),
    ],
)
def test_shards_are_spread_over_the_workers(
    tmp_path: Path, runner: str, options: tuple[str, ...], counted: str
) -> None:
    paths = write_shards(pl.DataFrame({"number": range(8)}), tmp_path / "in", rows=1)
    map_shards(_signed, paths, tmp_path / "out", label="signed", engine=Engine(runner, options=options))
    found = read_shards(tmp_path / "out")
    assert found["number"].to_list() == list(range(8))
    # How even the shares are depends on what else the machine does.
    assert found[counted].n_unique() >= 2
    if counted == "worker":
        # Processes take turns where there are more of them than processors; what sleeps in a thread does not.
        spans = found.sort("began").select("began", before=pl.col("ended").shift())
        assert (spans["began"] < spans["before"]).any()


def test_relative_paths_mean_the_same_to_every_worker(
    shards: list[Path], encoder: Path, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    near = [Path(os.path.relpath(shard)) for shard in shards]
    elsewhere = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
    # A worker of a cluster has a working directory of its own; here the only one changes while the job starts.
    encode_catalogue(
        near,
        Path(os.path.relpath(encoder)),
        Path("out"),
        engine=Engine(options=elsewhere),
        progress=lambda done, total: os.chdir("/"),
    )
    assert contents(tmp_path / "out") == contents(one_worker)


def test_the_report_counts_rows_and_the_shards_of_each_worker(
    shards: list[Path], encoder: Path, tmp_path: Path
) -> None:
    first = encode_catalogue(shards, encoder, tmp_path)
    assert first == JobReport(5, 90, 90, 0, {f"{socket.gethostname()}:{os.getpid()}": 5})
    # Shards that are in place count as before.
    (tmp_path / shards[2].name).unlink()
    assert encode_catalogue(shards, encoder, tmp_path) == first


def _sift(shard: pl.DataFrame) -> Sifted:
    empty = pl.col("text") == ""
    return Sifted(shard.filter(~empty), shard.filter(empty).select("item_id", reason=pl.lit("no text")))


def test_rejected_rows_are_kept_with_their_reason_and_counted(shards: list[Path], tmp_path: Path) -> None:
    for _ in range(2):
        found = map_shards(_sift, shards, tmp_path, label="sift")
        assert (found.rows_in, found.rows_out, found.rejected) == (90, 89, 1)
    assert read_shards(tmp_path / "rejected").rows() == [("i7", "no text")]
    assert "i7" not in read_shards(tmp_path)["item_id"]


def _lose(shard: pl.DataFrame) -> pl.DataFrame:
    return shard.head(19)


def _lose_and_say(shard: pl.DataFrame) -> Sifted:
    return Sifted(shard.head(18), shard.tail(1))


@pytest.mark.parametrize(("function", "keeps_rows"), [(_lose, True), (_lose_and_say, False)])
def test_a_row_that_is_neither_kept_nor_rejected_is_an_error(
    shards: list[Path], tmp_path: Path, function: ShardFunction, keeps_rows: bool
) -> None:
    with pytest.raises(RuntimeError, match=r"lose: part-0000\d.parquet: ValueError: 20 rows became 1[89] and [01] "):
        map_shards(function, shards[:2], tmp_path, label="lose", keeps_rows=keeps_rows)
    assert contents(tmp_path) == {}


def test_a_file_system_that_fails_for_a_moment_is_tried_again(
    shards: list[Path], encoder: Path, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beam_job, "_PAUSE_S", 0.001)
    failed: list[Path] = []

    def fails_twice(frame: pl.DataFrame, path: Path) -> None:
        failed.append(path)
        if failed.count(path) < 3:
            raise OSError(5, "Input/output error")
        write_parquet(frame, path)

    monkeypatch.setattr(beam_job, "write_parquet", fails_twice)
    encode_catalogue(shards, encoder, tmp_path)
    assert contents(tmp_path) == contents(one_worker)
    assert len(failed) == 3 * len(shards)


def test_an_engine_that_fails_is_asked_again_for_what_is_missing_while_it_gets_on(
    shards: list[Path], encoder: Path, one_worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, asked = beam_job._submit, []

    def dies(mapped: object, blocks: Sequence[Block], *rest: Any) -> None:
        asked.append(len(blocks))
        submit(mapped, blocks[: 0 if len(asked) == 4 else 2], *rest)
        raise RuntimeError("a worker was killed")

    monkeypatch.setattr(beam_job, "_submit", dies)
    encode_catalogue(shards, encoder, tmp_path)
    assert asked == [5, 3, 1]
    assert contents(tmp_path) == contents(one_worker)
    with pytest.raises(RuntimeError, match="a worker was killed"):
        encode_catalogue(shards, encoder, tmp_path / "again")
    assert asked == [5, 3, 1, 5]


class _Submitted:
    cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_only_a_job_that_is_deployed_waits_in_vain_for_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployed: list[bool] = []
    monkeypatch.setattr(Engine, "deployed", lambda self, job: bool(deployed))
    monkeypatch.setattr(Engine, "cancel", lambda self, job: None)
    work, submitted = Worklist(tmp_path / "work"), _Submitted()
    work.create([tmp_path / "one"])
    engine = Engine("flink", "127.0.0.1:1", starts_s=0.5)
    watch = beam_job._Watch(work, 1, lambda done, total: None, engine, "job")
    with watch:
        watch.submitted(submitted)
        time.sleep(1)
        assert not submitted.cancelled
        deployed.append(True)
        until(lambda: submitted.cancelled)
    with pytest.raises(TesseraError, match=r"no worker began within 0 seconds"):
        watch.explain("label", RuntimeError("cancelled"))


_START = """
import os, sys, time
from pathlib import Path
directory = Path(sys.argv[1])
shards = [directory / f"part-{number:06d}.parquet" for number in range(int(sys.argv[2]))]
made = time.process_time()
from features.jobs import beam as beam_job
from features.jobs.beam import ShardFunction, map_shards

def first(shard):
    print(time.process_time() - made, flush=True)
    os._exit(0)

map_shards(first, shards, directory / "out", label="first")
"""


def test_a_job_of_many_shards_starts_as_fast_as_a_job_of_few(tmp_path: Path) -> None:
    pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "one")
    for number in range(MOST_BLOCKS):
        os.link(tmp_path / "one", tmp_path / f"part-{number:06d}.parquet")

    def start_s(count: int) -> float:
        command = [sys.executable, "-W", "ignore", "-c", _START, str(tmp_path), str(count)]
        return float(subprocess.check_output(command, stderr=subprocess.DEVNULL))

    # Seconds of the processor in turns, least of three. What 100,000 shards add is their names in a list.
    few, many = zip(*((start_s(100), start_s(100_000)) for _ in range(3)), strict=True)
    assert min(many) < 1.3 * min(few)


def test_a_worker_that_encodes_loads_no_torch_and_stays_small(shards: list[Path], encoder: Path) -> None:
    script = (
        "import sys, polars as pl; from apache_beam.runners.worker import sdk_worker;"
        "from features.jobs.beam import _DoBlock; from features.jobs.encode import encode_shard;"
        f"encode_shard(pl.read_parquet({str(shards[0])!r}), encoder={str(encoder)!r});"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(int('torch' in sys.modules), int(peak.split()[1]) // 1024)"
    )
    said = subprocess.check_output([sys.executable, "-W", "ignore", "-c", script], stderr=subprocess.DEVNULL)
    torch, megabytes = map(int, said.split())
    assert not torch
    assert megabytes < 450


def test_a_finished_shard_is_not_done_again(
    shards: list[Path], encoder: Path, one_worker: Path, tmp_path: Path
) -> None:
    done = tmp_path / shards[1].name
    done.write_bytes((one_worker / done.name).read_bytes())
    before = (done.stat().st_ino, done.stat().st_mtime_ns)
    seen: list[tuple[int, int]] = []
    encode_catalogue(shards, encoder, tmp_path, progress=lambda *at: seen.append(at))
    assert (done.stat().st_ino, done.stat().st_mtime_ns) == before
    assert contents(tmp_path) == contents(one_worker)
    assert seen[-1] == (len(shards), len(shards))


def test_another_encoder_at_the_same_place_is_the_one_that_is_used(
    shards: list[Path], encoder: Path, tmp_path: Path
) -> None:
    place = tmp_path / "encoder"
    for number, dim in enumerate((5, 4)):
        if place.exists():
            place.rename(tmp_path / "before")
        write_directory(place, lsa.fit(TEXTS, dim=dim, seed=0).save)
        encode_catalogue(shards[:1], place, tmp_path / f"out{number}")
        assert read_shards(tmp_path / f"out{number}")["vector"].dtype == pl.Array(pl.Float32, dim)


def test_codes_are_assigned_shard_by_shard_as_all_at_once(one_worker: Path, tmp_path: Path) -> None:
    vectors = read_shards(one_worker)["vector"].to_numpy()
    codebook = rqvae_fit.fit(vectors, SMALL_CODEBOOK)
    write_directory(tmp_path / "codebook", codebook.save)
    assign_catalogue(sorted(one_worker.iterdir()), tmp_path / "codebook", tmp_path / "codes")
    found = read_shards(tmp_path / "codes")
    np.testing.assert_array_equal(found["codes"].to_numpy(), codebook.encode(vectors))
    assert found.columns == ["item_id", "vector", "codes"]


def _fail(shard: pl.DataFrame) -> pl.DataFrame:
    if "i25" in shard["item_id"]:
        raise ValueError("this shard cannot be done")
    return shard


def test_a_shard_that_fails_fails_the_job_and_leaves_no_half_of_itself(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="this shard cannot be done"):
        map_shards(_fail, shards, tmp_path, label="fail")
    assert shards[1].name not in contents(tmp_path)
    assert all(name.startswith("part-") for name in contents(tmp_path))


def test_an_unknown_runner_is_refused_by_name_before_anything_is_made(
    shards: list[Path], encoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(TesseraError, match=r"'SlowRunner' is unknown; choose one of: direct, dask, .*flink"):
        Engine("SlowRunner")
    assert not (tmp_path / "out").exists()


def test_a_catalogue_is_cut_into_shards_in_its_order(tmp_path: Path) -> None:
    paths = write_shards(ITEMS, tmp_path, rows=ROWS)
    assert [pl.read_parquet(path).height for path in paths] == [20, 20, 20, 20, 10]
    assert read_shards(tmp_path).equals(ITEMS)


def test_shards_are_cut_by_bytes_and_a_finished_cut_is_kept(tmp_path: Path) -> None:
    frame = pl.DataFrame({"text": ["x" * 100] * 5 + ["y" * 900] + ["", "z"], "tags": [["ab"] * 20, None] * 4})
    paths = write_shards(frame, tmp_path, rows=4, size_bytes=400)
    assert [pl.read_parquet(path).height for path in paths] == [2, 2, 1, 1, 2]
    assert read_shards(tmp_path).equals(frame)
    before = [path.stat().st_ino for path in paths]
    assert write_shards(frame, tmp_path, rows=4, size_bytes=400) == paths
    assert [path.stat().st_ino for path in paths] == before
    (tmp_path / "cut").unlink()
    paths[3].write_bytes(b"half a file")
    write_shards(frame, tmp_path, rows=4, size_bytes=400)
    assert read_shards(tmp_path).equals(frame)


def test_an_empty_catalogue_is_one_empty_shard(encoder: Path, tmp_path: Path) -> None:
    paths = write_shards(ITEMS.head(0), tmp_path / "texts", rows=ROWS)
    encode_catalogue(paths, encoder, tmp_path / "out")
    found = read_shards(tmp_path / "out")
    assert found.height == 0
    assert found["vector"].dtype == pl.Array(pl.Float32, load_encoder(encoder).dim)


@pytest.mark.slow
def test_a_local_dask_cluster_takes_free_ports_of_this_machine_alone() -> None:
    with dask_cluster(Engine("dask")) as first, dask_cluster(Engine("dask")) as second:
        assert first != second
        listening = {
            connection.laddr
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert {host for host, _ in listening} == {"127.0.0.1"}
    assert 8787 not in {port for _, port in listening}
