"""Folders that appear whole: on disk by a rename, and at an object store by a record that is written last.

A store has no rename of folders. The record of a folder is a JSON file that names the sha256 of its other files, as
bundles, snapshots and stages have one. A folder is sent file by file and its record last, so a folder with a record is
complete. A fetched folder is checked against its record, and appears on disk by a rename.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import msgspec

from features.durable import write_directory, write_file
from features.errors import StorageError
from features.lock import locked
from features.storage.copy import files_below, transfer
from features.storage.file import remove, write
from features.storage.location import Remote

_FETCH_S = 600.0
_LOGGER = logging.getLogger(__name__)


class _FolderRecord(msgspec.Struct):
    files: dict[str, str]


def send_folder(directory: Path, address: Remote, record: str) -> None:
    """Copies a folder to an object store. If the store has the same folder already, nothing is copied.

    While another folder at the address is replaced, the address has no record, so no reader gets a mixture.

    Args:
        directory: Complete folder on disk.
        address: Address that gets the files under their relative names.
        record: Name of the record.

    Raises:
        StorageError: The store does not answer, or refuses a file.
    """
    content = (directory / record).read_bytes()
    at_store = {file.address.removeprefix(f"{address}/"): file for file in files_below(address)}
    if record in at_store:
        if at_store[record].read_bytes() == content:
            return
        remove(at_store[record])
    names = sorted(_files(content, address / record))
    transfer([(directory / name, address / name) for name in names])
    write(address / record, content)
    for name in at_store.keys() - {record, *names}:
        remove(at_store[name])


def fetch_folder(address: Remote, destination: Path, record: str) -> Path:
    """Copies a folder from an object store to this disk, and checks it. An intact copy is not fetched again.

    Args:
        address: Address of the folder.
        destination: Directory of the copy.
        record: Name of the record.

    Returns:
        The destination.

    Raises:
        FileNotFoundError: The address has no record.
        StorageError: The store does not answer, or the folder at the store is damaged. Nothing is at the destination.
    """
    content = (address / record).read_bytes()
    files = _files(content, address / record)
    with locked(destination, wait_s=_FETCH_S):
        if damage(destination, record) is None and (destination / record).read_bytes() == content:
            return destination
        shutil.rmtree(destination, ignore_errors=True)

        def fill(aside: Path) -> None:
            for name in files:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                transfer([(address / name, aside / name) for name in sorted(files)])
            except FileNotFoundError as error:
                present = {file.address for file in files_below(address)}
                missing = next((name for name in sorted(files) if f"{address}/{name}" not in present), "a file")
                raise StorageError(f"{address / missing} is missing; {_damaged(address)}") from error
            for name, sha256 in sorted(files.items()):
                if _sha256(aside / name) != sha256:
                    raise StorageError(f"{address / name}: sha256 differs from {record}; {_damaged(address)}")
            write_file(aside / record, content)

        write_directory(destination, fill)
    return destination


def damage(directory: Path, record: str) -> str | None:
    """Returns the first difference between a folder on disk and its record, or None."""
    path = directory / record
    if not path.is_file():
        return f"{path} is missing"
    try:
        recorded = _files(path.read_bytes(), path)
    except StorageError as error:
        return str(error)
    present = {file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()} - {record}
    for name in sorted(recorded.keys() | present):
        if name not in present:
            return f"{directory / name} is missing"
        if name not in recorded:
            return f"{directory / name} is not in {record}"
        if _sha256(directory / name) != recorded[name]:
            return f"{directory / name}: a file was altered (sha256 differs)"
    return None


class Folders:
    """Folders of one directory, which may have copies at an object store.

    Args:
        directory: Directory on this machine.
        address: Folder at an object store with the copies. None: the folders are on this machine alone.
        record: Name of the record of each folder.
    """

    def __init__(self, directory: Path, address: Remote | None = None, *, record: str) -> None:
        self.directory, self.address = directory, address
        self._record = record

    def here(self) -> list[str]:
        """Returns the names of the folders on this machine, sorted. A folder may be damaged."""
        paths = self.directory.glob("*")
        return sorted(path.name for path in paths if path.is_dir() and not path.name.startswith("."))

    def names(self) -> list[str]:
        """Returns the names of the folders on this machine and of the complete folders at the store, sorted.

        If the store does not answer, the folders of this machine are named, with a warning.

        Raises:
            StorageError: The store does not answer, and no folder is on this machine.
        """
        here = self.here()
        try:
            return sorted({*here, *self.complete()})
        except StorageError as error:
            if not here:
                raise
            _LOGGER.warning("%s; the folders of this machine are used", error)
            return here

    def complete(self) -> list[str]:
        """Returns the names of the folders at the store that have a record, sorted."""
        return sorted(name for name, complete in self._at_store().items() if complete)

    def fetch(self, name: str) -> Path:
        """Returns an intact folder on this machine. A missing or damaged folder is fetched from the store.

        Raises:
            StorageError: The folder is damaged, here and at the store.
        """
        directory = self.directory / name
        damaged = damage(directory, self._record)
        if damaged is None:
            return directory
        if self.address is None:
            raise StorageError(damaged)
        try:
            return fetch_folder(self.address / name, directory, self._record)
        except FileNotFoundError:
            raise StorageError(f"{damaged}, and {self.address / name} has no {self._record}") from None

    def read(self, name: str, file: str) -> bytes:
        """Reads one file of a folder, unchecked, without fetching the folder.

        Raises:
            OSError: There is no such file.
        """
        path = self.directory / name / file
        if path.exists() or self.address is None:
            return path.read_bytes()
        return (self.address / name / file).read_bytes()

    def send(self, name: str) -> None:
        """Copies a folder of this machine to the store, unless the store has it. See `send_folder`.

        The folder may be removed meanwhile: links to its files are sent.
        """
        if self.address is None:
            return
        links = self.directory / f".{name}.sent"
        shutil.rmtree(links, ignore_errors=True)
        try:
            shutil.copytree(self.directory / name, links, copy_function=os.link)
            send_folder(links, self.address / name, self._record)
        finally:
            shutil.rmtree(links, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Removes a folder here and at the store."""
        shutil.rmtree(self.directory / name, ignore_errors=True)
        self.remove_copy(name)

    def remove_copy(self, name: str) -> None:
        """Removes a folder at the store. Its record goes first, so no reader takes the rest for complete."""
        if self.address is not None:
            remove(self.address / name / self._record)
            remove(self.address / name)

    def unfinished(self) -> list[str]:
        """Returns the names of the folders at the store that have no record: uploads that were interrupted, or run."""
        return sorted(name for name, complete in self._at_store().items() if not complete)

    def _at_store(self) -> Mapping[str, bool]:
        """Returns the names of the folders at the store, and whether each has a record."""
        found: dict[str, bool] = {}
        if self.address is not None:
            for file in files_below(self.address):
                name, _, rest = file.address.removeprefix(f"{self.address}/").partition("/")
                if rest:
                    found[name] = found.get(name, False) or rest == self._record
        return found


def _files(content: bytes, record: Remote | Path) -> dict[str, str]:
    """Returns the sha256 of each file that a record names."""
    try:
        files = msgspec.json.decode(content, type=_FolderRecord).files
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{record}: expected JSON with the sha256 of each file ({error})") from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise StorageError(f"{record}: names {name!r}, which is outside its folder; the record is not used")
    return files


def _damaged(address: Remote) -> str:
    return f"remove {address}, and send the folder again"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
