"""Training in several processes: the batches of one process, its losses, its rows, and no trace of a killed process."""

import contextlib
import os
import threading
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.device import DeviceError
from features.errors import DatasetError, TrainingError
from features.frame import stored_frame
from features.frame_blocks import BlockShare, held_blocks, stored_blocks, write_blocks
from models.ranker.checkpoint import check_processes
from models.ranker.loading import examples, sighted
from models.ranker.stored import load_ranker
from models.ranker.train import Checkpointing, TrainConfig, Watch, snapshot, train
from models.sharded.launch import Launch, train_in_processes
from models.sharded.messages import LOSSES
from models.sharded.share import own_examples
from models.table.reference import start_range, start_rows
from models.table.row_files import row_files
from tests.build import SMALL_NETWORK, coloured_frame, coloured_schema

FRAME = coloured_frame(events=2_000)
SCHEMA = coloured_schema(FRAME)
CONFIG = TrainConfig(batch=16, max_epochs=2, network=SMALL_NETWORK, device="cpu")


@given(heights=st.lists(st.integers(0, 30), min_size=1, max_size=3), count=st.integers(1, 5))
def test_shares_are_consecutive_and_hold_every_row_once(heights: list[int], count: int) -> None:
    for height in heights:
        ranges = [BlockShare(number, count).of(height) for number in range(count)]
        assert [row for low, high in ranges for row in range(low, high)] == list(range(height))


