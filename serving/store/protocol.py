"""The online store: where the stream puts the newest rows and records, and servers read them.

A store holds, for each bundle, one table of embedding rows and any number of kinds of records (items, user
histories). Every write carries a sequence number and **the highest one wins**, so that any number of writers may
write the same things in any order, twice, or again after a crash, and the store ends in the same state: it is a fold
by maximum. The contract suite in `tests/contract/test_online_store.py` holds every implementation to it.

Letters: N rows of one request, R rows of the table, D its dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from models.bundle import record

Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]

NEVER = -1
"""What `read_seqs` says of a row that was never written; below every sequence number, 0 included."""

STORAGES = ("float32", "float16", "int8")
"""How rows may be kept, from exact to small."""

FOLLOWED = frozenset({record.ITEM, record.ADMITTED})
"""Kinds of records whose writes are listed for followers; a list of all users' would take room for nobody."""

MAX_SEQ = 2**48 - 2
"""The highest sequence number: stores keep seq + 1 in six bytes, where 0 means never written."""


@dataclass(frozen=True)
class StoredTable:
    """A bundle's table: `rows` (R) by `dim` (D), and how a row's numbers are kept.

    `storage` float32 keeps every bit; float16 rounds to 11 bits; int8 keeps 8 bits and the row's own scale.
    """

    rows: int
    dim: int
    storage: str = "float32"

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise StoreError(f"storage must be one of {', '.join(STORAGES)}, not {self.storage!r}")
        for name in ("rows", "dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise StoreError(f"{name} must be a whole number of at least 1, not {value!r}")

    def __str__(self) -> str:
        return f"{self.rows:,} rows of {self.dim} dimensions in {self.storage}"


@dataclass(frozen=True)
class Changes:
    """Writes to a kind of records.

    Attributes:
        ids: of the records that were written, in order, repeated or not.
        cursor: names the last of these writes.
        lost: see `OnlineStore.changes`; then there are no ids.
    """

    ids: list[str]
    cursor: str
    lost: bool


class OnlineStore(Protocol):
    """Rows and records by bundle; the highest sequence number wins.

    Guarantees: a row or record is written whole or not at all, and a reader never sees half of one. A call that
    writes several of them is not a transaction: after a failure some may be written, and the same call again
    completes it. A write that has returned is seen by every later read. Sequence numbers lie in 0..`MAX_SEQ`; an
    equal one does not overwrite, hence a replay changes nothing. Everything may be called from several threads.
    Arguments of a wrong type, shape, dtype or range are refused with a `StoreError` before anything is written.
    """

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """Make room for a table, so that its rows can be written; the same call again does nothing.

        Not while another process is dropping the same bundle: what it removes could be the new table's.

        Raises:
            StoreError: the bundle has a table of another shape or storage.
        """
        ...

    def table(self, bundle: str) -> StoredTable:
        """The bundle's table; raises StoreError when there is none."""
        ...

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """Write each row whose sequence number is above the stored one; the streaming path.

        Args:
            bundle: a bundle with a table.
            rows: (N,) int64 in 0..R-1, in any order. Of a row that comes several times the highest sequence number
                is taken, of equal ones the first.
            seqs: (N,) int64.
            vectors: (N, D) float32, finite; kept as the table's storage says.
            again: write also where the numbers are equal, which repairs a damaged row and changes no sound one.

        Returns:
            How many distinct rows were written. After a connection was lost and the call was sent again this may be
            too low, as rows that the first try wrote are not written twice.

        Raises:
            StoreError: the bundle is not loaded, or an argument is wrong.
        """
        ...

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """Write the whole table at one sequence number, fast; the snapshot path.

        Equal to `write_rows` of all rows: a row whose stored number is not below `seq` stays as it is, so that the
        stream may already be writing.

        Args:
            bundle: a bundle with a table.
            vectors: (R, D) float32, finite.
            seq: the snapshot's sequence number, 0 for the first.
        """
        ...

    def read_rows(self, bundle: str, rows: Int64) -> Float32:
        """Read vectors in one round trip; the ranker's path.

        Args:
            bundle: a bundle with a table.
            rows: (N,) int64 in 0..R-1, in any order, repeated or not.

        Returns:
            (N, D) float32 in the order of `rows`, the caller's own; zeros where a row was never written.

        Raises:
            StoreError: the bundle is not loaded, or a row is out of range.
        """
        ...

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """Read sequence numbers in one round trip: (N,) int64 as `rows`, `NEVER` (-1) where never written."""
        ...

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """Read everything, as a mirror does when it starts: vectors (R, D) float32 and their seqs (R,) int64.

        Each row goes with its own sequence number, but rows are read at slightly different moments. Folding the log
        on top, by the same rule, from an offset before the call makes it exact.
        """
        ...

    def write_records(
        self,
        bundle: str,
        kind: str,
        ids: Sequence[str],
        seqs: Sequence[int],
        payloads: Sequence[bytes],
        *,
        again: bool = False,
    ) -> int:
        """Write each record whose sequence number is above the stored one; repeats are treated as in `write_rows`.

        Records need no table: a bundle's items may arrive before its rows do.

        Args:
            bundle: any bundle.
            kind: what the records are, such as "item"; ids are unique within one kind.
            ids: N ids.
            seqs: N sequence numbers.
            payloads: N times bytes, never looked into.
            again: as in `write_rows`.

        Returns:
            How many distinct records were written.
        """
        ...

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """Read records in one round trip, in the order of `ids`; None where there is none."""
        ...

    def scan_records(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """Reads all records of a kind, in any order and some at a time: lists of ids and payloads.

        What is there from the first list to the last comes, and may come twice; what is written or removed meanwhile
        may come or not.
        """
        ...

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """Lists ids in the order in which they were written, from a cursor on, and not all of them at once.

        The store keeps the last few thousand writes of a kind. A follower asks with the cursor that the call before
        gave until no ids come; "" begins.

        Args:
            bundle: any bundle.
            kind: one of `FOLLOWED`.
            cursor: names the last write that the follower knows.

        Returns:
            `lost` where the store does not know that write: the follower never asked before, asks too late, or the
            store was dropped, emptied or has gone back to an older state. A follower that then scans all records and
            continues from the new cursor misses nothing.
        """
        ...

    def remove_records(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """Remove records; ids that are not there do no harm, and followers are not told."""
        ...

    def drop(self, bundle: str) -> None:
        """Remove the bundle's table and all its records; nothing happens when there is no such bundle."""
        ...

    def expire(self, bundle: str, *, after_s: float) -> None:
        """Let a bundle with a table go after a time, as `drop` would, unless it is kept; until then all works.

        For one that no server answers from any more. Nobody needs to be there when the time comes.

        Raises:
            StoreError: the bundle has no table.
        """
        ...

    def keep(self, bundle: str) -> bool:
        """Call off `expire`; returns whether the bundle is there, whole, to stay.

        One whose time has nearly come is dropped instead: it must be loaded again.

        Raises:
            StoreError: the store does not answer.
        """
        ...

    def renew(self, bundle: str, *, least_s: float) -> None:
        """Puts off the time of a bundle that is to expire where less than `least_s` are left, to twice as much.

        Call it if this server still answers from a bundle that another server releases. A bundle that stays is
        unchanged.
        """
        ...

    def incarnation(self) -> str:
        """Returns an id of the server's start: writes to an earlier start may have been lost with it."""
        ...

    def ping(self) -> None:
        """Return when the store answers.

        Raises:
            StoreError: it does not.
        """
        ...

    def close(self) -> None:
        """Releases connections; twice does no harm."""
        ...
