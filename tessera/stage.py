"""Stages that finish whole or not at all, and are not done twice.

A stage's output is a directory that appears by a rename when it is complete. Its key is a hash of everything that
decides it, the keys of the stages before it included: the same key is not done again, another key replaces it.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int, int], None]
_KEY = "stage.json"


class _SpeedColumn(ProgressColumn):
    """How many a second, of late."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed or 0:,.0f} {self._unit}/s", style="progress.data.speed")


class Stages:
    """The stages of one run, in one directory.

    Args:
        directory: holds one directory for each finished stage, and `.NAME.partial` of one that was stopped.
        console: where progress bars go.
    """

    def __init__(self, directory: Path, console: Console) -> None:
        self._directory = directory
        self._console = console
        self.executed: dict[str, float] = {}
        """Stages done by this object, with the seconds each took."""
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, key: str, work: Callable[[Path, Advance], None], *, unit: str = "") -> Path:
        """Returns the stage's directory, doing the work first where it is not in place.

        Args:
            name: of the stage and its directory.
            key: hash of all that decides the output; see `key_of`.
            work: fills a directory. After a stop it gets the same directory again, with what it had finished.
            unit: of what the work counts; where given, the bar says how many a second.
        """
        place = self._directory / name
        if _key(place) == key:
            self._console.print(f"[dim]{name}: in place[/dim]")
            return place
        partial = self._directory / f".{name}.partial"
        if _key(partial) != key:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            (partial / _KEY).write_bytes(msgspec.json.encode({"key": key}))
        start = time.perf_counter()
        with self._bar(name, unit) as advance:
            work(partial, advance)
        _flush(partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        self.executed[name] = time.perf_counter() - start
        return place

    @contextmanager
    def _bar(self, name: str, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn(f"[bold]{name:<9}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            *((_SpeedColumn(unit),) if unit else ()),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(name, total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance
            found = progress.tasks[0]
            progress.update(task, total=found.total or 1, completed=found.total or 1)


def key_of(*parts: Any) -> str:
    """Hashes what decides a stage: anything JSON can hold."""
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _key(directory: Path) -> str | None:
    path = directory / _KEY
    if not path.is_file():
        return None
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError:
        return None
    return found.get("key")


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
