"""Files and directories appear whole, and what gives them their names is flushed too."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from features.durable import flush_tree, make_directory, replace_directory, write_directory, write_file
from features.errors import TesseraError
from serving.api.keys import KeyFile
from tessera.pipeline.stage import Stages


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every path that fsync was called on, by the name it had then."""
    found: list[Path] = []
    real = os.fsync

    def fsync(file: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return found


def fill(directory: Path) -> None:
    (directory / "below").mkdir()
    (directory / "below" / "data.txt").write_text("data")


WRITERS: dict[str, Callable[[Path], object]] = {
    "file": lambda place: write_file(place / "made", b"data"),
    "directory": lambda place: write_directory(place / "made", fill),
    "new parents": lambda place: make_directory(place / "made" / "deep"),
    "key file": lambda place: KeyFile(place / "keys.json").add("bob", ["read"]),
    "stage": lambda place: Stages(place, Console(quiet=True)).run("made", "key", lambda stage, _: fill(stage)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_directory_that_holds_a_new_name_is_flushed(tmp_path: Path, flushed: list[Path], writer: str) -> None:
    WRITERS[writer](tmp_path)
    assert flushed[-1] == tmp_path or tmp_path in flushed


def test_everything_inside_a_directory_is_flushed_before_its_name(tmp_path: Path, flushed: list[Path]) -> None:
    write_directory(tmp_path / "made", fill)
    inside = [path.relative_to(tmp_path) for path in flushed if path != tmp_path]
    assert [path.parts[1:] for path in inside] == [("below", "data.txt"), ("below",), ()]
    assert flushed[-1] == tmp_path


def test_a_failed_write_leaves_what_was_there_and_nothing_aside(tmp_path: Path) -> None:
    write_file(tmp_path / "kept", b"old")

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        write_file(tmp_path / "kept", fails)
    assert caught.value.filename == str(tmp_path / "kept")
    with pytest.raises(OSError, match="No space"):
        write_directory(tmp_path / "new", fails_in(fails))
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def fails_in(fails: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda directory: fails(directory / "file")


def test_the_permissions_are_those_asked_for(tmp_path: Path) -> None:
    write_file(tmp_path / "secret", b"", mode=0o600)
    write_file(tmp_path / "filled", lambda path: None, mode=0o600)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("secret", "filled")} == {0o600}


def test_a_directory_is_never_written_over(tmp_path: Path) -> None:
    write_directory(tmp_path / "made", fill)
    with pytest.raises(TesseraError, match="made exists already"):
        write_directory(tmp_path / "made", fill)


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    write_directory(tmp_path / "made", fill)
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "new.txt").write_text("new")
    replace_directory(tmp_path / "next", tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new.txt"]


def test_what_a_stopped_write_left_aside_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".encoder.12.tmp").mkdir()
    (tmp_path / ".part-00000.parquet.12.tmp").write_text("half")
    (tmp_path / "part-00000.parquet").write_text("whole")
    flush_tree(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]
