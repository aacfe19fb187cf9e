"""The event log in one SQLite file: the embedded default, so that a laptop needs no broker.

Several processes may read and write the file at once. SQLite lets one of them write at a time, so a transaction
gathers its messages in memory and writes them in one short `BEGIN IMMEDIATE` when it commits.

A group may have ONE active reader: partitions are not shared. A second reader of the group would get the same messages,
and the positions committed last would win.

No message is deleted, since all other state is rebuilt from the log. `LocalLog.rewrite` alone changes messages.
"""

import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from features.errors import FencedError, LogError
from streaming.log.protocol import (
    Kept,
    Message,
    Offsets,
    Positions,
    Reader,
    check_partitions,
    check_poll,
    check_size,
    first_offsets,
    offset_in,
    unknown_partition,
)
from streaming.log.sqlite_file import LogFile, row_id

_READ_CHUNK = 1000
_SLEEP_S, _LONGEST_SLEEP_S = 0.002, 0.02

_Pending = tuple[str, bytes | None, bytes, int | None]


class LocalReader:
    """Reader of a group that has no other active reader; see `Reader` for the contract."""

    def __init__(self, file: LogFile, topics: Sequence[str], group: str, start: Positions | None = None) -> None:
        self.group = group
        self._start = start or {}
        self._file = file
        self._ids = {(topic, n): id_ for topic in topics for n, (id_, _) in file.partitions(topic).items()}
        self._topics = tuple(topics)
        self._turn = 0
        self._position: Positions = dict.fromkeys(self._ids, 0) | self._file.committed(self._topics, group)
        self._position |= {partition: at for partition, at in self._start.items() if partition in self._ids}

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        sleep_s = _SLEEP_S
        messages = self._take(max_messages)
        while len(messages) < max_messages and (left_s := deadline - time.monotonic()) > 0:
            time.sleep(min(sleep_s, left_s))
            sleep_s = min(1.5 * sleep_s, _LONGEST_SLEEP_S)
            messages += self._take(max_messages - len(messages))
        return messages

    def _take(self, limit: int) -> list[Message]:
        ends = {id_: end for topic in self._topics for id_, end in self._file.partitions(topic).values()}
        # Each poll starts at another partition, so that a long backlog in one does not starve the others.
        self._turn += 1
        pivot = self._turn % len(self._ids) if self._ids else 0
        partitions = list(self._ids.items())
        messages: list[Message] = []
        for (topic, number), id_ in partitions[pivot:] + partitions[:pivot]:
            start, room = self._position[topic, number], limit - len(messages)
            if start < ends[id_] and room > 0:
                chunk = self._file.messages(topic, number, id_, start=start, stop=ends[id_], limit=room)
                messages += chunk
                self._position[topic, number] = chunk[-1].offset + 1
        return messages

    def unread(self, messages: Sequence[Message]) -> None:
        self._position |= first_offsets(messages)

    def position(self) -> Positions:
        return dict(self._position)

    def rewind(self) -> None:
        at = dict.fromkeys(self._ids, 0) | self._file.committed(self._topics, self.group)
        self._position = {partition: max(offset, self._start.get(partition, 0)) for partition, offset in at.items()}

    def commit(self) -> None:
        with self._file.write() as connection:
            _write_positions(connection, self.group, self._position)

    def close(self) -> None:
        """Does nothing: the file belongs to the log."""


