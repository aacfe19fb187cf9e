"""Transactions on librdkafka: a producer with a transactional id, of which only the newest may write."""

import struct
import time
from contextlib import AbstractContextManager

from confluent_kafka import KafkaException, Producer, TopicPartition

from features.errors import LogError
from streaming.log.client import Membership, MessagePlaces
from streaming.log.librdkafka.fault import client_error, errors_named
from streaming.log.protocol import Positions
from streaming.log.transactor import ClientTransaction, ClientTransactor

_REQUEST_S = 30.0
# Timeout that lets a commit take as long as the transaction may.
_AS_LONG_AS_OPEN = -1


class LibrdkafkaTransaction(ClientTransaction):
    """Open transaction of librdkafka's producer."""

    def __init__(self, producer: Producer, doing: str, places: MessagePlaces) -> None:
        super().__init__(doing, places)
        self._producer = producer

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

    def _send_positions(self, membership: Membership, positions: Positions) -> None:
        offsets = [TopicPartition(*place, at) for place, at in positions.items()]
        with errors_named(self._doing):
            self._producer.send_offsets_to_transaction(offsets, packed(membership), _REQUEST_S)

    def _commit(self) -> None:
        # A message that failed lets the commit fail, so no message's own result is asked for.
        self._producer.commit_transaction(_AS_LONG_AS_OPEN)


class LibrdkafkaTransactor(ClientTransactor):
    """librdkafka's producer with a transactional id."""

    def __init__(self, producer: Producer, transactional_id: str, places: MessagePlaces) -> None:
        super().__init__(transactional_id)
        self._producer: Producer | None = producer
        self._places = places

    def close(self) -> None:
        producer, self._producer = self._producer, None
        # confluent-kafka's close tries to abort, which fails here. Such a producer is released without it.
        if producer is not None and not self._broken:
            producer.close()

    def _begin(self) -> LibrdkafkaTransaction:
        if self._producer is None:
            raise LogError(f"{self._doing}: the transactor is closed; make a new one")
        self._producer.begin_transaction()
        return LibrdkafkaTransaction(self._producer, self._doing, self._places)

    def _abort(self) -> None:
        if self._producer is not None:
            self._producer.abort_transaction(_REQUEST_S)

    def _named(self, doing: str) -> AbstractContextManager[None]:
        return errors_named(doing)

    def _fault(self, reason: BaseException) -> BaseException:
        return client_error(self._doing, reason) if isinstance(reason, KafkaException) else reason


def packed(membership: Membership) -> bytes:
    """Returns a membership in librdkafka's own form, in which a client hands it to another client.

    The reader may be one of kafka-python's, or none at all: positions are committed in a group's name.
    """
    name, member = (text.encode() + b"\0" for text in (membership.group, membership.member))
    return b"CGMDv2:" + struct.pack("=i", membership.generation) + name + member + b"\x01"
