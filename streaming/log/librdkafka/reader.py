"""Readers of Kafka on librdkafka: a sole reader in a group's name, and a follower without a group."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from streaming.log.client import Membership
from streaming.log.librdkafka.fault import errors_named
from streaming.log.protocol import Message, Positions, check_poll, first_offsets

_REQUEST_S = 30.0
# Interval at which an idle follower checks that the broker answers, and its wait for that answer.
_ASK_EVERY_S, _ANSWER_S = 1.0, 5.0
# A call of librdkafka does not end for a signal, so one call waits no longer, and returns no more messages.
_WAIT_S, _MOST = 0.5, 10_000
# librdkafka tries again by itself after these.
_TRANSIENT = (KafkaError._TRANSPORT, KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError._TIMED_OUT)


class LibrdkafkaSoleReader:
    """Reads all partitions in a group's name without joining it; see `EventLog.reader`.

    librdkafka fetches in the background, so a poll without a timeout returns messages that have arrived.
    """

    def __init__(
        self, consumer: Consumer, partitions: Sequence[tuple[str, int]], group: str, start: Positions | None = None
    ) -> None:
        self.group = group
        self._consumer = consumer
        self._partitions = list(partitions)
        self._start = start or {}
        self._started = False
        self._position: Positions = {}
        # Messages that are read and not returned yet.
        self._ahead: list[Message] = []
        # Position at which each partition last ended. No message is between the last one read and this position.
        self._ends: Positions = {}

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        with errors_named(f"poll for group {self.group!r}"):
            self._join()
            self._fill(max_messages, timeout_s)
        messages, self._ahead = self._ahead[:max_messages], self._ahead[max_messages:]
        self._position |= {(message.topic, message.partition): message.offset + 1 for message in messages}
        if not self._ahead:
            for place, end in self._ends.items():
                self._position[place] = max(self._position[place], end)
        return messages

    def _fill(self, max_messages: int, timeout_s: float) -> None:
        """Reads until `max_messages` messages are there to return, or until the timeout."""
        deadline = time.monotonic() + timeout_s
        while (wanted := max_messages - len(self._ahead)) > 0:
            left_s = max(0.0, deadline - time.monotonic())
            records = self._consumer.consume(min(wanted, _MOST), min(left_s, _WAIT_S))
            messages, ends = taken(records)
            self._ahead += messages
            self._ends |= ends
            if time.monotonic() >= deadline and (timeout_s > 0 or not records):
                break

    def unread(self, messages: Sequence[Message]) -> None:
        self._ahead = [*messages, *self._ahead]
        self._position |= first_offsets(messages)

    def _join(self) -> None:
        if not self._started:
            self._seek_committed()
            self._started = True

    def _seek_committed(self) -> None:
        """Moves to the committed positions, or to the start at first. Messages that were fetched are dropped."""
        asked = [TopicPartition(*place) for place in self._partitions]
        committed = {(found.topic, found.partition): found for found in self._consumer.committed(asked, _REQUEST_S)}
        for found in committed.values():
            if found.error:
                raise KafkaException(found.error)
        oldest = oldest_offsets(self._consumer, self._partitions)
        self._position = {
            place: max(self._first(place, max(0, committed[place].offset)), oldest[place]) for place in self._partitions
        }
        self._ahead, self._ends = [], {}
        self._consumer.unassign()
        self._consumer.assign([TopicPartition(*place, at) for place, at in self._position.items()])

    def _first(self, place: tuple[str, int], position: int) -> int:
        """Returns the offset at which reading continues in a partition."""
        start = self._start.get(place)
        if start is None:
            return position
        return max(position, start) if self._started else start

    def position(self) -> Positions:
        with errors_named(f"position of group {self.group!r}"):
            self._join()
        return dict(self._position)

    def rewind(self) -> None:
        with errors_named(f"rewind of group {self.group!r}"):
            self._join()
            self._seek_committed()

    def membership(self) -> Membership:
        """Returns the group's name alone: the broker checks no generation of a reader that did not join."""
        return Membership(self.group)

    def committable(self) -> Positions:
        """Returns `position()`, which this reader may always commit."""
        return self.position()

    def returned(self) -> int:
        """Returns 0: no partition of this reader moves, so there is nothing to settle."""
        return 0

    def settle(self, returned: int) -> None:
        """Does nothing; see `returned`."""

    def commit(self) -> None:
        with errors_named(f"commit for group {self.group!r}"):
            offsets = [TopicPartition(*place, at) for place, at in self.position().items()]
            for done in self._consumer.commit(offsets=offsets, asynchronous=False):
                if done.error:
                    raise KafkaException(done.error)

    def close(self) -> None:
        self._consumer.close()


class LibrdkafkaFollower:
    """Consumer without a group; see `Follower` for the contract."""

    def __init__(self, consumer: Consumer, topic: str, partitions: Sequence[int]) -> None:
        self._consumer = consumer
        self._partitions = [(topic, partition) for partition in partitions]
        self._heard = time.monotonic()

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        with errors_named(f"follow {self._partitions[0][0]!r}"):
            while True:
                left_s = max(0.0, deadline - time.monotonic())
                # A call for many waits until all of them have come, so one is waited for and the rest is taken.
                records = self._consumer.consume(1, min(left_s, _WAIT_S))
                messages, _ = taken(records)
                if messages:
                    self._heard = time.monotonic()
                    if max_messages > 1:
                        messages += taken(self._consumer.consume(min(max_messages - 1, _MOST), 0))[0]
                elif records:
                    continue
                if messages or time.monotonic() >= deadline:
                    self._make_sure()
                    return messages

    def _make_sure(self) -> None:
        """Raises if the broker is unavailable: the client's own poll then returns nothing, as from an idle topic."""
        if time.monotonic() - self._heard > _ASK_EVERY_S:
            oldest_offsets(self._consumer, self._partitions, timeout_s=_ANSWER_S)
            self._heard = time.monotonic()

    def close(self) -> None:
        self._consumer.close()


def taken(records: Iterable[Any]) -> tuple[list[Message], Positions]:
    """Returns the messages among a client's records, and positions of partitions that ended.

    Raises:
        KafkaException: A record is an error that does not pass.
    """
    messages: list[Message] = []
    ends: Positions = {}
    for record in records:
        if (error := record.error()) is None:
            messages.append(
                Message(
                    record.topic(),
                    record.partition(),
                    record.offset(),
                    record.key(),
                    record.value() or b"",
                    record.timestamp()[1],
                )
            )
        elif error.code() == KafkaError._PARTITION_EOF:
            ends[record.topic(), record.partition()] = record.offset()
        elif error.code() not in _TRANSIENT and not error.retriable():
            raise KafkaException(error)
    return messages, ends


def oldest_offsets(
    consumer: Consumer, partitions: Iterable[tuple[str, int]], *, timeout_s: float = _REQUEST_S
) -> Positions:
    """Returns the oldest kept offset of partitions, in one request to each broker."""
    # The time of a lookup by time may be one of the protocol's two special ones.
    asked = [TopicPartition(*place, OFFSET_BEGINNING) for place in partitions]
    found = consumer.offsets_for_times(asked, timeout_s)
    for partition in found:
        if partition.error:
            raise KafkaException(partition.error)
    return {(partition.topic, partition.partition): partition.offset for partition in found}
