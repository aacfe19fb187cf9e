"""Locks between processes and threads, for files that are read, changed and written back.

A lock is a file beside the file it protects, held by flock(2). The kernel releases it when its holder ends, however
that happens, so no lock is ever stale. The lock file stays: removing it would let two holders lock two different files.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.errors import TesseraError

_POLL_S = 0.02


@contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[None]:
    """Holds the lock of a file or directory that may not exist yet.

    The lock excludes other processes and other threads, and is not reentrant. The lock file is `.NAME.lock` beside
    `path`; its directory is made if it is missing.

    Args:
        path: File or directory that is read or changed while the lock is held.
        wait_s: Seconds to wait for another holder; 0 does not wait.

    Raises:
        TesseraError: Another process still holds the lock; names its pid.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _acquire(file, path, wait_s)
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def _acquire(file: int, path: Path, wait_s: float) -> None:
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= give_up:
                holder = os.pread(file, 20, 0).decode(errors="replace") or "unknown"
                raise TesseraError(
                    f"{path}: in use by another process (pid {holder}); wait until it has ended, or end it"
                ) from None
            time.sleep(_POLL_S)
