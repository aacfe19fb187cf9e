"""Rows of a running benchmark, kept on disk as they are measured.

A benchmark that fails after an hour has lost nothing: each row lies in a file of JSON lines by then, below a line that
names the benchmark and the version of its code. The file is never read back, and each run appends to it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import msgspec

Row = dict[str, Any]


class MeasuredRows(list[Row]):
    """Rows that are written to a file, if there is one, when they are added."""

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = path

    def append(self, row: Row) -> None:
        """Adds a row and writes it."""
        self.extend([row])

    def extend(self, rows: Iterable[Row]) -> None:
        """Adds rows and writes them."""
        for row in rows:
            super().append(row)
            if self._path is not None:
                _write(self._path, row)

    def __iadd__(self, rows: Iterable[Row]) -> Self:  # type: ignore[override,misc]
        self.extend(rows)
        return self


class KeptRows:
    """All rows of one run of a benchmark.

    Attributes:
        path: of the file.
        rows: measured so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = MeasuredRows(path)


_KEPT: ContextVar[KeptRows | None] = ContextVar("kept rows", default=None)


@contextlib.contextmanager
def keep_rows(path: Path, header: Mapping[str, Any]) -> Iterator[KeptRows]:
    """Keeps the rows that a benchmark measures inside the block.

    Args:
        path: file of JSON lines to append to; made with its directories where absent.
        header: line above the rows, such as the benchmark's name and the version of its code.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, header)
    kept = KeptRows(path)
    token = _KEPT.set(kept)
    try:
        yield kept
    finally:
        _KEPT.reset(token)


def measured_rows() -> MeasuredRows:
    """Returns the list to which a benchmark adds its rows.

    Inside `keep_rows` every row is written to the file at once, and the list is `KeptRows.rows`. A benchmark that is
    called as a function, without `keep_rows`, gets a list of its own and no file.
    """
    kept = _KEPT.get()
    return kept.rows if kept is not None else MeasuredRows(None)


def _write(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
