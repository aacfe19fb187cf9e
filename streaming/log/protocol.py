"""The event log: the one durable, ordered source that every online state is a fold of.

Two implementations keep this protocol: `streaming.log.sqlite.LocalLog` (SQLite, embedded) and
`streaming.log.kafka.KafkaLog`. One contract suite, `tests/contract/test_event_log.py`, runs against both.

Order: messages of one partition are read in the order of their offsets, which is the order they were committed in.
Between partitions no order is promised.

Positions: a position is always the offset of the NEXT message to read, one past the last one returned. A fresh group is
at 0; a group that has read offsets 0..41 is at 42. Offsets of one partition grow but may have gaps.

Delivery: reading is at least once. It is exactly once in effect if the results of the messages and the position after
them are committed by one `Transaction`.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from features.errors import LogError, OversizedError

Positions = dict[tuple[str, int], int]
"""Next offset to read per (topic, partition)."""

MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest size in bytes of a message with its key; a topic on Kafka may be set to accept less."""


@dataclass(frozen=True, slots=True)
class Message:
    """Committed record, with the address that makes a replay repeatable.

    Attributes:
        topic: Topic of the message.
        partition: 0-based partition of the topic.
        offset: Offset in the partition; the position after this message is `offset + 1`.
        key: Bytes that chose the partition, or None.
        value: Payload; may be empty.
        timestamp_ms: Time of the append, milliseconds since the epoch, by the writer's clock.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    timestamp_ms: int


class Reader(Protocol):
    """Reader of some topics on behalf of a group, from the group's committed positions on.

    One thread uses a reader at a time.
    """

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Returns the next messages, at most `max_messages`.

        Returns as soon as that many have arrived, or with fewer when `timeout_s` has passed. Only committed messages
        are returned, in offset order within a partition, and each moves `position()` to its offset + 1. The first poll
        joins the group before the time starts to count. An empty list means that nothing arrived in time, not that the
        end is reached: compare `position()` with `EventLog.end_offsets()` for that.

        Raises:
            LogError: The log does not answer, or the group could not be joined.
        """
        ...

    def position(self) -> Positions:
        """Returns the next offset to read of every partition this reader holds, 0 if nothing was read yet.

        At the end of a partition it equals `EventLog.end_offsets()`, even if the last entries are not messages.
        """
        ...

    def rewind(self) -> None:
        """Goes back to the group's committed positions, so that messages of an aborted transaction are read again.

        A reader with a `start` does not go back before it.
        """
        ...

    def commit(self) -> None:
        """Commits `position()` for the group at once, outside a transaction.

        Raises:
            LogError: Partitions have moved to another reader since they were read; `rewind()` and read again.
        """
        ...

    def close(self) -> None:
        """Leaves the group without committing. A second call does nothing."""
        ...


class Follower(Protocol):
    """Reader of the one partition of a topic from a position on, for itself alone: nothing is committed or shared.

    One thread uses a follower at a time.
    """

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Returns the next messages, at most `max_messages`: as soon as there are any, or none after the timeout.

        Raises:
            LogError: The log does not answer.
        """
        ...

    def close(self) -> None:
        """Closes the connection. A second call does nothing."""
        ...


class Transaction(Protocol):
    """Messages and positions that become visible together, or not at all. Valid only inside `Transactor.begin()`."""

    def append(self, topic: str, value: bytes, *, key: bytes | None = None) -> None:
        """Adds one message. It gets its offset, and can be read, when the transaction has committed.

        Raises:
            LogError: The topic does not exist.
            OversizedError: The message is larger than the log accepts.
            FencedError: A newer transactor has the same id.
        """
        ...

    def commit_offsets(self, reader: Reader) -> None:
        """Makes the present `reader.position()` the group's committed position when the transaction commits.

        Raises:
            LogError: Partitions have moved to another reader since they were read; let the transaction abort,
                `rewind()` and read again.
            FencedError: A newer transactor has the same id.
        """
        ...


class Transactor(Protocol):
    """Writer of transactions under one id, of which only the newest holder may write."""

    def begin(self) -> AbstractContextManager[Transaction]:
        """Opens a transaction: it commits when the `with` body ends, and aborts when the body raises.

        When the body has ended without an error, the transaction is durable. Readers see it at once on a LocalLog, and
        within milliseconds on Kafka. After an abort none of it is ever visible, and the reader's position is still
        after the messages it read: call `rewind()` to read them again.

        Raises:
            OversizedError: A message is larger than its topic accepts; make a new transactor, this one cannot continue.
            FencedError: A newer transactor has the same id. On Kafka this shows at the first exchange with the broker,
                so a transaction in which nothing was written may end without it.
            LogError: A transaction is open already, or the log does not answer.
        """
        ...

    def close(self) -> None:
        """Releases the id's resources. A second call does nothing."""
        ...


@dataclass(frozen=True)
class Kept:
    """Retention of a topic. State is rebuilt from a snapshot and later messages, so keep more than that.

    Attributes:
        seconds: Seconds that messages stay; None: forever.
        newest_by_key: True also drops a message that has a newer one of its key, when it is older than a day.
    """

    seconds: float | None = None
    newest_by_key: bool = False