class LocalFollower:
    """Follower of one topic; see `Follower` for the contract."""

    def __init__(self, file: LogFile, topic: str, start: Offsets) -> None:
        self._file = file
        self._topic = topic
        self._at = {number: offset_in(start, number) for number in file.partitions(topic)}
        self._turn = 0

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            if messages := self._take(max_messages):
                return messages
            if time.monotonic() >= deadline:
                return []
            time.sleep(_SLEEP_S)

    def _take(self, limit: int) -> list[Message]:
        self._turn += 1
        messages: list[Message] = []
        partitions = list(self._file.partitions(self._topic).items())
        pivot = self._turn % len(partitions)
        for number, (id_, end) in partitions[pivot:] + partitions[:pivot]:
            start, room = self._at[number], limit - len(messages)
            if start < end and room > 0:
                messages += self._file.messages(self._topic, number, id_, start=start, stop=end, limit=room)
                self._at[number] = messages[-1].offset + 1
        return messages

    def close(self) -> None:
        """Does nothing: the file belongs to the log."""


class LocalTransaction:
    """Messages and positions gathered until the commit; see `Transaction` for the contract."""

    def __init__(self, file: LogFile) -> None:
        self._file = file
        self._known: dict[str, int] = {}
        self.messages: list[_Pending] = []
        self.positions: dict[str, Positions] = {}

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        if topic not in self._known:
            self._known[topic] = len(self._file.partitions(topic))
        if partition is not None and not 0 <= partition < self._known[topic]:
            raise unknown_partition(topic, partition, self._known[topic])
        check_size(topic, key, value)
        self.messages.append((topic, key, value, partition))

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, LocalReader):
            raise LogError(f"reader: expected one that this log made, got {type(reader).__name__}")
        self.commit_positions(reader.group, reader.position())

    def commit_positions(self, group: str, positions: Positions) -> None:
        self.positions.setdefault(group, {}).update(positions)


class LocalTransactor:
    """Holder of a transactional id; see `Transactor` for the contract."""

    def __init__(self, log: "LocalLog", file: LogFile, transactional_id: str) -> None:
        self._log = log
        self._file = file
        self._id = transactional_id
        self._open = False
        with file.write() as connection:
            ((self._epoch,),) = connection.execute(
                "INSERT INTO transactor VALUES (?, 1) ON CONFLICT (id) DO UPDATE SET epoch = epoch + 1 RETURNING epoch",
                (transactional_id,),
            ).fetchall()

    @contextmanager
    def begin(self) -> Iterator[LocalTransaction]:
        if self._open:
            raise LogError(f"transactor {self._id!r}: a transaction is open already; end it before the next begin()")
        self._check_epoch()
        self._open = True
        try:
            transaction = LocalTransaction(self._file)
            yield transaction
            with self._file.write() as connection:
                self._check_epoch()
                self._log.write_messages(connection, transaction.messages)
                for group, positions in transaction.positions.items():
                    _write_positions(connection, group, positions)
        finally:
            self._open = False

    def _check_epoch(self) -> None:
        ((epoch,),) = self._file.rows("SELECT epoch FROM transactor WHERE id = ?", self._id)
        if epoch != self._epoch:
            raise FencedError(
                f"transactor {self._id!r}: expected to be the newest holder of the id (epoch {self._epoch}), but epoch "
                f"{epoch} has taken over; stop this writer"
            )

    def close(self) -> None:
        """Does nothing: the file belongs to the log."""


