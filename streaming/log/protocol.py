"""The event log: durable, ordered messages. Every online state is a fold of the log.

Two implementations keep this protocol: `streaming.log.sqlite.LocalLog` (SQLite, embedded) and
`streaming.log.kafka.KafkaLog`. One contract suite, `tests/contract/test_event_log.py`, runs against both.

Order: the messages of a partition are read in the order of their offsets, which is the order of their commits. There is
no order between partitions.

Positions: a position is always the offset of the NEXT message to read, the last returned offset plus 1. A new group has
position 0, and a group that has read offsets 0..41 has position 42. Offsets of a partition grow and may have gaps.

Delivery: reading is at least once. If the results of the messages and the position after them are committed in the same
`Transaction`, the effect is exactly once.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from features.errors import LogError, OversizedError

Positions = dict[tuple[str, int], int]
"""Next offset to read per (topic, partition)."""

Offsets = tuple[int, ...]
"""Next offset to read of each partition of one topic, by number. Partitions beyond its length have offset 0."""

MESSAGE_BYTES = 8 * 1024 * 1024
"""Largest size of a message with its key, bytes. A topic on Kafka may have a smaller limit."""

BLANK = b'{"_forgotten":true}'
"""Value of a message whose content was removed by a rewrite of the log. Readers skip the message."""


@dataclass(frozen=True, slots=True)
class Message:
    """Committed record, with the address that makes a replay repeatable.

    Attributes:
        topic: Topic of the message.
        partition: 0-based partition of the topic.
        offset: Offset in the partition. The position after this message is `offset + 1`.
        key: Bytes that chose the partition, or None.
        value: Payload, may be empty.
        timestamp_ms: Time of the append, milliseconds since the epoch, by the writer's clock.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes
    timestamp_ms: int


class InputReader(Protocol):
    """Reader of messages from positions on. One thread uses a reader at a time."""

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Returns the next messages, at most `max_messages`.

        Returns as soon as `max_messages` messages have arrived, or with fewer after `timeout_s` seconds. Only committed
        messages are returned, in offset order within a partition. Each message moves `position()` to its offset + 1.
        The first poll joins the group before the timeout starts.

        An empty list means that no message arrived in time. To check for the end, compare `position()` with
        `EventLog.end_offsets()`.

        Raises:
            LogError: The log does not answer, or the group could not be joined.
        """
        ...

    def unread(self, messages: Sequence[Message]) -> None:
        """Gives back messages of the last poll, which the next poll returns again.

        Args:
            messages: The last messages of each partition among those that the poll returned.
        """
        ...

    def position(self) -> Positions:
        """Returns the next offset to read of every partition of this reader, 0 if no message was read yet.

        At the end of a partition this is `EventLog.end_offsets()`, even if the last entries are no messages.
        """
        ...

    def close(self) -> None:
        """Closes the reader without committing. A second call does nothing."""
        ...


class Reader(InputReader, Protocol):
    """Reader of some topics on behalf of a group, from the group's committed positions on."""

    def rewind(self) -> None:
        """Goes back to the group's committed positions, so that messages of an aborted transaction are read again.

        A reader with a `start` does not go back before the start.
        """
        ...

    def commit(self) -> None:
        """Commits `position()` for the group at once, outside a transaction.

        Raises:
            LogError: Partitions have moved to another reader since the last poll. Call `rewind()` and read again.
        """
        ...


class Follower(Protocol):
    """Reader of all partitions of a topic from positions on. A follower commits nothing and shares no partition.

    One thread uses a follower at a time.
    """

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        """Returns the next messages, at most `max_messages`, as soon as a message arrives. Empty after the timeout.

        Raises:
            LogError: The log does not answer.
        """
        ...

    def close(self) -> None:
        """Closes the connection. A second call does nothing."""
        ...


