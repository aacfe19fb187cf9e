"""The online store in plain Python: the reference for the Redis store, and a store for unit tests.

Each row and each record is an entry of a dictionary, which is compared and replaced alone. The content is lost when the
process ends.
"""

import hashlib
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from features.errors import StoreError
from serving.store.check import (
    check_followed,
    check_name,
    check_rows,
    check_seq,
    check_vectors,
    check_write,
    encode_ids,
    newest_records,
    newest_rows,
    not_loaded,
)
from serving.store.page import pack, unpack
from serving.store.protocol import FOLLOWED, NEVER, Changes, Float32, Int64, StoredTable

_LEAST_LEFT_S = 30.0
_CHUNK = 500
_MOST_WRITES = 100_000


@dataclass
class _Rows:
    table: StoredTable
    newest: dict[int, tuple[int, Float32]] = field(default_factory=dict)


class _Writes:
    """The last writes to a kind of records. A cursor has the name of this list and a position in the list."""

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex
        self._first = 0
        self._ids: list[str] = []

    def add(self, ids: list[str]) -> None:
        self._ids += ids
        surplus = len(self._ids) - _MOST_WRITES
        if surplus > _MOST_WRITES:
            self._ids = self._ids[surplus:]
            self._first += surplus

    def since(self, cursor: str) -> Changes:
        name, _, position = cursor.partition(" ")
        end = self._first + len(self._ids)
        if name != self._name or int(position) < self._first:
            return Changes([], f"{self._name} {end}", True)
        return Changes(self._ids[int(position) - self._first :], f"{self._name} {end}", False)