@given(height=st.integers(5, 60), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_processes_read_each_example_of_a_batch_once_in_batches_of_one_size(
    height: int, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(height)[: rng.integers(1, height + 1)]
    shares = [BlockShare(number, count) for number in range(count)]
    found = [own_examples(share, height, rows) for share in shares]
    assert len({len(own.rows) for own in found}) == 1
    read: dict[int, int] = {}
    for share, own in zip(shares, found, strict=True):
        low, high = share.of(height)
        assert ((own.rows >= 0) & (own.rows < high - low)).all()
        for place, row, weight in zip(own.places, own.rows, own.weights, strict=True):
            if weight:
                assert int(place) not in read
                read[int(place)] = low + int(row)
    assert [read[place] for place in range(len(rows))] == rows.tolist()


@pytest.mark.parametrize(("low", "height"), [(0, 7), (3, 4), (65_535, 3), (70_000, 10)])
def test_a_range_starts_with_the_rows_of_the_whole_table(low: int, height: int) -> None:
    whole, own = torch.empty(70_020, 4), torch.empty(height, 4)
    start_rows(whole, torch.Generator().manual_seed(7))
    start_range(own, torch.Generator().manual_seed(7), low=low)
    assert torch.equal(own, whole[low : low + height])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frame")
    FRAME.users.write_parquet(path / "users.parquet")
    FRAME.items.write_parquet(path / "items.parquet")
    parts = ("train", "validation", "test")
    write_blocks({part: held_blocks(FRAME.part(part), 2) for part in parts}, path)
    return path


def test_the_shares_of_a_stored_block_are_the_block(directory: Path) -> None:
    whole = stored_blocks(directory)["train"]
    shares = [stored_blocks(directory, BlockShare(number, 3))["train"] for number in range(3)]
    for number in range(len(whole)):
        assert pl.concat([share.read(number) for share in shares]).equals(whole.read(number))
        columns = ["label", "user"]
        assert pl.concat([share.read(number, columns) for share in shares]).equals(whole.read(number, columns))
    assert sum(share.height for share in shares) == whole.height


def launch(directory: Path, out: Path, *, watch: bool = False) -> Launch:
    return Launch(directory, out / "ranker", Checkpointing(out / "checkpoint", 0), watch=watch)


@pytest.fixture(scope="module")
def two(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    train_in_processes(SCHEMA, replace(CONFIG, processes=2), launch(directory, out, watch=True))
    return out


def test_two_processes_have_the_losses_and_rows_of_one(directory: Path, two: Path) -> None:
    losses: list[float] = []
    one = train(SCHEMA, stored_frame(directory), CONFIG, watch=Watch(losses.append))
    found = msgspec.json.decode((two / ".checkpoint.processes" / LOSSES).read_bytes(), type=list[float])
    assert len(found) == len(losses) > 100
    np.testing.assert_allclose(found[:10], losses[:10], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found[:100], losses[:100], rtol=0, atol=3e-4)
    assert losses[0] - losses[-1] > 0.1
    schema, trained = load_ranker(two / "ranker", CONFIG)
    assert schema == SCHEMA
    np.testing.assert_allclose(trained.epochs, one.epochs, rtol=0, atol=3e-4)
    np.testing.assert_array_equal(trained.sketch.cells, one.sketch.cells)
    single, several = snapshot(one.ranker), snapshot(trained.ranker)
    for name, value in single.items():
        torch.testing.assert_close(several[name], value, rtol=0, atol=1e-3, msg=name)
    held = [path.stat().st_size for path in row_files(two / "ranker")]
    assert len(held) == 2
    assert max(held) <= 0.6 * 4 * SCHEMA.rows * (SCHEMA.dim + 1)


def test_rows_in_files_score_as_rows_in_memory(two: Path) -> None:
    part = FRAME.part("test")
    batch = sighted(SCHEMA, FRAME, FRAME.blocks("train")).with_events(part).batch(examples(part))
    with torch.no_grad():
        in_files, in_memory = (load_ranker(two / "ranker", CONFIG, trains=trains)[1].ranker(batch) for trains in (0, 1))
    torch.testing.assert_close(in_files, in_memory, rtol=0, atol=1e-6)


def processes() -> dict[int, psutil.Process]:
    """Returns this process's children that train, by their number."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            command = child.cmdline()
            if "models.sharded.rank" in command:
                found[int(command[-2])] = child
    return found


def test_the_processes_listen_at_the_loopback_address_alone(directory: Path, tmp_path: Path) -> None:
    listening, ended = set(), threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for process in (psutil.Process(), *processes().values()):
                with contextlib.suppress(psutil.Error):
                    for one in process.net_connections("inet"):
                        if one.status == psutil.CONN_LISTEN:
                            listening.add((process.pid, one.laddr[0]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train_in_processes(SCHEMA, replace(CONFIG, processes=2), launch(directory, tmp_path))
    finally:
        ended.set()
        watcher.join()
    assert len({pid for pid, _ in listening} - {os.getpid()}) == 2
    assert {host for _, host in listening} <= {"127.0.0.1", "::1"}


def test_a_killed_process_is_named_and_the_training_goes_on_to_the_same_bits(
    directory: Path, two: Path, tmp_path: Path
) -> None:
    places, ended = launch(directory, tmp_path), threading.Event()

    def kill() -> None:
        while not ended.wait(0.002):
            if places.checkpointing.path.is_dir():
                processes()[1].kill()
                return

    killer = threading.Thread(target=kill)
    killer.start()
    config = replace(CONFIG, processes=2)
    try:
        with pytest.raises(TrainingError, match=r"process 1 of 2 \(pid \d+\) was killed by SIGKILL; .* checkpoint"):
            train_in_processes(SCHEMA, config, places)
    finally:
        ended.set()
        killer.join()
    assert not places.model.exists()
    assert processes() == {}
    with pytest.raises(TrainingError, match=r"has 2 processes, this command 3.*--processes 2"):
        train_in_processes(SCHEMA, replace(CONFIG, processes=3), places)
    with pytest.raises(TrainingError, match=r"has 2 processes, this command 1"):
        check_processes(places.checkpointing.path, 1)
    train_in_processes(SCHEMA, config, places)
    expected = {path.relative_to(two): path.read_bytes() for path in (two / "ranker").rglob("*") if path.is_file()}
    assert len(expected) == 6
    assert {path.relative_to(tmp_path): path.read_bytes() for path in places.model.rglob("*") if path.is_file()} == (
        expected
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranker"]


def test_what_several_processes_cannot_do_is_refused_by_name(directory: Path, tmp_path: Path) -> None:
    places = launch(directory, tmp_path)
    smallest = min(stored_blocks(directory)["validation"].heights)
    many = replace(CONFIG, processes=smallest + 1)
    with pytest.raises(DatasetError, match=rf"processes = {smallest + 1}: .* use at most {smallest}"):
        train_in_processes(SCHEMA, many, places)
    with pytest.raises(TrainingError, match="6 rows leave process 3 without a row"):
        train_in_processes(replace(SCHEMA, rows=6), replace(CONFIG, processes=4), places)
    with pytest.raises(DeviceError, match='use device = "cpu"'):
        train_in_processes(SCHEMA, replace(CONFIG, processes=2, device="cuda"), places)
    with pytest.raises(TrainingError, match=r"training\.precision"):
        train_in_processes(SCHEMA, replace(CONFIG, processes=2, precision="bfloat16"), places)
    assert list(tmp_path.iterdir()) == []