class Transaction(Protocol):
    """Messages and positions that become visible together or not at all. Valid only inside `Transactor.begin()`."""

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        """Adds a message. The message gets its offset, and can be read, after the commit of the transaction.

        Args:
            topic: Name of the topic.
            value: Payload.
            key: Chooses the partition, as in `EventLog.append`.
            partition: Number of the partition. None: the key chooses.

        Raises:
            LogError: The topic or the partition does not exist.
            OversizedError: The message is larger than the log accepts.
            FencedError: A newer transactor has the same id.
        """
        ...

    def commit_offsets(self, reader: Reader) -> None:
        """Sets the group's committed position to the current `reader.position()` when the transaction commits.

        Raises:
            LogError: Partitions have moved to another reader since the last poll. Let the transaction abort, call
                `rewind()` and read again.
            FencedError: A newer transactor has the same id.
        """
        ...

    def commit_positions(self, group: str, positions: Positions) -> None:
        """Sets committed positions of a group without members when the transaction commits.

        For a caller that reads all partitions, as a sole reader does, and that the transactor fences.

        Raises:
            FencedError: A newer transactor has the same id.
        """
        ...


class Transactor(Protocol):
    """Writer of transactions under an id. Only the newest transactor of an id may write."""

    def begin(self) -> AbstractContextManager[Transaction]:
        """Opens a transaction, which commits when the `with` body ends and aborts when the body raises.

        After the body has ended without an error, the transaction is durable. Readers see its messages at once on a
        LocalLog, and within milliseconds on Kafka. After an abort no message is ever visible. The reader's position is
        still after the messages that it read, so call `rewind()` to read them again.

        Raises:
            OversizedError: A message is larger than its topic accepts. Only a new transactor can continue.
            FencedError: A newer transactor has the same id. On Kafka the error appears at the first exchange with the
                broker, so an empty transaction may end without the error.
            LogError: A transaction is open already, or the log does not answer.
        """
        ...

    def close(self) -> None:
        """Releases the id's resources. A second call does nothing."""
        ...


@dataclass(frozen=True)
class Kept:
    """Retention of a topic. State is rebuilt from a snapshot and the messages after it, so these messages must be kept.

    Attributes:
        seconds: Time that messages stay, seconds. None: forever.
        newest_by_key: True also drops a message that is older than a day if a newer message has the same key.
    """

    seconds: float | None = None
    newest_by_key: bool = False


class EventLog(Protocol):
    """Topics of partitions of messages. Close all readers and transactors of a log before the log."""

    def create_topics(self, partitions: Mapping[str, int], kept: Mapping[str, Kept] | None = None) -> None:
        """Creates the topics that do not exist. Returns when the topics can be used.

        The number of partitions of an existing topic does not change, because a new number would send a key to another
        partition and break the key's order.

        Args:
            partitions: Number of partitions of each topic.
            kept: Retention of topics. All other topics keep all messages.
        """
        ...

    def append(self, topic: str, messages: Sequence[tuple[bytes | None, bytes]]) -> None:
        """Appends messages. On return all messages are durable and can be read.

        Messages with equal keys go to the same partition, in the given order. Messages without a key alternate between
        partitions. If the call raises, some messages may have been written, and another call delivers at least once.

        Args:
            topic: Name of the topic.
            messages: Key and value of each message.

        Raises:
            OversizedError: A message is larger than the log, or the topic, accepts.
            LogError: The topic does not exist, or the log did not accept the messages.
        """
        ...

    def reader(
        self, topics: Sequence[str], *, group: str, sole: bool = False, start: Positions | None = None
    ) -> Reader:
        """Returns a reader that starts at the group's committed positions, or at the beginning without such positions.

        Args:
            topics: Names of the topics.
            group: Name of the consumer group.
            sole: True reads all partitions without joining the group. Such a reader waits for no other reader and loses
                no partition. The caller must be fenced by a transactor that commits the positions.
            start: First positions of a sole reader, for a caller that stores positions with its results. If a position
                is no longer kept, reading starts at the oldest kept message. All other partitions start at the group's
                position.
        """
        ...

    def follow(self, topic: str, start: Offsets) -> Follower:
        """Returns a follower of a topic from the offset `start` of each partition on.

        Raises:
            LogError: The topic does not exist, or messages from `start` on are no longer kept.
        """
        ...

    def transactor(self, transactional_id: str) -> Transactor:
        """Returns a transactor. The next transaction of each older transactor of the id raises FencedError."""
        ...

    def committed(self, topics: Sequence[str], *, group: str) -> Positions:
        """Returns the group's committed positions in the partitions of the topics.

        A partition is absent if the group never committed a position, or if the log has deleted the position. Kafka
        deletes positions of a group without members after `offsets.retention.minutes`, a week by default.
        """
        ...

    def offsets_at(self, topic: str, timestamp_ms: int) -> dict[int, int]:
        """Returns the offset of the first kept message that was appended at a time or later, by partition.

        Without such a message the result is the end offset. For time 0 the result is the oldest kept message.

        Args:
            topic: Name of the topic.
            timestamp_ms: The time, Unix milliseconds.
        """
        ...

    def identity(self, topic: str) -> str:
        """Returns an id that distinguishes this topic from any other, even from a later topic of the same name."""
        ...

    def end_offsets(self, topic: str) -> dict[int, int]:
        """Returns the position after the last committed message, by partition, 0 for an empty partition.

        Messages of open transactions do not count, nor do messages appended after the oldest open transaction.
        """
        ...

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        """Yields the committed messages with start <= offset < stop, in order, without a group.

        Ends at `stop`, or at the end offset at the time of the call if it is smaller. Never waits for messages.

        Raises:
            LogError: The topic or partition does not exist, or messages from `start` on are no longer kept.
        """
        ...

    def close(self) -> None:
        """Closes connections and files. A second call does nothing."""
        ...