class MemoryStore:
    """See `OnlineStore`; the reference implementation."""

    def __init__(self) -> None:
        self._tables: dict[str, _Rows] = {}
        self._records: dict[str, dict[str, dict[bytes, tuple[int, bytes]]]] = {}
        self._writes: dict[tuple[str, str], _Writes] = {}
        # Sequence number of the last removal, by bundle and kind, and by the hash of the id.
        self._removed: dict[tuple[str, str], dict[bytes, int]] = {}
        self._salt = secrets.token_bytes(16)
        self._until: dict[str, float] = {}
        self._lock = threading.RLock()

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """See `OnlineStore.create_table`."""
        check_name("bundle", bundle)
        table = StoredTable(rows=rows, dim=dim, storage=storage)
        with self._lock:
            stored = self._tables.setdefault(bundle, _Rows(table)).table
        if stored != table:
            raise StoreError(f"bundle {bundle!r} has a table of {stored}, not {table}; drop it, or name another bundle")

    def table(self, bundle: str) -> StoredTable:
        """See `OnlineStore.table`."""
        return self._rows(bundle).table

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """See `OnlineStore.write_rows`."""
        with self._lock:
            stored = self._rows(bundle)
            check_write(stored.table, rows, seqs, vectors)
            kept = newest_rows(rows, seqs)
            rounded = unpack(pack(stored.table, vectors[kept]))
            written = 0
            for row, seq, vector in zip(rows[kept].tolist(), seqs[kept].tolist(), rounded, strict=True):
                if row not in stored.newest or seq + again > stored.newest[row][0]:
                    stored.newest[row] = (seq, vector)
                    written += 1
            return written

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """See `OnlineStore.load_rows`."""
        with self._lock:
            table = self._rows(bundle).table
            check_seq("seq", seq)
            check_vectors(vectors, rows=table.rows, dim=table.dim)
            self.write_rows(bundle, np.arange(table.rows), np.full(table.rows, seq), vectors)

    def read_rows(self, bundle: str, rows: Int64) -> Float32:
        """See `OnlineStore.read_rows`."""
        with self._lock:
            stored = self._rows(bundle)
            check_rows(stored.table, rows)
            vectors = np.zeros((len(rows), stored.table.dim), dtype=np.float32)
            for position, row in enumerate(rows.tolist()):
                if row in stored.newest:
                    vectors[position] = stored.newest[row][1]
            return vectors

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """See `OnlineStore.read_seqs`."""
        with self._lock:
            stored = self._rows(bundle)
            check_rows(stored.table, rows)
            newest = stored.newest
            return np.array([newest[row][0] if row in newest else NEVER for row in rows.tolist()], np.int64)

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """See `OnlineStore.read_table`."""
        with self._lock:
            rows = np.arange(self._rows(bundle).table.rows)
            return self.read_rows(bundle, rows), self.read_seqs(bundle, rows)

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
        """See `OnlineStore.write_records`."""
        check_name("bundle", bundle)
        check_name("kind", kind)
        written: list[str] = []
        with self._lock:
            for name, seq, payload in newest_records(ids, seqs, payloads):
                stored = self._records.setdefault(bundle, {}).setdefault(kind, {})
                gone = self._removed.get((bundle, kind), {})
                if gone and seq < gone.get(self._hashed(name), seq):
                    continue
                if name not in stored or seq + again > stored[name][0]:
                    stored[name] = (seq, payload)
                    written.append(name.decode())
            if written and kind in FOLLOWED:
                self._writes.setdefault((bundle, kind), _Writes()).add(written)
        return len(written)

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`."""
        with self._lock:
            stored = self._kind(bundle, kind)
            return [stored[name][1] if name in stored else None for name in encode_ids(ids)]

    def read_kinds(self, bundle: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """See `OnlineStore.read_kinds`."""
        return {kind: self.read_records(bundle, kind, ids) for kind, ids in wanted.items()}

    def scan_records(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """See `OnlineStore.scan_records`. All records are of the same moment."""
        with self._lock:
            stored = list(self._kind(bundle, kind).items())
        for start in range(0, len(stored), _CHUNK):
            yield [(name.decode(), payload) for name, (_, payload) in stored[start : start + _CHUNK]]

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """See `OnlineStore.changes`."""
        check_followed(kind)
        with self._lock:
            self._kind(bundle, kind)  # drops the bundle if it has expired
            writes = self._writes.get((bundle, kind))
            if writes is None:
                if bundle not in self._tables:
                    return Changes([], "", True)
                writes = self._writes.setdefault((bundle, kind), _Writes())
            return writes.since(cursor)

    def forget_records(self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int]) -> int:
        """See `OnlineStore.forget_records`."""
        removed = 0
        with self._lock:
            stored = self._kind(bundle, kind)
            gone = self._removed.setdefault((bundle, kind), {})
            for name, seq, _ in newest_records(ids, seqs, [b""] * len(ids)):
                key = self._hashed(name)
                gone[key] = max(seq, gone.get(key, seq))
                if name in stored and stored[name][0] < seq:
                    del stored[name]
                    removed += 1
        return removed

    def _hashed(self, name: bytes) -> bytes:
        return hashlib.blake2b(name, key=self._salt, digest_size=16).digest()

    def remove_records(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """See `OnlineStore.remove_records`."""
        with self._lock:
            stored = self._kind(bundle, kind)
            for name in encode_ids(ids):
                stored.pop(name, None)

    def drop(self, bundle: str) -> None:
        """See `OnlineStore.drop`."""
        check_name("bundle", bundle)
        with self._lock:
            self._tables.pop(bundle, None)
            self._records.pop(bundle, None)
            self._until.pop(bundle, None)
            for kind in FOLLOWED:
                self._writes.pop((bundle, kind), None)
            for key in [key for key in self._removed if key[0] == bundle]:
                del self._removed[key]

    def expire(self, bundle: str, *, after_s: float) -> None:
        """See `OnlineStore.expire`."""
        with self._lock:
            self._rows(bundle)
            self._until[bundle] = time.monotonic() + after_s

    def keep(self, bundle: str) -> bool:
        """See `OnlineStore.keep`."""
        check_name("bundle", bundle)
        with self._lock:
            if bundle in self._tables and self._until.get(bundle, float("inf")) - time.monotonic() < _LEAST_LEFT_S:
                self.drop(bundle)
            self._until.pop(bundle, None)
            return bundle in self._tables

    def renew(self, bundle: str, *, least_s: float) -> None:
        """See `OnlineStore.renew`."""
        check_name("bundle", bundle)
        with self._lock:
            self._forget_expired(bundle)
            if self._until.get(bundle, float("inf")) - time.monotonic() < least_s:
                self._until[bundle] = time.monotonic() + 2 * least_s

    def _forget_expired(self, bundle: str) -> None:
        if self._until.get(bundle, float("inf")) <= time.monotonic():
            self.drop(bundle)

    def incarnation(self) -> str:
        """See `OnlineStore.incarnation`. Memory starts once."""
        return "memory"

    def ping(self) -> None:
        """See `OnlineStore.ping`. Memory always answers."""

    def close(self) -> None:
        """See `OnlineStore.close`. Memory has no connections."""

    def _rows(self, bundle: str) -> _Rows:
        check_name("bundle", bundle)
        self._forget_expired(bundle)
        if bundle not in self._tables:
            raise not_loaded(bundle)
        return self._tables[bundle]

    def _kind(self, bundle: str, kind: str) -> dict[bytes, tuple[int, bytes]]:
        check_name("bundle", bundle)
        check_name("kind", kind)
        self._forget_expired(bundle)
        return self._records.get(bundle, {}).get(kind, {})
