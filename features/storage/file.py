"""Lists, reads, writes, removes and stamps files, on disk or at a store."""

import glob
import os
import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from features import durable
from features.storage.location import Location, Remote, locate

Stamp = tuple[str | int, ...]
Listing = Mapping[str, Mapping[str, Any]]

# Stores that show an object when it is whole. At others a file is written beside its name and renamed.
_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}
_TAGS = ("ETag", "etag")
_TIMES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


def matching(pattern: str, directory: Path) -> list[Location]:
    """Returns the files that match a glob, in the order of their names.

    Args:
        pattern: Address or path with wildcards.
        directory: Directory to which a path is relative.
    """
    where = locate(pattern, directory)
    if isinstance(where, Path):
        base, own = (where.anchor, str(where)[1:]) if "://" in pattern else (str(directory), pattern)
        paths = sorted(Path(base, name) for name in glob.glob(own, root_dir=base, recursive=True))
        return [path for path in paths if path.is_file()]
    # Last folder before the first part with a wildcard.
    folder = where
    while glob.has_magic(folder.address):
        folder = folder.parent
    with where.opened() as (store, path):
        entries = store.glob(path, detail=True)
        return sorted(folder.below(store, name) for name, at in entries.items() if at["type"] == "file")


def names(folder: Location) -> list[str]:
    """Returns the names of the files in a folder, sorted; none if there is no folder."""
    if isinstance(folder, Path):
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else []
    try:
        return sorted(name for name, at in _listing(folder).items() if at["type"] == "file")
    except FileNotFoundError:
        return []


def read_part(location: Location, start: int, count: int) -> bytes:
    """Reads `count` bytes of a file, from the offset `start`."""
    if isinstance(location, Path):
        with location.open("rb") as file:
            file.seek(start)
            return file.read(count)
    with location.opened() as (store, path):
        found: bytes = store.cat_file(path, start=start, end=start + count)
        return found


def write(location: Location, content: bytes | Callable[[Path], None]) -> None:
    """Writes a file whole or not at all, replacing the file at the location.

    Args:
        location: File; on disk its directory exists.
        content: Bytes, or a function that writes the file it is given.
    """
    if isinstance(location, Path):
        durable.write_file(location, content)
        return
    if not isinstance(content, bytes):
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory, location.name)
            content(made)
            content = made.read_bytes()
    with location.opened(bucket=True) as (store, path):
        if location.protocol in _WHOLE:
            store.pipe_file(path, content)
            return
        aside = f"{path}.{secrets.token_hex(8)}.tmp"
        store.makedirs(path.rpartition("/")[0], exist_ok=True)
        store.pipe_file(aside, content)
        store.mv(aside, path)


def make_directory(location: Location) -> None:
    """Makes a directory and its missing parents; at a store there is none to make."""
    if isinstance(location, Path):
        durable.make_directory(location)


def remove(location: Location) -> None:
    """Removes a file, or a folder with all that is below; does nothing if there is none."""
    if isinstance(location, Remote):
        if location.exists():
            with location.opened() as (store, path):
                store.rm(path, recursive=True)
    elif location.is_dir():
        shutil.rmtree(location, ignore_errors=True)
    else:
        location.unlink(missing_ok=True)


def size_bytes(location: Location) -> int:
    """Returns the size of a file."""
    if isinstance(location, Path):
        return location.stat().st_size
    with location.opened() as (store, path):
        return int(store.size(path))


def stamp(location: Location) -> Stamp:
    """Returns the stamp of a file; see `stamps`."""
    return stamps([location])[0]


def stamps(locations: Sequence[Location]) -> list[Stamp]:
    """Returns a stamp of each file, which differs if another file took its place. No file is read.

    The stamp of a file on disk has inode, size and the times of its last changes. The stamp of a file at a store has
    size and entity tag, or the time of its last change if the store gives no tag. Several files of a folder cost one
    listing.
    """
    folders = Counter(location.parent for location in locations if isinstance(location, Remote))
    listed = {folder: _listing(folder) for folder, count in folders.items() if count > 1}
    return [
        _remote_stamp(location, listed.get(location.parent, {}))
        if isinstance(location, Remote)
        else _local_stamp(location)
        for location in locations
    ]


def _listing(folder: Remote) -> Listing:
    with folder.opened() as (store, path):
        return {at["name"].rpartition("/")[2]: at for at in store.ls(path, detail=True)}


def _local_stamp(path: Path) -> Stamp:
    at = path.stat()
    return at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns


def _remote_stamp(location: Remote, listed: Listing) -> Stamp:
    found = listed.get(location.name)
    if found is None:
        with location.opened() as (store, path):
            found = store.info(path)
    known = next((found[name] for name in _TAGS + _TIMES if found.get(name)), "")
    # A listing may give a number where the file's own entry gives a date.
    tag = known.timestamp() if isinstance(known, datetime) else known
    return str(tag).strip('"'), int(found.get("size") or 0)
