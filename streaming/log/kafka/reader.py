"""Readers of Kafka: a member of a group, a sole reader in a group's name, a follower without a group."""

import time
from collections.abc import Sequence

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.structs import ConsumerGroupMetadata, MemberState

from features.errors import LogError
from streaming.log.client import Membership
from streaming.log.kafka.client import REQUEST_MS, as_message, errors_named
from streaming.log.protocol import Message, Positions, check_poll, first_offsets

_JOIN_S = 60.0
# Interval at which an idle follower checks that the broker answers, and its wait for that answer.
_ASK_EVERY_S, _ANSWER_S = 1.0, 5.0
# Number of messages that a sole reader takes from the client at once. Each call of the client waits several times for
# the client's thread, and that is longer than to decode the messages of a small poll.
_AHEAD = 2_048
# A sole reader that found nothing does not ask again without a timeout before this time: the fetch in flight waits for
# messages as long, see `fetch_max_wait_ms`.
_QUIET_S = 0.02


class KafkaReader:
    """Member of a consumer group; see `Reader` for the contract.

    Several readers of a group share its partitions. After a rebalance of the group, messages that this reader has
    returned and not committed may go to another reader: its next commit then raises LogError until `rewind()`.
    """

    _most_at_once = 0
    _quiet_s = 0.0

    def __init__(self, consumer: KafkaConsumer, group: str) -> None:
        self.group = group
        self._consumer = consumer
        self._member: tuple[int, str] | None = None
        self._position: Positions = {}
        # Messages that are read and not returned yet, in the order of each partition.
        self._ahead: list[Message] = []
        self._quiet_until = 0.0
        # Number of messages returned since the reader was made, and how many of them were before the last commit.
        self._returned = 0
        self._settled = 0
        self._stale = False

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        with errors_named(f"poll for group {self.group!r}"):
            self._join()
            if timeout_s > 0 or len(self._ahead) >= max_messages or time.monotonic() >= self._quiet_until:
                self._fill(max_messages, timeout_s)
            messages, self._ahead = self._ahead[:max_messages], self._ahead[max_messages:]
            self._note_position()
        self._returned += len(messages)
        return messages

    def _fill(self, max_messages: int, timeout_s: float) -> None:
        """Reads until `max_messages` messages are there to return, or until the timeout."""
        deadline = time.monotonic() + timeout_s
        while (wanted := max_messages - len(self._ahead)) > 0:
            left_ms = max(0.0, 1000 * (deadline - time.monotonic()))
            records = self._consumer.poll(timeout_ms=left_ms, max_records=max(wanted, self._most_at_once))
            if self._moved():
                # The group was rebalanced meanwhile: earlier messages may belong to another reader now.
                self._join()
            else:
                self._ahead += [as_message(record) for records in records.values() for record in records]
            if time.monotonic() >= deadline:
                break
        if not self._ahead:
            self._quiet_until = time.monotonic() + self._quiet_s

    def unread(self, messages: Sequence[Message]) -> None:
        self._ahead = [*messages, *self._ahead]
        self._position |= first_offsets(messages)
        self._returned -= len(messages)

    def _moved(self) -> bool:
        now: ConsumerGroupMetadata = self._consumer.group_metadata()
        return now.state != MemberState.STABLE or (now.generation_id, now.member_id) != self._member

    def _join(self) -> None:
        """Waits until the group has given this reader its partitions, and moves to their committed positions."""
        if not self._moved():
            return
        self._stale = self._stale or self._returned > self._settled
        give_up = time.monotonic() + _JOIN_S
        while (now := self._consumer.group_metadata()).state != MemberState.STABLE:
            if time.monotonic() > give_up:
                raise LogError(
                    f"group {self.group!r}: expected to join within {_JOIN_S:.0f} s; another reader of the group may "
                    "hang: end it, or read with another group"
                )
            # Messages returned here are read again: the seek below goes back to the committed positions.
            self._consumer.poll(timeout_ms=50)
        self._member = (now.generation_id, now.member_id)
        self._seek_committed()

    def _seek_committed(self) -> None:
        self._ahead = []
        assigned = sorted(self._consumer.assignment())
        start = self._consumer.beginning_offsets(assigned, timeout_ms=REQUEST_MS) if assigned else {}
        for partition in assigned:
            position = self._consumer.committed(partition, timeout_ms=REQUEST_MS)
            self._consumer.seek(partition, max(self._first(partition, position or 0), start[partition]))
        self._note_position()

    def _first(self, partition: TopicPartition, position: int) -> int:
        """Returns the offset at which reading continues in a partition."""
        return position

    def _note_position(self) -> None:
        self._position = {
            (partition.topic, partition.partition): self._consumer.position(partition, timeout_ms=REQUEST_MS)
            for partition in self._consumer.assignment()
        }
        left = set(self._position)
        for message in self._ahead:
            if not left:
                break
            if (place := (message.topic, message.partition)) in left:
                self._position[place] = message.offset
                left.remove(place)

    def position(self) -> Positions:
        if self._member is None:
            with errors_named(f"position of group {self.group!r}"):
                self._join()
        return dict(self._position)

    def rewind(self) -> None:
        with errors_named(f"rewind of group {self.group!r}"):
            self._join()
            self._seek_committed()
        self._stale = False
        self._returned = self._settled = 0

    def committable(self) -> Positions:
        """Returns `position()`. Raises LogError if this reader may not commit it."""
        position = self.position()
        if self._stale or self._moved():
            raise LogError(
                f"group {self.group!r}: its partitions were reassigned after they were read here; abort the "
                "transaction, rewind() and read again"
            )
        return position

    def membership(self) -> Membership:
        """Returns the group, member and generation that positions are committed under."""
        now: ConsumerGroupMetadata = self._consumer.group_metadata()
        return Membership(self.group, now.generation_id, now.member_id)

    def returned(self) -> int:
        """Returns the number of messages returned so far, to be passed to `settle` when they are committed."""
        return self._returned

    def settle(self, returned: int) -> None:
        """Notes that the first `returned` messages are before the committed position."""
        self._settled = max(self._settled, returned)

    def commit(self) -> None:
        with errors_named(f"commit for group {self.group!r}"):
            self._consumer.commit(as_offsets(self.committable()), timeout_ms=REQUEST_MS)
        self.settle(self._returned)

    def close(self) -> None:
        self._consumer.close(autocommit=False)


