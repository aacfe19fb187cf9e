"""Stages finish whole or not at all, and are not done twice."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from features.durable import recover_directory
from features.errors import DatasetError, TesseraError
from features.storage.location import Remote
from tessera.cli.run import earlier_run
from tessera.pipeline.made_of import key_of
from tessera.pipeline.stage import Advance, Stages, finished_key
from tessera.settings import Settings


class Work:
    """Writes one file at a time, counts what it did, and stops where it is told to."""

    def __init__(self, files: int = 3, stop_before: int | None = None) -> None:
        self.files = files
        self.stop_before = stop_before
        self.written: list[int] = []

    def __call__(self, directory: Path, advance: Advance) -> None:
        for number in range(self.files):
            path = directory / f"{number}.txt"
            if path.exists():
                continue
            if number == self.stop_before:
                raise RuntimeError("stopped")
            path.write_text(f"{number}")
            self.written.append(number)
            advance(number + 1, self.files)


def stages(directory: Path) -> Stages:
    return Stages(directory, Console(quiet=True))


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.name != ".run.lock"}


def test_a_finished_stage_is_not_done_again(tmp_path: Path) -> None:
    work = Work()
    first = stages(tmp_path).run("encode", "key", work)
    later = stages(tmp_path)
    assert later.run("encode", "key", work) == first == tmp_path / "encode"
    assert work.written == [0, 1, 2]
    assert "encode" not in later.executed
    assert names(tmp_path) == {"encode"}
    assert names(first) == {"0.txt", "1.txt", "2.txt", "stage.json"}


def test_a_stage_of_another_key_replaces_what_was_there(tmp_path: Path) -> None:
    done = stages(tmp_path)
    place = done.run("encode", "one", Work())
    done.run("encode", "two", Work(files=1))
    assert names(place) == {"0.txt", "stage.json"}
    assert "encode" in done.executed
    back = Work()
    done.run("encode", "one", back)
    assert back.written == [0, 1, 2]


def test_a_stopped_stage_is_not_in_place_and_goes_on_from_what_it_had(tmp_path: Path) -> None:
    run = stages(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        run.run("encode", "key", Work(stop_before=2))
    assert names(tmp_path) == {".encode.partial"}
    assert "encode" not in run.executed
    resumed = Work()
    place = stages(tmp_path).run("encode", "key", resumed)
    assert resumed.written == [2]
    assert names(tmp_path) == {"encode"}
    assert names(place) == {"0.txt", "1.txt", "2.txt", "stage.json"}


def test_what_a_stopped_stage_had_is_no_use_under_another_key(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        stages(tmp_path).run("encode", "one", Work(stop_before=2))
    work = Work(files=1)
    place = stages(tmp_path).run("encode", "two", work)
    assert work.written == [0]
    assert names(place) == {"0.txt", "stage.json"}


def test_a_stop_leaves_the_finished_stage_of_the_key_before(tmp_path: Path) -> None:
    place = stages(tmp_path).run("encode", "one", Work())
    with pytest.raises(RuntimeError):
        stages(tmp_path).run("encode", "two", Work(stop_before=1))
    assert names(place) == {"0.txt", "1.txt", "2.txt", "stage.json"}
    untouched = Work()
    stages(tmp_path).run("encode", "one", untouched)
    assert untouched.written == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff"])
def test_a_stage_whose_key_cannot_be_read_is_done_again(tmp_path: Path, damage: bytes) -> None:
    place = stages(tmp_path).run("encode", "key", Work())
    (place / "stage.json").write_bytes(damage)
    work = Work()
    stages(tmp_path).run("encode", "key", work)
    assert work.written == [0, 1, 2]


def test_stages_of_one_run_stand_side_by_side(tmp_path: Path) -> None:
    run = stages(tmp_path / "deep" / "out")
    run.run("encode", "a", Work())
    run.run("assign", "b", Work())
    assert list(run.executed) == ["encode", "assign"]
    assert names(tmp_path / "deep" / "out") == {"encode", "assign"}


def test_a_key_is_decided_by_its_parts_and_not_by_the_order_of_names() -> None:
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    different = [key_of("a", 1), key_of("a", "1"), key_of("a"), key_of(("a", 1)), key_of(1, "a"), key_of("a", None)]
    assert len(set(different)) == len(different)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "1.txt is missing": lambda stage: (stage / "1.txt").unlink(),
    "1.txt was altered": lambda stage: (stage / "1.txt").write_bytes(b""),
    "4.txt is not of this stage": lambda stage: (stage / "4.txt").write_text("4"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_stage_that_was_damaged_is_named_and_done_again(tmp_path: Path, damage: str) -> None:
    place = stages(tmp_path).run("encode", "key", Work())
    DAMAGES[damage](place)
    with pytest.raises(DatasetError, match=damage):
        finished_key(place)
    said, work = io.StringIO(), Work()
    Stages(tmp_path, Console(file=said)).run("encode", "key", work)
    assert damage in said.getvalue()
    assert work.written == [0, 1, 2]
    assert names(place) == {"0.txt", "1.txt", "2.txt", "stage.json"}
    assert finished_key(place) == "key"


def test_a_stage_of_a_release_that_recorded_no_files_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "encode").mkdir()
    (tmp_path / "encode" / "stage.json").write_text('{"key": "old"}')
    assert finished_key(tmp_path / "encode") == "old"
    with pytest.raises(DatasetError, match="assign is missing"):
        finished_key(tmp_path / "assign")


def test_a_second_run_into_one_directory_is_refused_and_takes_nothing(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow(directory: Path, advance: Advance) -> None:
        (directory / "one.txt").write_text("one")
        begun.set()
        assert go_on.wait(30)

    first = threading.Thread(target=lambda: stages(tmp_path).run("encode", "one", slow))
    first.start()
    assert begun.wait(30)
    second = Work()
    with pytest.raises(TesseraError, match=f"in use by another process .pid {os.getpid()}"):
        stages(tmp_path).run("encode", "two", second)
    go_on.set()
    first.join()
    assert second.written == []
    assert names(tmp_path / "encode") == {"one.txt", "stage.json"}


def test_a_run_keeps_others_out_between_its_stages(tmp_path: Path) -> None:
    run = stages(tmp_path)
    with run.held():
        run.run("encode", "a", Work())
        with pytest.raises(TesseraError, match="in use"):
            stages(tmp_path).run("assign", "b", Work())
    stages(tmp_path).run("assign", "b", Work())
    assert names(tmp_path) == {"encode", "assign"}


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_stop_while_a_stage_is_replaced_loses_neither(tmp_path: Path, new_is_there: bool) -> None:
    place = stages(tmp_path).run("encode", "one", Work())
    place.rename(tmp_path / ".encode.old")
    if new_is_there:
        place.mkdir()
    recover_directory(place)
    assert names(tmp_path) == {"encode"}
    assert names(place) == (set() if new_is_there else {"0.txt", "1.txt", "2.txt", "stage.json"})


class OneInput:
    """One file that a stage reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stamps = self._now()

    def _now(self) -> list[int]:
        return [self.path.stat().st_mtime_ns, self.path.stat().st_ino]

    def check(self) -> None:
        if self._now() != self.stamps:
            raise TesseraError(f"{self.path} changed")


