"""Rows that the mirrors of several processes share: one file in memory for each bundle, mapped by all of them.

The first process reads the table from the store; the others find it there. Each process folds all deltas, and a delta
that another process has folded changes nothing, so no process has a role that the others would have to take over. A
lock of the system guards the rows. The system frees the lock of a process that dies. If a process dies in the
middle of a fold, the file names the unfinished fold. Rows cannot be read until another process has folded that delta.

    header | vectors (R, D) float32 | seqs (R,) int64

Shape letters: R rows of the table, D dimensions, N rows of a call.
"""

import contextlib
import fcntl
import itertools
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from serving.store.protocol import Float32, Int64, OnlineStore
from streaming.log.protocol import Offsets

_HEADER_BYTES: Final = 4096
_FILLED, _SEQ, _FIRST, _PARTITIONS, _POSITION = range(5)
_NO_FOLD: Final = -1


class SharedRows:
    """See `HeldRows`.

    Args:
        directory: Directory that the processes share, in memory.
        store: Store that has the bundle.
        bundle: Id of the bundle.
        position: Offset in each partition of the deltas' topic before which the store has all deltas.

    Raises:
        StoreError: The store does not answer, or the directory has no room for the table.
    """

    def __init__(self, directory: Path, store: OnlineStore, bundle: str, position: Offsets) -> None:
        table = store.table(bundle)
        vectors = _HEADER_BYTES + -(-table.rows * table.dim * 4 // 8) * 8
        size = vectors + table.rows * 8
        self._path = directory / f"{bundle}.rows"
        self._within = threading.Lock()
        with _locked(directory / "lock", fcntl.LOCK_EX):
            self._file = _sized(self._path, size)
            # A lock of its own file, so that it outlasts the short locks of the rows.
            self._use = (directory / f"{bundle}.use").open("wb")
            fcntl.flock(self._use, fcntl.LOCK_SH)
        memory = mmap.mmap(self._file.fileno(), size)
        self._header = np.frombuffer(memory, dtype=np.int64, count=_HEADER_BYTES // 8)
        self._vectors = np.frombuffer(
            memory, dtype=np.float32, count=table.rows * table.dim, offset=_HEADER_BYTES
        ).reshape(table.rows, table.dim)
        self._seqs = np.frombuffer(memory, dtype=np.int64, count=table.rows, offset=vectors)
        with self._rows(fcntl.LOCK_EX):
            if not self._header[_FILLED]:
                self._vectors[:], self._seqs[:] = store.read_table(bundle)
                self._header[_SEQ] = self._header[_FIRST] = _NO_FOLD
                self._put(position)
                self._header[_FILLED] = 1

    def close(self) -> None:
        """Releases the rows. The last process removes their file."""
        directory = self._path.parent
        if self._use.closed or not directory.exists():
            return
        with _locked(directory / "lock", fcntl.LOCK_EX):
            self._use.close()
            with (directory / Path(self._use.name).name).open("wb") as use, contextlib.suppress(BlockingIOError):
                fcntl.flock(use, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path.unlink(missing_ok=True)
        self._file.close()

    @property
    def position(self) -> Offsets:
        """See `HeldRows`."""
        return tuple(self._header[_POSITION : _POSITION + self._header[_PARTITIONS]].tolist())

    def moved(self, position: Offsets) -> None:
        """See `HeldRows`. A process that is behind another one moves nothing."""
        with self._rows(fcntl.LOCK_EX):
            self._put(tuple(map(max, itertools.zip_longest(position, self.position, fillvalue=0))))

    def _put(self, position: Offsets) -> None:
        self._header[_POSITION : _POSITION + len(position)] = position
        self._header[_PARTITIONS] = len(position)

    def fold(self, rows: Int64, vectors: Float32, seq: int) -> int:
        """See `HeldRows`."""
        first = int(rows[0]) if len(rows) else _NO_FOLD
        with self._rows(fcntl.LOCK_EX):
            newer = self._seqs[rows] < seq
            if newer.any():
                if self._header[_SEQ] == _NO_FOLD:
                    self._header[_FIRST] = first
                    self._header[_SEQ] = seq
                changed = rows[newer]
                # Vectors before numbers, so that a fold that was cut short is done again.
                self._vectors[changed] = vectors[newer]
                self._seqs[changed] = seq
            if self._unfinished == (seq, first):
                self._header[_SEQ] = _NO_FOLD
        return int(newer.sum())

    def take(self, rows: Int64) -> Float32:
        """See `HeldRows`."""
        with self._rows(fcntl.LOCK_SH):
            if self._header[_SEQ] != _NO_FOLD:
                raise StoreError(
                    "a server ended while it folded a delta into the shared mirror; its rows wait for the log"
                )
            return self._vectors.take(rows, axis=0)

    def seqs(self) -> NDArray[np.int64]:
        """See `HeldRows`."""
        with self._rows(fcntl.LOCK_SH):
            return self._seqs.copy()

    @property
    def _unfinished(self) -> tuple[int, int]:
        return int(self._header[_SEQ]), int(self._header[_FIRST])

    @contextlib.contextmanager
    def _rows(self, kind: int) -> Iterator[None]:
        # The threads of a process share its lock of the file.
        with self._within:
            fcntl.flock(self._file, kind)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


@contextlib.contextmanager
def _locked(path: Path, kind: int) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, kind)
        yield


def _sized(path: Path, size: int) -> IO[bytes]:
    """Opens a file of a size, whose memory is reserved.

    Raises:
        StoreError: The directory has no room for it.
    """
    file = path.open("r+b" if path.exists() else "w+b")
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise StoreError(
            f"the shared mirror needs {size:,} bytes, and {path.parent.parent} has {free:,} free; give it more memory, "
            "or serve without --mirror"
        ) from error
    return file
