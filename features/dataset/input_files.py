"""Files of a dataset with their hashes, and a check that they stay as they are while something is made of them."""

import hashlib
import os
from pathlib import Path

from features.dataset.descriptor import Dataset
from features.dataset.files import source_files
from features.dataset.vectors.column import vector_files
from features.errors import DatasetError
from features.storage.copy import local_file
from features.storage.file import Stamp, stamps
from features.storage.location import Location


class InputFiles:
    """The files of a dataset as they are when this object is made; `check` tells if they still are.

    Attributes:
        by_table: sha256 of each file by its name, for each of items, users and events that there is. The copy of a
            table has the name of the table and its snapshot.
        stamps: location and stamp of each file, see `features.storage.file.stamps`.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.stamps = _stamps(dataset)
        self.by_table = {
            table: {_name(path, table, dataset): _sha256(path) for path in files}
            for table, files in _files(dataset).items()
        }
        self.check()

    @property
    def hashes(self) -> list[str]:
        """sha256 of each file, in the order in which they are read."""
        return [sha256 for files in self.by_table.values() for sha256 in files.values()]

    def check(self) -> None:
        """Compares the files with their stamps.

        Raises:
            DatasetError: A file was changed, added or removed; names it.
        """
        changed = sorted({str(path) for path, *_ in set(self.stamps) ^ set(_stamps(self._dataset))})
        if changed:
            raise DatasetError(
                f"{', '.join(changed)}: changed while the run read it, so the stage was not kept; run again when the "
                "files are complete"
            )


def file_hashes(dataset: Dataset) -> list[str]:
    """The sha256 of each file of the dataset, in the order in which they are read."""
    return [_sha256(path) for files in _files(dataset).values() for path in files]


def forgotten_hash(dataset: Dataset) -> str:
    """The sha256 of the list of forgotten users, which the events name."""
    assert dataset.events.forgotten is not None
    return _sha256(dataset.directory / dataset.events.forgotten)


def _sha256(path: Location) -> str:
    with local_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(path: Location, table: str, dataset: Dataset) -> str:
    source = getattr(dataset, table)
    if source.copy_of_table is not None:
        return str(source.copy_of_table.name)
    return os.path.relpath(path, dataset.directory) if isinstance(path, Path) else str(path)


def _files(dataset: Dataset) -> dict[str, tuple[Location, ...]]:
    tables = {"items": dataset.items, "users": dataset.users, "events": dataset.events}
    found = {
        table: source_files(source, dataset.directory, table) for table, source in tables.items() if source is not None
    }
    if dataset.items is not None:
        found["items"] += vector_files(dataset.items, dataset.directory)
    if dataset.events.forgotten is not None:
        listed = dataset.directory / dataset.events.forgotten
        if not listed.is_file():
            raise DatasetError(f"{listed}: no such file; `tessera topics export forgotten FILE` writes the list")
        found["events"] += (listed,)
    if dataset.events.origin == "impressions":
        found["events"] += source_files(dataset.events.topics()["outcomes"], dataset.directory, "events")
    return found


def _stamps(dataset: Dataset) -> list[Stamp]:
    """A file on disk that is replaced and put back has another time of change, though its bytes are equal."""
    paths = [path for files in _files(dataset).values() for path in files]
    return [(str(path), *found) for path, found in zip(paths, stamps(paths), strict=True)]