def test_an_input_that_changes_meanwhile_leaves_no_stage_and_no_half_of_it(tmp_path: Path) -> None:
    path, good = tmp_path / "events.csv", tmp_path / "good.csv"
    path.write_text("good")
    run = stages(tmp_path / "out")

    def reads_another(directory: Path, advance: Advance) -> None:
        path.rename(good)
        path.write_text("bad")
        (directory / "read.txt").write_text(path.read_text())

    with pytest.raises(TesseraError, match=r"events\.csv changed"):
        run.run("encode", "key", reads_another, inputs=OneInput(path))
    assert names(tmp_path / "out") == set()


def test_what_a_stopped_stage_made_of_an_input_put_back_since_is_no_use(tmp_path: Path) -> None:
    path, good = tmp_path / "events.csv", tmp_path / "good.csv"
    path.write_text("good")
    run = stages(tmp_path / "out")

    def killed(directory: Path, advance: Advance) -> None:
        path.rename(good)
        path.write_text("bad")
        (directory / "0.txt").write_text(path.read_text())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run("encode", "key", killed, inputs=OneInput(path))
    path.write_bytes(good.read_bytes())
    place = run.run("encode", "key", Work(), inputs=OneInput(path))
    assert (place / "0.txt").read_text() == "0"


def test_stages_of_a_run_at_a_store_are_fetched_for_a_warm_start(tmp_path: Path) -> None:
    address = Remote(f"memory://{tmp_path.name}/run")
    done = Stages(tmp_path / "first", Console(quiet=True), address)
    done.run("encode", "one", Work())
    done.run("train", "two", Work(files=1))
    settings = Settings(home=tmp_path / "home")
    found = earlier_run(settings, str(address), "memory://other/run")
    assert found is not None
    assert (finished_key(found / "encode"), finished_key(found / "train")) == ("one", "two")
    assert names(found / "encode") == {"0.txt", "1.txt", "2.txt", "stage.json"}
    # A later run at the address is fetched again.
    Stages(tmp_path / "second", Console(quiet=True), address).run("train", "three", Work())
    assert earlier_run(settings, str(address), "out") == found
    assert finished_key(found / "train") == "three"
    assert earlier_run(settings, str(tmp_path), "out") == tmp_path
    assert earlier_run(settings, None, "out") is None
    with pytest.raises(DatasetError, match=f"^--warm-start {address} is this run's own --out"):
        earlier_run(settings, str(address), str(address))
    with pytest.raises(DatasetError, match=r"^memory://none: the store has no finished stage there"):
        earlier_run(settings, "memory://none", "out")
