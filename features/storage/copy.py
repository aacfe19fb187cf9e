"""Copies files between the disk and a store, and keeps copies of what is elsewhere for libraries that need a file."""

import errno
import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from features.storage.file import stamps, write
from features.storage.location import Location, Remote


class _Copies:
    """Copies in a temporary directory, which is removed when the process ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = 0

    def made(self, of: object, work: Callable[[Path], None]) -> Path:
        """Returns the directory that `work` filled for this `of`; the first call does the work."""
        state = hashlib.sha256(repr(of).encode()).hexdigest()[:16]
        with self._lock:
            if self._process != os.getpid():
                # A forked process must not remove the directory of its parent.
                self._process = os.getpid()
                self._directory = tempfile.TemporaryDirectory(prefix="tessera-", ignore_cleanup_errors=True)
            place = Path(self._directory.name, state)
            if not place.exists():
                aside = place.with_name(f"{state}.{secrets.token_hex(4)}")
                aside.mkdir()
                work(aside)
                aside.rename(place)
        return place

    def fetch(self, root: Remote, files: Sequence[Remote]) -> Path:
        """Returns a directory with the files by their paths below `root`, fetched unless it is there and current."""

        def work(place: Path) -> None:
            transfer([(file, place / file.address.removeprefix(f"{root.address}/")) for file in files])

        return self.made((root.address, files, stamps(files)), work)


_copies = _Copies()


def made_once(of: object, work: Callable[[Path], None]) -> Path:
    """Returns a temporary directory that `work` filled. A process does the work once for each `of`.

    Args:
        of: What decides the files; its `repr` is compared.
        work: Writes files into the directory that it is given.
    """
    return _copies.made(of, work)


def local_file(location: Location) -> Path:
    """Returns the file on disk: itself, or a copy of the remote file as it is now."""
    if isinstance(location, Path):
        return location
    return _copies.fetch(location.parent, [location]) / location.name


def local_directory(location: Location) -> Path:
    """Returns the directory on disk: itself, or a copy of the remote folder with all that is below."""
    if isinstance(location, Path):
        return location
    files = files_below(location)
    if not files:
        raise FileNotFoundError(errno.ENOENT, "no file is below this address", location.address)
    return _copies.fetch(location, files)


def files_below(folder: Remote) -> list[Remote]:
    """Returns all files below a folder, sorted."""
    with folder.opened(bucket=True) as (store, path):
        found = {folder.below(store, name) for name in store.find(path)}
        # Some tools mark a folder by an empty object of its name.
        return sorted(found - {folder})


def upload(directory: Path, folder: Remote, *, last: str | None = None) -> None:
    """Copies the files below a directory to a store, hidden files excluded.

    Args:
        directory: Existing directory.
        folder: Address that gets the files under their relative names.
        last: Relative name of a file that is written after all others, since it says that they are whole.
    """
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    named = {path.relative_to(directory).as_posix(): path for path in paths}
    transfer([(path, folder / name) for name, path in named.items() if name != last])
    if last is not None:
        write(folder / last, named[last].read_bytes())


def transfer(pairs: Sequence[tuple[Location, Location]]) -> None:
    """Copies files between the disk and one store, several at once if the store's package can.

    Args:
        pairs: Source and target of each file. All sources are on disk, or all are at the store.
    """
    if not pairs:
        return
    fetched = isinstance(pairs[0][0], Remote)
    remote = pairs[0][0 if fetched else 1]
    assert isinstance(remote, Remote)
    with remote.opened() as (store, _):
        sources, targets = (
            [str(side) if isinstance(side, Path) else store._strip_protocol(side.address) for side in sides]
            for sides in zip(*pairs, strict=True)
        )
        (store.get if fetched else store.put)(sources, targets)
