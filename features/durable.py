"""Writes durable files and directories: each appears whole or not at all, and survives a power cut.

Content is written to a temporary name, flushed, and renamed. A rename is durable only after the directory that holds
the name is flushed too, so every function here flushes it.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import TesseraError

_ASIDE = ".tmp"


def write_file(path: Path, content: bytes | Callable[[Path], None], *, mode: int = 0o666) -> None:
    """Writes a file, replacing the file at `path`.

    Args:
        path: File in an existing directory.
        content: Bytes, or a function that writes the file it is given.
        mode: Permissions, less the process's umask.

    Raises:
        OSError: The disk refused the write; the file at `path` stays unchanged.
    """
    aside = _aside(path)
    try:
        with _named(path):
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
            if not isinstance(content, bytes):
                content(aside)
            _flush(aside)
            rename(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_directory(destination: Path, fill: Callable[[Path], None]) -> None:
    """Writes a directory that does not exist yet.

    Args:
        destination: Path of the directory; its missing parents are made.
        fill: Function that writes into the empty directory it is given.

    Raises:
        TesseraError: `destination` exists already.
        OSError: The disk refused the write; nothing is at `destination`.
    """
    if destination.exists():
        raise TesseraError(f"{destination} exists already; remove it, or choose another directory")
    make_directory(destination.parent)
    aside = _aside(destination)
    try:
        aside.mkdir()
        fill(aside)
        flush_tree(aside)
        rename(aside, destination)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def replace_directory(made: Path, place: Path) -> None:
    """Renames a complete directory to `place`, beside it. The directory that was at `place` is removed last.

    A process that ends in between leaves the old or the new directory at `place` once `recover_directory` has run.
    """
    flush_tree(made)
    old = _old(place)
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        rename(place, old)
    rename(made, place)
    shutil.rmtree(old, ignore_errors=True)


def recover_directory(place: Path) -> None:
    """Restores the directory that an interrupted `replace_directory` had moved."""
    old = _old(place)
    if old.exists() and not place.exists():
        rename(old, place)
    elif old.exists():
        shutil.rmtree(old, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Makes a directory and its missing parents; an existing one is left as it is."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        _flush(place.parent)


def rename(source: Path, target: Path) -> None:
    """Renames within a directory, and flushes the directory."""
    source.rename(target)
    _flush(target.parent)


def flush_tree(directory: Path) -> None:
    """Flushes all files and directories below a directory, and itself.

    Removes temporary files of interrupted writes.
    """
    for place, directories, files in os.walk(directory, topdown=False):
        for name in directories + files:
            path = Path(place, name)
            if name.startswith(".") and name.endswith(_ASIDE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            elif name in files:
                _flush(path)
        _flush(Path(place))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of an open file, which names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _aside(path: Path) -> Path:
    """Returns a temporary name that no other process or thread uses."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_ASIDE}")


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
