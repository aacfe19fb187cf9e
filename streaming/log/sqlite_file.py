"""The SQLite file of the embedded event log: its tables, its write lock, and the questions that readers ask.

Every method raises LogError if the file cannot be read or written.
"""

import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.errors import LogError
from streaming.log.protocol import Message, Positions, unknown_topic

FORMAT = 1

# A message's rowid is its partition's id above, its offset below: messages are then in reading order in the table's own
# tree, and a second tree for (partition, offset) is saved. 2**40 offsets a partition, 2**23 partitions.
_OFFSET_BITS = 40

_SCHEMA = (
    "CREATE TABLE partition (id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL,"
    " next_offset INTEGER NOT NULL DEFAULT 0, UNIQUE (topic, number)) STRICT",
    "CREATE TABLE message (id INTEGER PRIMARY KEY, key BLOB, value BLOB NOT NULL,"
    " timestamp_ms INTEGER NOT NULL) STRICT",
    "CREATE TABLE committed (group_id TEXT NOT NULL, topic TEXT NOT NULL, number INTEGER NOT NULL,"
    " position INTEGER NOT NULL, PRIMARY KEY (group_id, topic, number)) STRICT, WITHOUT ROWID",
    "CREATE TABLE transactor (id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    f"PRAGMA user_version = {FORMAT}",
)

_BUSY_S = 30.0


def row_id(partition_id: int, offset: int) -> int:
    """Returns the row id of a message."""
    return (partition_id << _OFFSET_BITS) + offset


class LogFile:
    """Connection to the SQLite file, shared by the threads of this process.

    Args:
        path: The file. It and its directory are created if they are missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self._errors_named():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._errors_named():
                self._enter_wal()
                # FULL, not NORMAL: with a write-ahead log NORMAL syncs at checkpoints only, and a power cut could
                # take back appends that had returned. "Durable on return" costs one fsync a commit.
                self._connection.execute("PRAGMA synchronous = FULL")
            self._create()
        except BaseException:
            self._connection.close()
            raise

    def _enter_wal(self) -> None:
        # SQLite does not wait for its lock when it changes the journal mode, so processes that open a new file at the
        # same moment have to try again.
        give_up = time.monotonic() + _BUSY_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.01)

    def _create(self) -> None:
        with self.write() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise LogError(f"{self.path}: expected an event log, got another program's database; name another")
                for statement in _SCHEMA:
                    connection.execute(statement)
                version = FORMAT
            if version != FORMAT:
                raise LogError(
                    f"{self.path}: expected log format {FORMAT}, got {version}; use the release that wrote it"
                )
            # The table is separate from the format number, so that earlier releases can still read the file.
            connection.execute("CREATE TABLE IF NOT EXISTS incarnation (id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID")
            if not connection.execute("SELECT count(*) FROM incarnation").fetchone()[0]:
                connection.execute("INSERT INTO incarnation VALUES (?)", (uuid.uuid4().hex,))

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Holds the file's write lock; the body's changes are durable on exit, or undone if it raises."""
        with self._lock, self._errors_named():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rewrite(self, rows: Sequence[tuple[bytes | None, bytes, int]]) -> None:
        """Replaces keys and values of messages in one transaction, given as key, value and row id.

        The file is then built again from its messages: a page that was split when messages were appended keeps a copy
        of their bytes in its free space. Building needs as much disk again. The write-ahead log is emptied if no other
        process reads. After an interruption, the next call ends the work, with or without rows.
        """
        with self._lock, self._errors_named():
            with self.write() as connection:
                connection.executemany("UPDATE message SET key = ?, value = ? WHERE id = ?", rows)
            self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def rows(self, query: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Returns the rows of a query."""
        with self._lock, self._errors_named():
            return self._connection.execute(query, arguments).fetchall()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LogError(
                f"{self.path}: the event log failed ({error}); check path, disk and other writers"
            ) from error

    def close(self) -> None:
        """Closes the connection."""
        with self._lock:
            self._connection.close()

    def partitions(self, topic: str) -> dict[int, tuple[int, int]]:
        """Returns {number: (id, next offset)} of a topic; raises LogError if it does not exist."""
        rows = self.rows("SELECT number, id, next_offset FROM partition WHERE topic = ? ORDER BY number", topic)
        if not rows:
            raise unknown_topic(topic, (name for (name,) in self.rows("SELECT DISTINCT topic FROM partition")))
        return {number: (id_, end) for number, id_, end in rows}

    def messages(self, topic: str, number: int, id_: int, *, start: int, stop: int, limit: int) -> list[Message]:
        """Returns messages of a partition by offset, from `start` up to and without `stop`, at most `limit`."""
        base = row_id(id_, 0)
        rows = self.rows(
            "SELECT id, key, value, timestamp_ms FROM message WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
            *(base + start, base + stop, limit),
        )
        return [Message(topic, number, row - base, key, value, at_ms) for row, key, value, at_ms in rows]

    def first_since(self, id_: int, end: int, timestamp_ms: int) -> int:
        """Returns the offset of a partition's first message of a time or after it, or its end."""
        base = row_id(id_, 0)
        query = "SELECT id FROM message WHERE id >= ? AND id < ? AND timestamp_ms >= ? ORDER BY id LIMIT 1"
        rows = self.rows(query, base, base + end, timestamp_ms)
        return rows[0][0] - base if rows else end

    def committed(self, topics: Sequence[str], group: str) -> Positions:
        """Returns the committed positions of a group in some topics."""
        known = {(topic, number) for topic in topics for number in self.partitions(topic)}
        rows = self.rows("SELECT topic, number, position FROM committed WHERE group_id = ?", group)
        return {(topic, number): position for topic, number, position in rows if (topic, number) in known}
