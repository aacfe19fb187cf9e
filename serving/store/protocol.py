"""The online store: the stream writes the newest rows and records, and servers read them.

For each bundle, a store has a table of embedding rows and several kinds of records, such as items and user histories.
Every write has a sequence number, and **the highest number wins**: the store is a fold by maximum. Several writers may
therefore write the same rows and records in any order, twice, or again after a crash, and the store ends in the same
state. The contract suite in `tests/contract/test_online_store.py` checks every implementation.

Shape letters: N rows of one request, R rows of the table, D its dimension.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from models.bundle import record

Int64: TypeAlias = NDArray[np.int64]
Float32: TypeAlias = NDArray[np.float32]

NEVER = -1
"""Result of `read_seqs` for a row that was never written. Less than every sequence number."""

STORAGES = ("float32", "float16", "int8")
"""Formats of rows, from exact to small."""

POSITION = "position"
"""Kind of the record with a writer's position. The id is the topic and the filling of the store."""

FOLLOWED = frozenset({record.ITEM, record.ADMITTED, record.FORGOTTEN})
"""Kinds of records whose writes are listed for followers. Histories are not listed, since no follower reads them."""

MAX_SEQ = 2**48 - 2
"""Highest sequence number. Stores keep seq + 1 in six bytes, and 0 means never written."""


@dataclass(frozen=True)
class StoredTable:
    """Shape and format of a bundle's table.

    Attributes:
        rows: Number of rows R, ≥ 1.
        dim: Dimension D of a row, ≥ 1.
        storage: Format of a row's numbers. `float32` keeps every bit, `float16` rounds to 11 bits, and `int8` keeps
            8 bits and the row's scale.
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
        ids: Ids of the written records. An id may occur several times.
        cursor: Cursor that names the last of these writes.
        lost: True if the store does not know the cursor of the call; see `OnlineStore.changes`. `ids` is then empty.
    """

    ids: list[str]
    cursor: str
    lost: bool