class LocalLog:
    """Event log in one SQLite file, made if it is missing; see `EventLog` for the contract.

    Raises:
        LogError: The file is not an event log, or has another format.
    """

    def __init__(self, path: Path) -> None:
        self._file = LogFile(path)
        self._turn = count()

    def create_topics(self, partitions: Mapping[str, int], kept: Mapping[str, Kept] | None = None) -> None:
        check_partitions(partitions)
        for topic, rule in (kept or {}).items():
            if rule != Kept():
                raise LogError(f"topic {topic!r}: the embedded log keeps everything; set TESSERA_KAFKA to keep less")
        with self._file.write() as connection:
            known = {topic for (topic,) in connection.execute("SELECT DISTINCT topic FROM partition")}
            for topic, number in partitions.items():
                if topic not in known:
                    rows = [(topic, n) for n in range(number)]
                    connection.executemany("INSERT INTO partition (topic, number) VALUES (?, ?)", rows)

    def append(self, topic: str, messages: Sequence[tuple[bytes | None, bytes]]) -> None:
        self._file.partitions(topic)
        for key, value in messages:
            check_size(topic, key, value)
        with self._file.write() as connection:
            self.write_messages(connection, [(topic, key, value, None) for key, value in messages])

    def write_messages(self, connection: sqlite3.Connection, messages: Sequence[_Pending]) -> None:
        """Gives each message its partition and offset, inside the caller's `LogFile.write()`."""
        at_ms = time.time_ns() // 1_000_000
        tables = {topic: self._file.partitions(topic) for topic in {topic for topic, *_ in messages}}
        ends = {id_: end for table in tables.values() for id_, end in table.values()}
        rows = []
        for topic, key, value, partition in messages:
            turn = partition
            if turn is None:
                turn = next(self._turn) if key is None else zlib.crc32(key)
            id_, _ = tables[topic][turn % len(tables[topic])]
            rows.append((row_id(id_, ends[id_]), key, value, at_ms))
            ends[id_] += 1
        connection.executemany("INSERT INTO message VALUES (?, ?, ?, ?)", rows)
        moved = [(end, id_) for id_, end in ends.items()]
        connection.executemany("UPDATE partition SET next_offset = ? WHERE id = ?", moved)

    def reader(
        self, topics: Sequence[str], *, group: str, sole: bool = False, start: Positions | None = None
    ) -> LocalReader:
        return LocalReader(self._file, topics, group, start)

    def follow(self, topic: str, start: Offsets) -> LocalFollower:
        return LocalFollower(self._file, topic, start)

    def transactor(self, transactional_id: str) -> LocalTransactor:
        return LocalTransactor(self, self._file, transactional_id)

    def committed(self, topics: Sequence[str], *, group: str) -> Positions:
        return self._file.committed(topics, group)

    def end_offsets(self, topic: str) -> dict[int, int]:
        return {number: end for number, (_, end) in self._file.partitions(topic).items()}

    def offsets_at(self, topic: str, timestamp_ms: int) -> dict[int, int]:
        return {
            number: self._file.first_since(id_, end, timestamp_ms)
            for number, (id_, end) in self._file.partitions(topic).items()
        }

    def identity(self, topic: str) -> str:
        self._file.partitions(topic)
        ((incarnation,),) = self._file.rows("SELECT id FROM incarnation")
        return str(incarnation)

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        table = self._file.partitions(topic)
        if partition not in table:
            raise unknown_partition(topic, partition, len(table))
        id_, end = table[partition]
        return self._read(topic, partition, id_, max(start, 0), min(stop, end))

    def _read(self, topic: str, partition: int, id_: int, start: int, stop: int) -> Iterator[Message]:
        # Messages are read in chunks, because an open cursor would keep the write-ahead log from being checkpointed.
        while start < stop:
            chunk = self._file.messages(topic, partition, id_, start=start, stop=stop, limit=_READ_CHUNK)
            yield from chunk
            start = chunk[-1].offset + 1

    def rewrite(self, messages: Sequence[Message]) -> None:
        """Replaces keys and values of kept messages at once, and leaves no old bytes in the file.

        Addresses and times stay. On return the change is durable.

        Args:
            messages: The new messages, each with the address of a kept message.
        """
        topics = {topic: self._file.partitions(topic) for topic in {message.topic for message in messages}}
        rows = [
            (message.key, message.value, row_id(topics[message.topic][message.partition][0], message.offset))
            for message in messages
        ]
        self._file.rewrite(rows)

    def close(self) -> None:
        self._file.close()


def _write_positions(connection: sqlite3.Connection, group: str, positions: Positions) -> None:
    rows = [(group, topic, number, position) for (topic, number), position in positions.items()]
    connection.executemany("INSERT OR REPLACE INTO committed VALUES (?, ?, ?, ?)", rows)
