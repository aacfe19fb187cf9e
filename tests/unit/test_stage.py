"""Stages finish whole or not at all, and are not done twice."""

from pathlib import Path

import pytest
from rich.console import Console

from tessera.stage import Advance, Stages, key_of


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
    return {path.name for path in directory.iterdir()}


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