def as_offsets(positions: Positions) -> dict[TopicPartition, OffsetAndMetadata]:
    """Returns positions in the client's terms."""
    return {TopicPartition(*place): OffsetAndMetadata(at, "", -1) for place, at in positions.items()}


class KafkaSoleReader(KafkaReader):
    """Reads all partitions in a group's name without joining it; see `EventLog.reader`."""

    _most_at_once = _AHEAD
    _quiet_s = _QUIET_S

    def __init__(self, consumer: KafkaConsumer, group: str, start: Positions | None = None) -> None:
        super().__init__(consumer, group)
        self._start = start or {}
        self._started = False

    def _first(self, partition: TopicPartition, position: int) -> int:
        start = self._start.get((partition.topic, partition.partition))
        if start is None:
            return position
        return max(position, start) if self._started else start

    def _moved(self) -> bool:
        return False

    def _join(self) -> None:
        if not self._started:
            self._seek_committed()
            self._started = True

    def position(self) -> Positions:
        with errors_named(f"position of group {self.group!r}"):
            self._join()
        return dict(self._position)


class KafkaFollower:
    """Consumer without a group; see `Follower` for the contract."""

    def __init__(self, consumer: KafkaConsumer, partitions: Sequence[TopicPartition]) -> None:
        self._consumer = consumer
        self._partitions = list(partitions)
        self._heard = time.monotonic()

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        with errors_named(f"follow {self._partitions[0].topic!r}"):
            while True:
                left_ms = max(0.0, 1000 * (deadline - time.monotonic()))
                found = self._consumer.poll(timeout_ms=left_ms, max_records=max_messages)
                records = [record for part in found.values() for record in part]
                if records:
                    self._heard = time.monotonic()
                # A fetch of transaction markers alone returns early and empty.
                if records or time.monotonic() >= deadline:
                    self._make_sure()
                    return [as_message(record) for record in records]

    def _make_sure(self) -> None:
        """Raises if the broker is unavailable: the client's own poll then returns nothing, as from an idle topic."""
        if time.monotonic() - self._heard > _ASK_EVERY_S:
            self._consumer.end_offsets(self._partitions, timeout_ms=1_000 * _ANSWER_S)
            self._heard = time.monotonic()

    def close(self) -> None:
        self._consumer.close(autocommit=False)
