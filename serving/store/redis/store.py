"""The online store on Redis: pages of rows, compared and replaced inside the server.

Keys of a share of a bundle. A bundle on one server has one share; `serving.store.redis.spread` has the keys of others:

    tessera:{bundle}:table           shape and layout of the table; every access compares this mark
    tessera:{bundle}:page:N          rows 64 N to 64 N + 63 in the layout of `serving.store.page`
    tessera:{bundle}:kinds           set of the kinds of records
    tessera:{bundle}:record:KIND     hash, id → seq and payload
    tessera:{bundle}:removed:KIND    hash, salted hash of an id → seq of the record's last removal, and the salt
    tessera:{bundle}:changes:KIND    stream of the last writes of a kind with followers: a mark, and the ids

Keys of a bundle's home, which is the only share or lies beside the shares:

    tessera:{bundle}:table           the mark of the table, which exists while the table does
    tessera:{bundle}:dropping        the table's mark while its pages are removed, so that a later call can finish
    tessera:{bundle}:shares          number of shares, on a cluster

A script is atomic and decides by sequence number, so writers need no lock. The scripts are in
`serving/store/redis/lua/`. `serving.store.redis.servers` finds the server of a slot.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

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
    key_of,
    page_bytes,
    page_count,
    parse_mark,
    row_type,
    table_mark,
    unpack,
)
from serving.store.protocol import Changes, Float32, Int64, StoredTable
from serving.store.redis.calls import gather_calls, load_calls, page_packets, write_calls
from serving.store.redis.commands import RedisCommands
from serving.store.redis.layouts import Layouts
from serving.store.redis.records import RedisRecords
from serving.store.redis.scripts import Script
from serving.store.redis.servers import name_of
from serving.store.redis.spread import Spread

_READ_ROWS = 65_536  # rows of one round trip
_WRITE_ROWS = 16_000
_TABLE_PAGES = 1024
_CUT_BYTES = 2_000  # bytes over the network that cost as much time as cutting one row in the script
_LEAST_LEFT_MS = 30_000


class _Known(NamedTuple):
    """Table of a bundle as this client knows it, with the mark that the servers compare."""

    table: StoredTable
    mark: bytes
    spread: Spread


class RedisStore:
    """Online store on a Redis server, version 6.2 or later, or on a cluster; see `OnlineStore`.

    A read of rows is a script call for each share, which cuts the rows out of their pages. The calls are sent to all
    nodes at once. If whole pages move faster than the script cuts, the read is an MGET of the pages. A round trip reads
    up to 65,536 rows.

    Connections are opened on first use, and opened again when they are lost. A call is tried a few times, which is safe
    since every write may be repeated. If the server has lost a script, the script is loaded again.

    Args:
        address: Address of the servers; see `serving.store.redis.servers.open_servers`.
    """

    def __init__(self, address: str) -> None:
        self._redis = RedisCommands(address)
        self._layouts = Layouts(self._redis)
        self._records = RedisRecords(self._redis, self._layouts)
        self._tables: dict[str, _Known] = {}
        self._leave: weakref.finalize[..., RedisStore] | None = None

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """See `OnlineStore.create_table`."""
        check_name("bundle", bundle)
        table = StoredTable(rows=rows, dim=dim, storage=storage)
        if self._redis.command(bundle, "EXISTS", key_of(bundle, "dropping")):
            self.drop(bundle)
        self._layouts.forget(bundle)  # the node of the home may have lost its data
        spread = self._layouts.state(bundle)
        own, home = table_mark(table, spread.shares), key_of(bundle, "table")
        shares = spread.keys("table")
        # The home's mark is last, so that each share of a table has a mark unless its node has lost it.
        self._redis.all([(key, ("SET", key, own, "NX")) for key in shares])
        self._redis.command(bundle, "SET", home, own, "NX")
        self._tables.pop(bundle, None)
        stored = self._table(bundle)
        if stored.spread.shares > 1 and stored.table != table:
            self._redis.all([(key, ("SET", key, stored.mark)) for key in shares])
        if stored.table != table:
            raise StoreError(
                f"bundle {bundle!r} has a table of {stored.table}, not {table}; drop it, or name another bundle"
            )

    def table(self, bundle: str) -> StoredTable:
        """See `OnlineStore.table`."""
        return self._table(bundle).table

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """See `OnlineStore.write_rows`. A script call writes 1,000 rows, since Redis runs nothing else meanwhile."""
        known = self._table(bundle)
        check_write(known.table, rows, seqs, vectors)
        written = 0
        for part in chunks(newest_rows(rows, seqs), _WRITE_ROWS):
            calls = write_calls(known.spread, known.table, rows[part], seqs[part], vectors[part], again=again)
            replies = self._redis.run(_WRITE, calls)
            if None in replies:
                return self._changed(bundle, known).write_rows(bundle, rows, seqs, vectors, again=again)
            written += sum(replies)
        return written

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """See `OnlineStore.load_rows`. Absent pages are written whole, and existing pages row by row."""
        known = self._table(bundle)
        table = known.table
        check_seq("seq", seq)
        check_vectors(vectors, rows=table.rows, dim=table.dim)
        for part in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            pages, calls = zip(*load_calls(known.spread, table, part, vectors, seq), strict=True)
            replies = self._redis.run(_LOAD, calls)
            if None in replies:
                self._changed(bundle, known).load_rows(bundle, vectors, seq=seq)
                return
            present = np.concatenate(
                [own[found] for own, found in zip(pages, replies, strict=True) if found] or [part[:0]]
            )
            rows = (present[:, None] * PAGE_ROWS + np.arange(PAGE_ROWS)).reshape(-1)
            rows = rows[rows < table.rows]
            if len(rows):
                self.write_rows(bundle, rows, np.full(len(rows), seq), vectors[rows])

    def read_rows(self, bundle: str, rows: Int64) -> Float32:
        """See `OnlineStore.read_rows`."""
        table = self._table(bundle).table
        check_rows(table, rows)
        if len(np.unique(rows // PAGE_ROWS)) * page_bytes(table) < len(rows) * _CUT_BYTES:
            pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
            stored = self._pages(bundle, pages)
            if self._table(bundle).table != table:  # the table was recreated meanwhile, in another shape
                return self.read_rows(bundle, rows)
            return unpack(stored["vector"][index * PAGE_ROWS + rows % PAGE_ROWS])
        table, data = self._cut(bundle, rows, seqs=False)
        return decode_vectors(table, data)

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """See `OnlineStore.read_seqs`."""
        _, data = self._cut(bundle, rows, seqs=True)
        return decode_seqs(np.frombuffer(data, dtype=np.uint8).reshape(-1, SEQ_BYTES))

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """See `OnlineStore.read_table`. A round trip reads 1,024 pages."""
        table = self._table(bundle).table
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
        table, dropping, shares = (key_of(bundle, name) for name in ("table", "dropping", "shares"))
        self._redis.command(bundle, "RENAME", table, dropping)  # an error if there is no table, which is a reply
        self._layouts.forget(bundle)
        if (spread := self._layouts.find(bundle)) is None:
            return
        mark = self._redis.command(bundle, "GET", dropping)
        self._layouts.remove(spread, parse_mark(mark, spread.shares) if mark else None)
        self._redis.command(bundle, "UNLINK", dropping, shares)
        self._layouts.forget(bundle)

    def expire(self, bundle: str, *, after_s: float) -> None:
        """See `OnlineStore.expire`. The servers delete the keys, even if no client runs."""
        at_ms = int((time.time() + after_s) * 1_000)
        for keys in self._keys(bundle):
            self._redis.all([(key, ("PEXPIREAT", key, at_ms)) for key in keys])

    def keep(self, bundle: str) -> bool:
        """See `OnlineStore.keep`. A bundle of which a node has lost its shares is dropped too."""
        left_ms = int(self._redis.command(bundle, "PTTL", key_of(bundle, "table")))
        if left_ms == -2:  # Redis has no such key
            return False
        if 0 <= left_ms < _LEAST_LEFT_MS or self._lost(self._table(bundle)):
            # Keys might expire while this method keeps the bundle.
            self.drop(bundle)
            return False
        if left_ms != -1:  # the key expires
            for keys in reversed(list(self._keys(bundle))):  # the mark last, so that an interrupted call is repeated
                self._redis.all([(key, ("PERSIST", key)) for key in keys])
        return True

    def renew(self, bundle: str, *, least_s: float) -> None:
        """See `OnlineStore.renew`."""
        if 0 <= int(self._redis.command(bundle, "PTTL", key_of(bundle, "table"))) < 1_000 * least_s:
            self.expire(bundle, after_s=2 * least_s)

    def bytes_per_row(self, bundle: str) -> float:
        """Estimates the server's memory per row, bytes, with keys and overhead, from a sample of full pages."""
        known = self._table(bundle)
        full = max(1, known.table.rows // PAGE_ROWS)
        keys = known.spread.page_keys(np.unique(np.linspace(0, full - 1, 100).astype(np.int64)))
        sizes = self._redis.all([(key, ("MEMORY", "USAGE", key, "SAMPLES", 0)) for key in keys])
        return float(np.mean([size or 0 for size in sizes])) / min(PAGE_ROWS, known.table.rows)

    def facts(self) -> list[dict[str, str]]:
        """Returns the address, version, eviction policy, memory and persistence of every server."""

        def facts(client: redis.Redis) -> dict[str, str]:
            info = client.info()
            return {
                "server": name_of(client),
                "version": str(info["redis_version"]),
                "maxmemory_policy": str(info.get("maxmemory_policy", "")),
                "used_memory_human": str(info["used_memory_human"]),
                "persistence": "aof" if info.get("aof_enabled") else "rdb",
                "last_save": str(info.get("rdb_last_bgsave_status", "")),
            }

        return self._redis.every(facts)

    def in_one_slot(self, bundle: str) -> bool:
        """Returns True if a bundle lies on one node of a cluster that has more, as releases before shares loaded it."""
        return self._redis.servers.shares > 1 and self._table(bundle).spread.shares == 1

    def incarnation(self) -> str:
        """See `OnlineStore.incarnation`."""
        ids = self._redis.every(lambda client: str(client.info("server")["run_id"]))
        return " ".join(sorted(ids))

    def ping(self) -> None:
        """See `OnlineStore.ping`. A cluster must have a node for each hash slot."""
        self._redis.every(lambda client: client.ping())
        self._redis.require_coverage()

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

    def _table(self, bundle: str) -> _Known:
        """Returns the table and its mark, which are read once. Every script and read compares the mark again."""
        known = self._tables.get(bundle)
        if known is None:
            check_name("bundle", bundle)
            mark = self._redis.command(bundle, "GET", key_of(bundle, "table"))
            self._layouts.forget(bundle)
            spread = self._layouts.find(bundle)
            if mark is None or spread is None:
                raise not_loaded(bundle)
            known = self._tables[bundle] = _Known(parse_mark(mark, spread.shares), mark, spread)
        return known

    def _changed(self, bundle: str, known: _Known) -> "RedisStore":
        """Forgets an old mark. The table was dropped, and perhaps recreated in another shape.

        Raises:
            StoreError: The table is the same, but a node of a cluster has lost its shares.
        """
        self._tables.pop(bundle, None)
        if self._table(bundle).mark == known.mark and (lost := self._lost(known)):
            raise StoreError(
                f"bundle {bundle!r} is not loaded in the online store on {lost}: the node came back without its data; "
                "`tessera replay` or a running `tessera stream` fills the bundle again"
            )
        return self

    def _lost(self, known: _Known) -> str:
        """Returns the names of nodes that have lost shares of a table, or ""."""
        if known.spread.shares == 1:
            return ""
        marks = self._redis.all([(key, ("GET", key)) for key in known.spread.keys("table")])
        slots = [known.spread.slot(share) for share, mark in enumerate(marks) if mark != known.mark]
        return ", ".join(sorted({name_of(self._redis.servers.of(slot)) for slot in slots}))

    def _pages(self, bundle: str, pages: Int64) -> NDArray[np.void]:
        """Reads whole pages (N,) as rows (64 N,) of `row_type`."""
        known = self._table(bundle)
        order, packets = page_packets(known.spread, pages)
        size, data = page_bytes(known.table), []
        for ((mark, *stored),) in self._redis.trip(packets):
            if mark != known.mark:
                return self._changed(bundle, known)._pages(bundle, pages)
            data += stored
        cut = np.frombuffer(b"".join(page or bytes(size) for page in data), dtype=row_type(known.table))
        rows = np.empty_like(cut).reshape(-1, PAGE_ROWS)
        rows[order] = cut.reshape(-1, PAGE_ROWS)
        return rows.reshape(-1)

    def _cut(self, bundle: str, rows: Int64, *, seqs: bool) -> tuple[StoredTable, bytes]:
        """Reads the headers of rows (N,) if `seqs` is True, or else the vectors."""
        known = self._table(bundle)
        check_rows(known.table, rows)
        size = SEQ_BYTES if seqs else row_type(known.table).itemsize - SEQ_BYTES
        cut = np.empty(len(rows), dtype=f"V{size}")
        for start in range(0, len(rows), _READ_ROWS):
            order, calls = gather_calls(known.spread, known.table, rows[start : start + _READ_ROWS], seqs=seqs)
            replies = self._redis.run(_GATHER, calls)
            if None in replies:
                return self._changed(bundle, known)._cut(bundle, rows, seqs=seqs)
            cut[start + order] = np.frombuffer(b"".join(replies), dtype=cut.dtype)
        return known.table, cut.tobytes()

    def _keys(self, bundle: str) -> Iterable[list[bytes]]:
        """Yields all keys of a bundle in lists. The first list has the table's mark."""
        known = self._table(bundle)
        yield [key_of(bundle, "table"), key_of(bundle, "shares")]
        yield from self._layouts.keys(known.spread, known.table)


_GATHER, _WRITE, _LOAD = Script("gather"), Script("write_rows"), Script("load_pages")