def first_offsets(messages: Iterable[Message]) -> Positions:
    """Returns the lowest offset of messages in each partition."""
    found: Positions = {}
    for message in messages:
        place = (message.topic, message.partition)
        found[place] = min(found.get(place, message.offset), message.offset)
    return found


def ends_of(log: EventLog, topic: str) -> Offsets:
    """Returns the position after the last committed message of each partition of a topic, by number."""
    return tuple(end for _, end in sorted(log.end_offsets(topic).items()))


def offset_in(offsets: Offsets, partition: int) -> int:
    """Returns the offset of a partition, 0 beyond the length of the offsets."""
    return offsets[partition] if partition < len(offsets) else 0


def lesser(one: Offsets, other: Offsets) -> Offsets:
    """Returns the smaller offset of each partition."""
    return tuple(map(min, zip_longest(one, other, fillvalue=0)))


def advanced(offsets: Offsets, messages: Iterable[Message]) -> Offsets:
    """Returns the offsets after messages of one topic."""
    found = dict(enumerate(offsets))
    for message in messages:
        found[message.partition] = message.offset + 1
    return tuple(found.get(number, 0) for number in range(max(found, default=-1) + 1))


_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")


def check_partitions(partitions: Mapping[str, int]) -> None:
    """Checks that every implementation accepts the names and partition counts of topics.

    Raises:
        LogError: A topic is not accepted.
    """
    for topic, count in partitions.items():
        if not _NAME.fullmatch(topic) or topic in {".", ".."}:
            raise LogError(
                f"topic {topic!r}: expected 1 to 249 of the characters A-Z a-z 0-9 . _ -, and not . or ..; rename it"
            )
        if count < 1:
            raise LogError(f"topic {topic!r}: expected 1 partition or more, got {count}; ask for at least 1")


def check_poll(max_messages: int, timeout_s: float) -> None:
    """Checks the arguments of `Reader.poll`.

    Raises:
        LogError: An argument is out of its range.
    """
    if max_messages < 1:
        raise LogError(f"max_messages: expected 1 or more, got {max_messages}")
    if timeout_s < 0:
        raise LogError(f"timeout_s: expected 0 or more seconds, got {timeout_s}")


def check_size(topic: str, key: bytes | None, value: bytes) -> None:
    """Checks that every implementation accepts the size of a message.

    Raises:
        OversizedError: Key and value are larger than `MESSAGE_BYTES`.
    """
    if (size := len(key or b"") + len(value)) > MESSAGE_BYTES:
        raise OversizedError(f"topic {topic!r}: a message of {size} bytes, at most {MESSAGE_BYTES} are accepted")


def unknown_topic(topic: str, known: Iterable[str]) -> LogError:
    """Returns the error for an unknown topic. The message lists the known topics, the most similar name first."""
    names = sorted(known, key=lambda name: (-difflib.SequenceMatcher(None, topic, name).ratio(), name))
    listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return LogError(f"topic {topic!r} does not exist; there is {listed or 'none yet'}. Create it with create_topics.")


def unknown_partition(topic: str, partition: int, count: int) -> LogError:
    """Returns the error for a partition that the topic does not have."""
    return LogError(f"partition: topic {topic!r} has partitions 0 to {count - 1}, got {partition}")
