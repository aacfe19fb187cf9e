"""Transactions on librdkafka: a producer with a transactional id, of which only the newest may write."""

import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from confluent_kafka import KafkaException, Producer, TopicPartition

from features.errors import FencedError, LogError
from streaming.log.client import GroupReader, Membership, MessagePlaces
from streaming.log.faults import foreign_reader, open_already
from streaming.log.librdkafka.fault import client_error, errors_named
from streaming.log.protocol import Positions, Reader

_REQUEST_S = 30.0
# Timeout that lets a commit take as long as the transaction may.
_AS_LONG_AS_OPEN = -1


class LibrdkafkaTransaction:
    """Open transaction of a producer; see `Transaction` for the contract."""

    def __init__(self, producer: Producer, doing: str, places: MessagePlaces) -> None:
        self._producer = producer
        self._doing = doing
        self._places = places
        self._read: list[tuple[GroupReader, int]] = []

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        place = self._places.place(topic, key, value, partition)
        with errors_named(self._doing):
            deadline = time.monotonic() + _REQUEST_S
            while True:
                try:
                    self._producer.produce(topic, value, key, -1 if place is None else place)
                except BufferError:
                    # The client's queue is full: its messages are on their way.
                    if time.monotonic() > deadline:
                        raise
                    self._producer.poll(0.05)
                else:
                    return

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, GroupReader):
            raise foreign_reader(reader)
        self._send_positions(reader.membership(), reader.committable())
        self._read.append((reader, reader.returned()))

    def commit_positions(self, group: str, positions: Positions) -> None:
        self._send_positions(Membership(group), positions)

    def _send_positions(self, membership: Membership, positions: Positions) -> None:
        offsets = [TopicPartition(*place, at) for place, at in positions.items()]
        with errors_named(self._doing):
            self._producer.send_offsets_to_transaction(offsets, packed(membership), _REQUEST_S)

    def commit(self) -> None:
        # A message that failed lets the commit fail, so no message's own result is asked for.
        self._producer.commit_transaction(_AS_LONG_AS_OPEN)
        for reader, returned in self._read:
            reader.settle(returned)


class LibrdkafkaTransactor:
    """Producer with a transactional id; see `Transactor` for the contract."""

    def __init__(self, producer: Producer, transactional_id: str, places: MessagePlaces) -> None:
        self._producer: Producer | None = producer
        self._places = places
        self._doing = f"transactor {transactional_id!r}"
        self._open = False
        self._broken: LogError | None = None

    @contextmanager
    def begin(self) -> Iterator[LibrdkafkaTransaction]:
        if self._open:
            raise open_already(self._doing)
        if self._broken:
            raise self._broken
        if self._producer is None:
            raise LogError(f"{self._doing}: the transactor is closed; make a new one")
        producer = self._producer
        self._open = True
        try:
            with errors_named(self._doing):
                producer.begin_transaction()
                transaction = LibrdkafkaTransaction(producer, self._doing, self._places)
                try:
                    yield transaction
                    transaction.commit()
                except BaseException as error:
                    self._abort(producer, error)
                    raise
        finally:
            self._open = False

    def _abort(self, producer: Producer, reason: BaseException) -> None:
        fault = client_error(self._doing, reason) if isinstance(reason, KafkaException) else reason
        if isinstance(fault, FencedError):
            self._broken = fault
        try:
            producer.abort_transaction(_REQUEST_S)
        except KafkaException as error:
            # The body's own error is the one to show; this error is for the caller of the next begin. The broker aborts
            # an open transaction when the id's next holder comes, or at the transaction's timeout.
            self._broken = self._broken or client_error(
                f"{self._doing}: make a new transactor; this one cannot continue", error
            )

    def close(self) -> None:
        producer, self._producer = self._producer, None
        # confluent-kafka's close tries to abort, which fails here. Such a producer is released without it.
        if producer is not None and not self._broken:
            producer.close()


def packed(membership: Membership) -> bytes:
    """Returns a membership in librdkafka's own form, in which a client hands it to another client.

    The reader may be one of kafka-python's, or none at all: positions are committed in a group's name.
    """
    name, member = (text.encode() + b"\0" for text in (membership.group, membership.member))
    return b"CGMDv2:" + struct.pack("=i", membership.generation) + name + member + b"\x01"