class EventLog(Protocol):
    """Topics of partitions of messages. Close readers and transactors before the log they came from."""

    def create_topics(self, partitions: Mapping[str, int], kept: Mapping[str, Kept] | None = None) -> None:
        """Creates the topics that do not exist, {name: number of partitions}; returns when they can be used.

        `kept` sets the retention of each topic; by default everything is kept.

        An existing topic keeps its partition count, whatever is requested, because a changed count would send a key
        to another partition and break its order.
        """
        ...

    def append(self, topic: str, messages: Sequence[tuple[bytes | None, bytes]]) -> None:
        """Appends (key, value) pairs; on return all of them are durable and can be read.

        Messages with one key go to one partition, in the given order; messages without a key alternate. If this raises,
        some of them may have been written: appending again delivers at least once.

        Raises:
            OversizedError: A message is larger than the log, or the topic, accepts.
            LogError: The topic does not exist, or the log did not accept the messages.
        """
        ...

    def reader(
        self, topics: Sequence[str], *, group: str, sole: bool = False, start: Positions | None = None
    ) -> Reader:
        """Returns a reader that starts at the group's committed positions, or at the beginning if there are none.

        A `sole` reader reads all partitions and does not join the group, so it waits for no other reader and loses no
        partition to one. It is for a caller that is fenced in another way, by a transactor that commits its positions.

        `start` sets the positions of a sole reader instead, for a caller that stores positions with the results of the
        messages. If a position is no longer kept, reading starts at the oldest message that is. Other partitions start
        at the group's position.
        """
        ...

    def follow(self, topic: str, start: int) -> Follower:
        """Returns a follower of a topic's partition 0 from offset `start` on.

        Raises:
            LogError: There is no such topic, or messages from `start` on are no longer kept.
        """
        ...

    def transactor(self, transactional_id: str) -> Transactor:
        """Returns a transactor and fences older ones of the same id: their next transaction raises FencedError."""
        ...

    def committed(self, topics: Sequence[str], *, group: str) -> Positions:
        """Returns the group's committed position in the partitions of the topics that have one.

        A partition has none if the group never committed, or if the log has deleted it: Kafka does so when a group has
        had no member for `offsets.retention.minutes`, a week by default.
        """
        ...

    def offsets_at(self, topic: str, timestamp_ms: int) -> dict[int, int]:
        """Returns per partition the offset of the first kept message that was appended at a time or after it.

        Without such a message it is the end offset; for time 0 it is the first message that is kept.
        """
        ...

    def identity(self, topic: str) -> str:
        """Returns an id that distinguishes this topic from any other, even from a later topic of the same name."""
        ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Returns per partition the position after its last committed message; 0 if nothing was appended.

        Messages of open transactions do not count, nor do messages appended after the oldest open transaction.
        """
        ...

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        """Yields the committed messages with start <= offset < stop, in order, without a group.

        Ends at `stop` or at the end offset at the time of the call, whichever is first; it never waits for more.

        Raises:
            LogError: There is no such topic or partition, or messages from `start` on are no longer kept.
        """
        ...

    def close(self) -> None:
        """Closes connections and files. A second call does nothing."""
        ...


_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")


def check_partitions(partitions: Mapping[str, int]) -> None:
    """Refuses topic names and partition counts that not every implementation accepts.

    Raises:
        LogError: Names the topic at fault.
    """
    for topic, count in partitions.items():
        if not _NAME.fullmatch(topic) or topic in {".", ".."}:
            raise LogError(
                f"topic {topic!r}: expected 1 to 249 of the characters A-Z a-z 0-9 . _ -, and not . or ..; rename it"
            )
        if count < 1:
            raise LogError(f"topic {topic!r}: expected 1 partition or more, got {count}; ask for at least 1")


def check_poll(max_messages: int, timeout_s: float) -> None:
    """Refuses arguments of `Reader.poll` that would never return a message.

    Raises:
        LogError: Names the argument at fault.
    """
    if max_messages < 1:
        raise LogError(f"max_messages: expected 1 or more, got {max_messages}")
    if timeout_s < 0:
        raise LogError(f"timeout_s: expected 0 or more seconds, got {timeout_s}")


def check_size(topic: str, key: bytes | None, value: bytes) -> None:
    """Refuses a message that not every implementation accepts.

    Raises:
        OversizedError: Key and value are larger than `MESSAGE_BYTES`.
    """
    if (size := len(key or b"") + len(value)) > MESSAGE_BYTES:
        raise OversizedError(f"topic {topic!r}: a message of {size} bytes, at most {MESSAGE_BYTES} are accepted")


def unknown_topic(topic: str, known: Iterable[str]) -> LogError:
    """Returns the error for a topic that does not exist, naming those that do, the nearest first."""
    names = sorted(known, key=lambda name: (-difflib.SequenceMatcher(None, topic, name).ratio(), name))
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return LogError(f"topic {topic!r} does not exist; there is {listed or 'none yet'}. Create it with create_topics.")


def unknown_partition(topic: str, partition: int, count: int) -> LogError:
    """Returns the error for a partition that the topic does not have."""
    return LogError(f"partition: topic {topic!r} has partitions 0 to {count - 1}, got {partition}")
