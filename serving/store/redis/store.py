"""The online store on Redis: pages of rows, compared and replaced inside the server.

Keys of a bundle. The braces are part of the key and keep a bundle in one slot of a cluster:

    tessera:{bundle}:table           shape and layout of the table; every access compares this mark
    tessera:{bundle}:page:N          rows 64 N to 64 N + 63 in the layout of `serving.store.page`
    tessera:{bundle}:kinds           set of the kinds of records
    tessera:{bundle}:record:KIND     hash, id → seq and payload
    tessera:{bundle}:removed:KIND    hash, salted hash of an id → seq of the record's last removal, and the salt
    tessera:{bundle}:changes:KIND    stream of the last writes of a kind with followers: a mark, and the ids
    tessera:{bundle}:dropping        the table's mark while its pages are removed, so that a later call can finish

A script is atomic and decides by sequence number, so writers need no lock. The scripts are in
`serving/store/redis/lua/`. `serving.store.redis.servers` finds the server of a bundle.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import redis
from numpy.typing import NDArray

from features.errors import StoreError
from serving.store.check import (
    check_name,
    check_rows,
    check_seq,
    check_vectors,
    check_write,
    newest_rows,
    not_loaded,
)
from serving.store.page import (
    PAGE_ROWS,
    SEQ_BYTES,
    chunks,
    decode_seqs,
    decode_vectors,
    gather_call,
    key_of,
    load_call,
    page_bytes,
    page_count,
    page_keys,
    parse_mark,
    row_type,
    table_mark,
    unpack,
    write_call,
)
from serving.store.protocol import Changes, Float32, Int64, StoredTable
from serving.store.redis.commands import RedisCommands
from serving.store.redis.records import RedisRecords
from serving.store.redis.scripts import Script

_GATHER_ROWS = 4096  # rows of one script call, during which Redis answers no other client (about 5 ms)
_WRITE_ROWS = 1000
_LOAD_PAGES = 64
_TABLE_PAGES = 1024
_CUT_BYTES = 2_000  # bytes over the network that cost as much time as cutting one row in the script
_LEAST_LEFT_MS = 30_000


class RedisStore:
    """Online store on a Redis server, version 6.2 or later; see `OnlineStore`.

    A read of rows is a script call that cuts the rows out of their pages. If whole pages move faster than the script
    cuts, the read is an MGET of the pages. A round trip reads up to 65,536 rows or 8,000 records.

    Connections are opened on first use, and opened again when they are lost. A call is tried a few times, which is safe
    since every write may be repeated. If the server has lost a script, the script is loaded again.

    Args:
        address: Address of the servers; see `serving.store.redis.servers.open_servers`.
    """

    def __init__(self, address: str) -> None:
        self._redis = RedisCommands(address)
        self._records = RedisRecords(self._redis)
        self._tables: dict[str, tuple[StoredTable, bytes]] = {}
        self._leave: weakref.finalize[..., RedisStore] | None = None

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """See `OnlineStore.create_table`."""
        check_name("bundle", bundle)
        table = StoredTable(rows=rows, dim=dim, storage=storage)
        if self._redis.ask(bundle, lambda client: client.exists(key_of(bundle, "dropping"))):
            self.drop(bundle)
        self._redis.ask(bundle, lambda client: client.setnx(key_of(bundle, "table"), table_mark(table)))
        self._tables.pop(bundle, None)
        stored, _ = self._table(bundle)
        if stored != table:
            raise StoreError(f"bundle {bundle!r} has a table of {stored}, not {table}; drop it, or name another bundle")

    def table(self, bundle: str) -> StoredTable:
        """See `OnlineStore.table`."""
        return self._table(bundle)[0]

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """See `OnlineStore.write_rows`. A script call writes 1,000 rows, since Redis runs nothing else meanwhile."""
        table, _ = self._table(bundle)
        check_write(table, rows, seqs, vectors)
        kept = newest_rows(rows, seqs)
        calls = (
            write_call(bundle, table, rows[chunk], seqs[chunk], vectors[chunk], again=again)
            for chunk in chunks(kept, _WRITE_ROWS)
        )
        replies = self._redis.run(bundle, _WRITE, calls)
        if None in replies:
            return self._forget(bundle).write_rows(bundle, rows, seqs, vectors, again=again)
        return sum(replies)

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """See `OnlineStore.load_rows`. Absent pages are written whole, and existing pages row by row."""
        table, _ = self._table(bundle)
        check_seq("seq", seq)
        check_vectors(vectors, rows=table.rows, dim=table.dim)
        pages = list(chunks(np.arange(page_count(table)), _LOAD_PAGES))
        replies = self._redis.run(bundle, _LOAD, (load_call(bundle, table, chunk, vectors, seq) for chunk in pages))
        if None in replies:
            self._forget(bundle).load_rows(bundle, vectors, seq=seq)
            return
        for chunk, present in zip(pages, replies, strict=True):
            if not present:
                continue
            rows = (chunk[present][:, None] * PAGE_ROWS + np.arange(PAGE_ROWS)).reshape(-1)
            rows = rows[rows < table.rows]
            self.write_rows(bundle, rows, np.full(len(rows), seq), vectors[rows])

    def read_rows(self, bundle: str, rows: Int64) -> Float32:
        """See `OnlineStore.read_rows`."""
        table, _ = self._table(bundle)
        check_rows(table, rows)
        pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
        if len(pages) * page_bytes(table) < len(rows) * _CUT_BYTES:
            stored = self._pages(bundle, pages)
            if self._table(bundle)[0] != table:  # the table was recreated meanwhile, in another shape
                return self.read_rows(bundle, rows)
            return unpack(stored["vector"][index * PAGE_ROWS + rows % PAGE_ROWS])
        table, data = self._gather(bundle, rows, seqs=False)
        return decode_vectors(table, data)

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """See `OnlineStore.read_seqs`."""
        _, data = self._gather(bundle, rows, seqs=True)
        return decode_seqs(np.frombuffer(data, dtype=np.uint8).reshape(-1, SEQ_BYTES))

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """See `OnlineStore.read_table`. A round trip reads 1,024 pages."""
        table, _ = self._table(bundle)
        vectors = np.empty((table.rows, table.dim), dtype=np.float32)
        seqs = np.empty(table.rows, dtype=np.int64)
        for chunk in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            stored = self._pages(bundle, chunk)
            start = int(chunk[0]) * PAGE_ROWS
            stored = stored[: table.rows - start]  # the last page has rows beyond the table's end
            vectors[start : start + len(stored)] = unpack(stored["vector"])
            seqs[start : start + len(stored)] = decode_seqs(stored["seq"])
        return vectors, seqs

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
        return self._records.write(bundle, kind, ids, seqs, payloads, again)

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`."""
        return self._records.read(bundle, kind, ids)

    def read_kinds(self, bundle: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[bytes | None]]:
        """See `OnlineStore.read_kinds`."""
        return self._records.read_kinds(bundle, wanted)

    def scan_records(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """See `OnlineStore.scan_records`."""
        return self._records.scan(bundle, kind)

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """See `OnlineStore.changes`."""
        return self._records.changes(bundle, kind, cursor)

    def forget_records(self, bundle: str, kind: str, ids: Sequence[str], seqs: Sequence[int]) -> int:
        """See `OnlineStore.forget_records`."""
        return self._records.forget(bundle, kind, ids, seqs)

    def remove_records(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """See `OnlineStore.remove_records`."""
        self._records.remove(bundle, kind, ids)

    def drop(self, bundle: str) -> None:
        """See `OnlineStore.drop`. The table's mark is removed first, so that no client reads or writes a page."""
        check_name("bundle", bundle)
        self._tables.pop(bundle, None)
        table, dropping, kinds = (key_of(bundle, name) for name in ("table", "dropping", "kinds"))
        self._redis.ask(bundle, lambda client: _renamed(client, table, dropping))
        mark = self._redis.command(bundle, "GET", dropping)
        pages = page_count(parse_mark(mark)) if mark else 0
        for chunk in chunks(np.arange(pages), _TABLE_PAGES):
            self._redis.command(bundle, "UNLINK", *page_keys(bundle, chunk))
        self._redis.command(bundle, "UNLINK", *self._records.keys(bundle))
        self._redis.command(bundle, "UNLINK", dropping, kinds)

    def expire(self, bundle: str, *, after_s: float) -> None:
        """See `OnlineStore.expire`. The server deletes the keys, even if no client runs."""
        at_ms = int((time.time() + after_s) * 1_000)
        for keys in self._keys(bundle):
            self._redis.each(bundle, [("PEXPIREAT", key, at_ms) for key in keys])

    def keep(self, bundle: str) -> bool:
        """See `OnlineStore.keep`."""
        left_ms = int(self._redis.command(bundle, "PTTL", key_of(bundle, "table")))
        if left_ms == -2:  # Redis has no such key
            return False
        if left_ms == -1:  # the key does not expire
            return True
        if left_ms < _LEAST_LEFT_MS:
            # Keys might expire while this method keeps the bundle.
            self.drop(bundle)
            return False
        for keys in self._keys(bundle):
            self._redis.each(bundle, [("PERSIST", key) for key in keys])
        return True

    def renew(self, bundle: str, *, least_s: float) -> None:
        """See `OnlineStore.renew`."""
        if 0 <= int(self._redis.command(bundle, "PTTL", key_of(bundle, "table"))) < 1_000 * least_s:
            self.expire(bundle, after_s=2 * least_s)

    def bytes_per_row(self, bundle: str) -> float:
        """Estimates the server's memory per row, bytes, with keys and overhead, from a sample of full pages."""
        table, _ = self._table(bundle)
        full = max(1, table.rows // PAGE_ROWS)
        keys = page_keys(bundle, np.unique(np.linspace(0, full - 1, 100).astype(np.int64)))
        sizes = [int(self._redis.command(bundle, "MEMORY USAGE", key, "SAMPLES", 0) or 0) for key in keys]
        return float(np.mean(sizes)) / min(PAGE_ROWS, table.rows)

    def facts(self) -> list[dict[str, str]]:
        """Returns the version, the eviction policy, the memory and the persistence of every server."""

        def facts(client: redis.Redis) -> dict[str, str]:
            info = client.info()
            return {
                "version": str(info["redis_version"]),
                "maxmemory_policy": str(info.get("maxmemory_policy", "")),
                "used_memory_human": str(info["used_memory_human"]),
                "persistence": "aof" if info.get("aof_enabled") else "rdb",
                "last_save": str(info.get("rdb_last_bgsave_status", "")),
            }

        return self._redis.every(facts)

    def incarnation(self) -> str:
        """See `OnlineStore.incarnation`."""
        ids = self._redis.every(lambda client: str(client.info("server")["run_id"]))
        return " ".join(sorted(ids))

    def ping(self) -> None:
        """See `OnlineStore.ping`."""
        self._redis.every(lambda client: client.ping())

    def close(self) -> None:
        """See `OnlineStore.close`. The last store that closes stops an embedded server, which saves its data."""
        self._redis.close()
        if self._leave is not None:
            self._leave()

    def call_at_close(self, leave: Callable[[], None]) -> None:
        """Calls a function once when the store is closed or collected, or when the process ends.

        Args:
            leave: Function without a reference to the store.
        """
        self._leave = weakref.finalize(self, leave)

    def _table(self, bundle: str) -> tuple[StoredTable, bytes]:
        """Returns the table and its mark, which are read once. Every script and read compares the mark again."""
        known = self._tables.get(bundle)
        if known is None:
            check_name("bundle", bundle)
            mark = self._redis.command(bundle, "GET", key_of(bundle, "table"))
            if mark is None:
                raise not_loaded(bundle)
            known = self._tables[bundle] = (parse_mark(mark), mark)
        return known

    def _forget(self, bundle: str) -> "RedisStore":
        """Forgets an old mark. The table was dropped, and perhaps recreated in another shape."""
        self._tables.pop(bundle, None)
        return self

    def _pages(self, bundle: str, pages: Int64) -> NDArray[np.void]:
        """Reads whole pages (N,) as rows (64 N,) of `row_type`."""
        table, mark = self._table(bundle)
        stored_mark, *data = self._redis.command(bundle, "MGET", key_of(bundle, "table"), *page_keys(bundle, pages))
        if stored_mark != mark:
            return self._forget(bundle)._pages(bundle, pages)
        size = page_bytes(table)
        return np.frombuffer(b"".join(page or bytes(size) for page in data), dtype=row_type(table))

    def _gather(self, bundle: str, rows: Int64, *, seqs: bool) -> tuple[StoredTable, bytes]:
        table, _ = self._table(bundle)
        check_rows(table, rows)
        calls = (gather_call(bundle, table, chunk, seqs=seqs) for chunk in chunks(rows, _GATHER_ROWS))
        replies = self._redis.run(bundle, _GATHER, calls)
        if None in replies:
            return self._forget(bundle)._gather(bundle, rows, seqs=seqs)
        return table, b"".join(replies)

    def _keys(self, bundle: str) -> Iterable[list[bytes]]:
        """Yields all keys of a bundle in lists. The first list has the table's mark."""
        table, _ = self._table(bundle)
        yield [key_of(bundle, "table"), key_of(bundle, "kinds"), *self._records.keys(bundle)]
        for chunk in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            yield page_keys(bundle, chunk)


def _renamed(client: redis.Redis, source: bytes, target: bytes) -> None:
    with contextlib.suppress(redis.ResponseError):  # the source does not exist
        client.rename(source, target)


_GATHER, _WRITE, _LOAD = Script("gather"), Script("write_rows"), Script("load_pages")