class OnlineStore(Protocol):
    """Rows and records by bundle. The highest sequence number wins.

    Guarantees:

    - A row or record is written whole or not at all, and a reader never sees a part of a write.
    - A call that writes several rows or records is not a transaction. After a failure some may be written, and the same
      call again completes the write.
    - Every read after a write has returned sees the write.
    - Sequence numbers are in 0..`MAX_SEQ`. An equal number does not overwrite, so a replay changes nothing.
    - All methods may be called from several threads.
    - Arguments of a wrong type, shape, dtype or range raise `StoreError` before anything is written.
    """

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """Creates a table for a bundle. Does nothing if the bundle has the same table.

        Must not be called while another process drops the same bundle, since the drop could remove the new table.

        Args:
            bundle: Id of the bundle.
            rows: Number of rows.
            dim: Dimension of a row.
            storage: Format of the rows, one of `STORAGES`.

        Raises:
            StoreError: The bundle has a table of another shape or storage.
        """
        ...

    def table(self, bundle: str) -> StoredTable:
        """Returns the bundle's table.

        Raises:
            StoreError: The bundle has no table.
        """
        ...

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """Writes each row whose sequence number is higher than the stored number. The stream uses this method.

        Args:
            bundle: Id of a bundle with a table.
            rows: (N,) int64 in 0..R-1, in any order. If a row occurs several times, the highest sequence number counts,
                and among equal numbers the first.
            seqs: (N,) int64 sequence numbers.
            vectors: (N, D) float32, finite. Stored in the table's format.
            again: True also writes rows with an equal number, which repairs damaged rows and changes no intact row.

        Returns:
            Number of distinct written rows. If a connection was lost and the call was sent again, the number may be too
            low, since rows of the first try are not counted.

        Raises:
            StoreError: The bundle is not loaded, or an argument is wrong.
        """
        ...

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """Writes the whole table at one sequence number, fast.

        The result equals `write_rows` of all rows. A row whose stored number is `seq` or higher is unchanged, so the
        stream may write at the same time.

        Args:
            bundle: Id of a bundle with a table.
            vectors: (R, D) float32, finite.
            seq: Sequence number of all rows, 0 for the published bundle.
        """
        ...

    def read_rows(self, bundle: str, rows: Int64) -> Float32:
        """Reads vectors in one round trip. Servers use this method.

        Args:
            bundle: Id of a bundle with a table.
            rows: (N,) int64 in 0..R-1, in any order. A row may occur several times.

        Returns:
            (N, D) float32 in the order of `rows`, zero for rows that were never written. The caller may change the
            array.

        Raises:
            StoreError: The bundle is not loaded, or a row is out of range.
        """
        ...

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """Reads the sequence numbers of rows (N,) in one round trip.

        Returns:
            (N,) int64 in the order of `rows`, `NEVER` for rows that were never written.
        """
        ...

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """Reads the whole table: vectors (R, D) float32 and sequence numbers (R,) int64.

        Each vector fits its sequence number, but rows are read at slightly different moments. To get the exact table, a
        mirror then folds the log from an offset before the call.
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
        """Writes each record whose sequence number is higher than the stored number. Repeats count as in `write_rows`.

        Records need no table, so a bundle's items may arrive before its rows.

        Args:
            bundle: Id of a bundle.
            kind: Kind of the records, such as "item". Ids are unique within a kind.
            ids: N ids.
            seqs: N sequence numbers.
            payloads: N payloads, which the store does not interpret.
            again: As in `write_rows`.

        Returns:
            Number of distinct written records.
        """
        ...

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """Reads the payloads of records in one round trip, in the order of `ids`. None for a missing record."""
        ...

    def read_kinds(self, bundle: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """Reads records of several kinds in one round trip.

        Args:
            bundle: Any bundle.
            wanted: Ids by kind.

        Returns:
            Payloads by kind, in the order of the ids; None for a record that is not there.
        """
        ...

    def scan_records(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """Yields the ids and payloads of all records of a kind, in lists and in any order.

        A record that exists during the whole scan is yielded at least once. A record that is written or removed during
        the scan may be yielded or not.
        """
        ...

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """Returns ids of written records after a cursor, and a limited number per call.

        The writes of one record are in order. Writes of different records may be in another order.

        The store keeps the last few thousand writes of a kind. A follower starts with the cursor "" and repeats the
        call with the returned cursor until no ids are returned.

        Args:
            bundle: Id of a bundle.
            kind: Kind of the records, one of `FOLLOWED`.
            cursor: Cursor of the last write that the follower knows.

        Returns:
            The writes, with `lost` if the store does not know the cursor's write. The reason is a first call, a call
            too late, or a store that was dropped, emptied or restored to an older state. A follower that then scans
            all records and continues with the returned cursor misses no write.
        """
        ...

    def forget_records(self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int]) -> int:
        """Removes each record whose sequence number is lower than a number, and refuses older writes from now on.

        The store remembers the removal under a salted hash of the id, so that a slower writer does not bring the record
        back. A record at the number or above stays, and may be written. Followers do not see the removal.

        Args:
            bundle: Id of a bundle.
            kind: Kind of the records.
            ids: N ids. Unknown ids are remembered too.
            seqs: N sequence numbers of the removals.

        Returns:
            Number of removed records.
        """
        ...

    def remove_records(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """Removes records. Unknown ids are ignored, and followers do not see the removal."""
        ...

    def drop(self, bundle: str) -> None:
        """Removes the bundle's table and all its records. Does nothing if the store has no such bundle."""
        ...

    def expire(self, bundle: str, *, after_s: float) -> None:
        """Drops a bundle after a time, unless `keep` cancels the drop. The bundle works until then.

        Call this method for a bundle from which no server will answer. The drop needs no running client.

        Args:
            bundle: Id of a bundle with a table.
            after_s: Time until the drop, seconds.

        Raises:
            StoreError: The bundle has no table.
        """
        ...

    def keep(self, bundle: str) -> bool:
        """Cancels `expire`.

        A bundle that is about to expire is dropped instead and must be loaded again.

        Returns:
            True if the store has the whole bundle, and it will not expire.

        Raises:
            StoreError: The store does not answer.
        """
        ...

    def renew(self, bundle: str, *, least_s: float) -> None:
        """Extends the time of a bundle that expires in less than `least_s` seconds to `2 * least_s` seconds.

        A server calls this method while it answers from a bundle that another server has released. A bundle that does
        not expire is unchanged.
        """
        ...

    def incarnation(self) -> str:
        """Returns an id of the store's last start. Writes before that start may have been lost."""
        ...

    def ping(self) -> None:
        """Checks that the store answers.

        Raises:
            StoreError: The store does not answer.
        """
        ...

    def close(self) -> None:
        """Closes the connections. May be called twice."""
        ...
