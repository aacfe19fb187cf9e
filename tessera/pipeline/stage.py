"""Stages that finish whole or not at all, and are not done twice.

A stage's output is a directory that appears by a rename when it is complete. Its key is a hash of everything that
decides it, the keys of the stages before it included: the same key is not done again, another key replaces it.
The sha256 of each of its files is kept with the key, so a stage that was damaged since is done again.

Finished stages may have copies at an object store. A machine that lacks a stage takes the copy with the same key.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

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

from features.durable import make_directory, recover_directory, replace_directory, write_file
from features.errors import DatasetError, TesseraError
from features.lock import locked
from features.storage.folders import fetch_folder, send_folder
from features.storage.location import Remote
from tessera.pipeline.made_of import MadeOf, key_of

Advance = Callable[[int, int], None]
_KEY = "stage.json"
_KEY_LETTERS = 16


class Inputs(Protocol):
    """The files outside the stages that a stage reads."""

    @property
    def stamps(self) -> Sequence[Any]:
        """Tells the files from others that were later put in their place."""

    def check(self) -> None:
        """Raises TesseraError if a file is no longer the one that was stamped."""


class _Record(msgspec.Struct, frozen=True):
    """Content of `stage.json`.

    Attributes:
        key: of the finished stage; of a stage that was stopped, its key and its inputs' stamps in one hash.
        files: sha256 by relative path; None in directories of releases that kept none.
        made_of: everything that decided the key; None in directories of releases that kept the key alone.
    """

    key: str = ""
    files: dict[str, str] | None = None
    made_of: MadeOf | None = None


class _SpeedColumn(ProgressColumn):
    """Column of the recent rate per second."""

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
        copies: folder at an object store that has a copy of each finished stage; None for the directory alone.
        by_key: True keeps one directory for each key of a stage, `NAME-KEY`, so that no stage replaces another.
    """

    def __init__(
        self, directory: Path, console: Console, copies: Remote | None = None, *, by_key: bool = False
    ) -> None:
        self._directory = directory
        self._by_key = by_key
        self._console = console
        self._copies = copies
        self.executed: dict[str, float] = {}
        """Stages done by this object, with the seconds each took."""
        self.again: dict[str, list[str]] = {}
        """Stages that were finished and are done again, with the reasons."""
        self._held = False
        make_directory(directory)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Excludes other runs from the directory while the body runs; may be nested.

        Raises:
            TesseraError: another run uses the directory.
        """
        if self._held:
            yield
            return
        with locked(self._directory / "run", wait_s=0):
            self._held = True
            try:
                yield
            finally:
                self._held = False

    def run(
        self,
        name: str,
        key: str,
        work: Callable[[Path, Advance], None],
        *,
        unit: str = "",
        inputs: Inputs | None = None,
        made_of: MadeOf | None = None,
    ) -> Path:
        """Returns the stage's directory, doing the work first where it is not in place and whole.

        Args:
            name: of the stage and its directory.
            key: hash of all that decides the output; see `key_of`.
            work: fills a directory. After a stop it gets the same directory again, with what it had finished.
            unit: of what the work counts; where given, the bar says how many a second.
            inputs: files that the work reads outside the stages. Where one changes meanwhile, nothing is kept.
            made_of: everything that decides the key, kept to say why a later run does the stage again.

        Raises:
            TesseraError: another run uses the directory, or an input changed while the stage was made.
            StorageError: the store of the copies does not answer, or refuses a copy; the stage is kept here.
        """
        with self.held():
            stage = self._directory / (f"{name}-{key[:_KEY_LETTERS]}" if self._by_key else name)
            recover_directory(stage)
            if self._copies is not None:
                self._fetch(self._copies / name, stage, key)
            finished = _record(stage)
            if finished.key == key:
                damage = _damage(stage)
                if damage is None:
                    self._console.print(Text(f"{name}: in place", "dim"))
                    self._send(name)
                    return stage
                self._again(name, [damage])
            elif finished.key:
                self._again(name, _reasons(finished, made_of))
            start = time.perf_counter()
            self._do(name, stage, _Record(key, made_of=made_of), work, unit, inputs)
            self.executed[name] = time.perf_counter() - start
            self._send(name)
            return stage

    def _fetch(self, copy: Remote, stage: Path, key: str) -> None:
        """Replaces a stage that is not in place by the copy at the store, if the copy has the key."""
        if _record(stage).key == key and _damage(stage) is None:
            return
        if _record(copy).key == key:
            self._console.print(Text(f"{stage.name}: fetched from {copy}", "dim"), soft_wrap=True)
            try:
                fetch_folder(copy, stage, _KEY)
            except FileNotFoundError:
                # Another machine is replacing the copy.
                return

    def _send(self, name: str) -> None:
        if self._copies is not None:
            send_folder(self._directory / name, self._copies / name, _KEY)

    def partial(self, name: str) -> Path:
        """Returns the directory of a stage that is not finished, and that may not exist."""
        return self._directory / f".{name}.partial"

    def _again(self, name: str, reasons: list[str]) -> None:
        self.again[name] = reasons
        self._console.print(Text(f"{name}: done again, since {'; '.join(reasons)}", "yellow"), soft_wrap=True)

    def _do(
        self,
        name: str,
        stage: Path,
        record: _Record,
        work: Callable[[Path, Advance], None],
        unit: str,
        inputs: Inputs | None,
    ) -> None:
        partial = self.partial(name)
        # A stopped stage may hold what it made of an input that was replaced and put back: its stamp differs.
        begun = record.key if inputs is None else key_of(record.key, inputs.stamps)
        if _record(partial).key != begun:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _write(partial, _Record(begun))
        if inputs is not None:
            inputs.check()
        with stage_bar(self._console, name, unit) as advance:
            work(partial, advance)
        if inputs is not None:
            try:
                inputs.check()
            except TesseraError:
                shutil.rmtree(partial)
                raise
        _write(partial, msgspec.structs.replace(record, files=_hashes(partial)))
        replace_directory(partial, stage)


@contextmanager
def stage_bar(console: Console, name: str, unit: str = "") -> Iterator[Advance]:
    """Shows a bar of the work in the body, which advances it by (done, total)."""
    columns = (
        TextColumn(f"{name:<9}", style="bold", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        *((_SpeedColumn(unit),) if unit else ()),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
        bar = progress.tasks[0]
        progress.update(task, total=bar.total or 1, completed=bar.total or 1)


def finished_key(directory: Path) -> str:
    """Returns the key of a finished stage of another run.

    Raises:
        DatasetError: The stage is missing or damaged; names the file.
    """
    if not (directory / _KEY).is_file():
        raise DatasetError(f"{directory} is missing; give the --out of a finished `tessera run` on items with text")
    damage = _damage(directory)
    if damage is not None:
        raise DatasetError(f"{damage}; run again into {directory.parent}, which does the stage again")
    return _record(directory).key


def fetch_stages(address: Remote, directory: Path, names: Sequence[str]) -> Path:
    """Fetches finished stages of a run from an object store. A stage that is the same here is not fetched again.

    Args:
        address: Address of the run, as `tessera run --out` took it.
        directory: Directory of the copies.
        names: Names of the stages. A stage that the run lacks is left out.

    Returns:
        The directory.

    Raises:
        DatasetError: The address has none of the stages.
        StorageError: The store does not answer, or a stage at the store is damaged.
    """
    found = [name for name in names if _record(address / name).key]
    if not found:
        raise DatasetError(f"{address}: the store has no finished stage there; give the --out of a `tessera run`")
    for name in found:
        fetch_folder(address / name, directory / name, _KEY)
    return directory


def made_of(directory: Path) -> MadeOf:
    """Returns the inputs of a finished stage; all parts are empty if an earlier release of Tessera made the stage."""
    return _record(directory).made_of or MadeOf()


def _reasons(finished: _Record, now: MadeOf | None) -> list[str]:
    """Returns the reasons why a stage with another key is done again."""
    if finished.made_of is None or now is None:
        return ["it was made of other inputs, or by an earlier release"]
    return finished.made_of.changes(now) or ["an earlier release made it"]


def _damage(directory: Path) -> str | None:
    """Returns the first difference between a finished stage and the record of its files, or None."""
    recorded = _record(directory).files
    if recorded is None:
        return None
    hashes = _hashes(directory)
    for name in sorted(recorded.keys() | hashes.keys()):
        if name not in hashes:
            return f"{directory / name} is missing"
        if name not in recorded:
            return f"{directory / name} is not of this stage"
        if hashes[name] != recorded[name]:
            return f"{directory / name} was altered (sha256 differs)"
    return None


def _record(directory: Path | Remote) -> _Record:
    """Reads the record of a directory; its key is empty if there is no readable record."""
    try:
        return msgspec.json.decode((directory / _KEY).read_bytes(), type=_Record)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        return _Record()


def _write(directory: Path, record: _Record) -> None:
    write_file(directory / _KEY, msgspec.json.encode(record))


def _hashes(directory: Path) -> dict[str, str]:
    """Returns the sha256 of each file of a stage by relative path, without hidden files and the record."""
    hashes = {}
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        if path.is_file() and name != Path(_KEY) and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as file:
                hashes[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
