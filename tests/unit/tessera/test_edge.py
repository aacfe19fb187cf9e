"""Errors become one line with a remedy, and no text of a user is a markup."""

import ast
import errno
import os
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from safetensors.numpy import save_file

import tessera.cli.main
from features.errors import StoreError
from features.fault import explain
from tests.unit.test_architecture import ROOT, parse


def raised(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


class Wrapped(Exception):
    """As SQLAlchemy keeps the driver's error."""

    def __init__(self, orig: Exception) -> None:
        super().__init__(f"({type(orig).__name__}) {orig}\n[SQL: …]\n(Background on this error at: …)")
        self.orig = orig


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/out/part")
CASES: dict[str, tuple[BaseException, str, str]] = {
    "full": (FULL, "/data/out/part: No space left on device", "make room"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", Path("ro")), "ro: Read-only", "TESSERA_HOME"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied", "permissions"),
    "wrapped": (raised(RuntimeError("stage"), FULL), "/data/out/part: No space", "make room"),
    "of rust": (Exception("I/O error: No space left on device (os error 28)"), "No space left", "make room"),
    "of Beam": (
        RuntimeError("OSError: [Errno 28] No space left on device [while running 'x']"),
        "No space",
        "make room",
    ),
    "locked": (sqlite3.OperationalError("database is locked"), "database is locked", "another process"),
    "of SQLAlchemy": (Wrapped(sqlite3.OperationalError("database or disk is full")), "disk is full", "make room"),
    "damaged": (sqlite3.DatabaseError("file is not a database"), "not a database", "restore"),
    "memory": (MemoryError(), "Cannot allocate memory", "free memory"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fault_of_the_machine_is_one_line_with_place_and_remedy(case: str) -> None:
    error, fault, remedy = CASES[case]
    said = explain(error)
    assert said is not None
    assert fault in said
    assert remedy in said.partition(";")[2]
    assert "\n" not in said


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("disk is full"), StoreError("os error 28")])
def test_another_error_is_not_explained(error: Exception) -> None:
    assert explain(error) is None


def test_what_libraries_raise_on_a_full_disk_is_recognised() -> None:
    full = Path("/dev/full")
    writers: list[Callable[[], object]] = [
        lambda: full.write_bytes(b"x"),
        lambda: pl.DataFrame({"x": [1]}).write_csv(full),
        lambda: save_file({"x": pl.Series([1]).to_numpy()}, "/proc/version"),
    ]
    for write in writers:
        with pytest.raises(Exception) as caught:
            write()
        assert explain(caught.value) is not None, caught.value


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StoreError("[/r/x] [bold]: gone"), 2, "error: [/r/x] [bold]: gone\n"),
        (FULL, 2, "error: /data/out/part: No space left on device; make room"),
        (RuntimeError("a\nb [/red]"), 1, "error: unexpected RuntimeError: a b [/red]; run again as `tessera --verbose"),
        (
            pl.exceptions.PanicException("index out of bounds"),
            1,
            "error: unexpected PanicException: index out of bounds",
        ),
    ],
)
def test_every_error_is_one_line_and_a_status(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(tessera.cli.main, "app", fails)
    monkeypatch.setattr(sys, "argv", ["tessera", "status"])
    with pytest.raises(SystemExit) as ended:
        tessera.cli.main.main()
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert told.count("\n") == 1


def test_the_traceback_is_there_for_those_who_ask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr(tessera.cli.main, "app", fails)
    monkeypatch.setattr(sys, "argv", ["tessera", "--verbose", "status"])
    with pytest.raises(SystemExit):
        tessera.cli.main.main()
    assert "Traceback" in capsys.readouterr().err


PRINTING = [path for path in (ROOT / "tessera").rglob("*.py") if "console" not in path.parts]
_STYLE = re.compile(r"\[/?(bold|dim|italic|red|green|yellow|cyan|blue)\]|\[/\]")


def test_no_text_is_a_markup_of_rich() -> None:
    wrong = []
    for path in [*PRINTING, *(ROOT / "features").rglob("*.py")]:
        for node in ast.walk(parse(path.relative_to(ROOT).as_posix())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            imports = isinstance(node, ast.ImportFrom) and node.module == "rich.markup"
            console = isinstance(node, ast.Call) and ast.unparse(node.func) == "Console" and path.name != "terminal.py"
            # The pages of the console share the name, and a quiet console prints nothing.
            console = console and "quiet=True" not in ast.unparse(node)
            if _STYLE.search(text) or imports or (console and path.name != "server.py"):
                wrong.append(f"{path}: {ast.unparse(node)}")
    assert wrong == []
    assert _STYLE.search("[red]error[/red]")
