"""Explains faults of the machine in one line: a full disk, a read-only directory, a locked database.

Libraries wrap such a fault in errors of their own, with or without the system's number for it. `explain` finds the
fault behind an error and names the path and the remedy.
"""

import errno
import os
import re
from collections.abc import Iterator

from features.errors import TesseraError

_NUMBER = re.compile(r"(?:os error |\[Errno )(\d+)")
_REMEDIES = {
    errno.ENOSPC: "make room on the disk, and run the command again; what was finished is kept",
    errno.EDQUOT: "make room in the quota, and run the command again; what was finished is kept",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), and run the command again; what was finished is kept",
    errno.EROFS: "choose a directory that can be written, by --out or TESSERA_HOME, or mount it writable",
    errno.EACCES: "run as a user who may, change the permissions, or choose another path",
    errno.EPERM: "run as a user who may, change the permissions, or choose another path",
    errno.ENOENT: "see that the path is there and spelled as it is",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EISDIR: "the path is a directory; name a file",
    errno.EEXIST: "move what is there, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the system's limit of open files",
    errno.EIO: "the disk failed; see the system's log",
    errno.ENOMEM: "free memory, or use a smaller batch or budget",
    errno.EADDRINUSE: "choose another --port, or end the process that uses it",
}
_DATABASE = (
    ("database or disk is full", "make room on the disk, and run the command again"),
    ("locked", "another process holds or migrates it; run the command again when that process has ended"),
    ("already exists", "another process makes or migrates it; run the command again when that process has ended"),
    ("readonly", "choose a TESSERA_HOME that can be written, or change the permissions"),
    ("unable to open", "see that its directory is there and can be written, and that the disk has room"),
    ("disk i/o error", "the disk failed, or a limit of the system was reached; see the system's log"),
    ("malformed", "the file is damaged; restore a copy, or move it to another place to start with a new file"),
    ("not a database", "the file is damaged; restore a copy, or move it to another place to start with a new file"),
)


def explain(error: BaseException) -> str | None:
    """Returns one line that names the machine's fault behind an error and the remedy, or None for another fault.

    The causes of the error are searched down to the first that names a fault.
    """
    for cause in _causes(error):
        said = _of_system(cause) or _of_database(cause)
        if said is not None:
            return said
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields the error, the errors it wraps, and the errors it was raised from."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        # An error of Tessera already contains a remedy.
        if one is None or one in found or isinstance(one, TesseraError):
            continue
        found.append(one)
        yield one
        wrapped = getattr(one, "orig", None)
        waiting += [wrapped if isinstance(wrapped, BaseException) else None, one.__cause__, one.__context__]


def _of_system(error: BaseException) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    if number is None:
        # Libraries written in Rust give the error number only in their text.
        found = _NUMBER.search(str(error))
        number = int(found[1]) if found else None
    if number not in _REMEDIES:
        return None
    named = getattr(error, "filename", None)
    place = os.fsdecode(named) if named and not isinstance(named, int) else _place_in(str(error))
    return ": ".join(filter(None, (place, os.strerror(number)))) + f"; {_REMEDIES[number]}"


def _place_in(text: str) -> str:
    """Returns the path in a library's message, or an empty text."""
    found = re.search(r"(?:^|[\s'\"(:])((?:/|\.{1,2}/)[^\s'\",;]+)", text)
    return found[1] if found else ""


def _of_database(error: BaseException) -> str | None:
    import sqlite3

    if not isinstance(error, sqlite3.Error):
        return None
    said = str(error)
    remedy = next((remedy for words, remedy in _DATABASE if words in said.lower()), None)
    return None if remedy is None else f"database: {said}; {remedy}"
