"""Transactions on Kafka: a producer with a transactional id, of which only the newest may write."""

from contextlib import AbstractContextManager
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import ConsumerGroupMetadata

from streaming.log.client import Membership, MessagePlaces
from streaming.log.kafka.client import REQUEST_MS, client_error, errors_named
from streaming.log.kafka.reader import as_offsets
from streaming.log.protocol import Positions
from streaming.log.transactor import ClientTransaction, ClientTransactor


class KafkaTransaction(ClientTransaction):
    """Open transaction of kafka-python's producer."""

    def __init__(self, producer: KafkaProducer, doing: str, places: MessagePlaces) -> None:
        super().__init__(doing, places)
        self._producer = producer
        self._sent: list[Any] = []

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        place = self._places.place(topic, key, value, partition)
        with errors_named(self._doing):
            self._sent.append(self._producer.send(topic, value, key=key, partition=place))

    def _send_positions(self, membership: Membership, positions: Positions) -> None:
        group, generation, member = membership
        metadata = ConsumerGroupMetadata(group_id=group, generation_id=generation, member_id=member)
        with errors_named(self._doing):
            self._producer.send_offsets_to_transaction(as_offsets(positions), metadata)

    def _commit(self) -> None:
        # Each message's result is checked before the commit: the client would commit a transaction whose producer was
        # given a new epoch meanwhile as if it had been empty.
        self._producer.flush()
        for sent in self._sent:
            sent.get(timeout=0)
        self._producer.commit_transaction()


class KafkaTransactor(ClientTransactor):
    """kafka-python's producer with a transactional id."""

    def __init__(self, producer: KafkaProducer, transactional_id: str, places: MessagePlaces) -> None:
        super().__init__(transactional_id)
        self._places = places
        self._producer = producer

    def close(self) -> None:
        self._producer.close(timeout=REQUEST_MS / 1000)

    def _begin(self) -> KafkaTransaction:
        self._producer.begin_transaction()
        return KafkaTransaction(self._producer, self._doing, self._places)

    def _abort(self) -> None:
        self._producer.abort_transaction()

    def _named(self, doing: str) -> AbstractContextManager[None]:
        return errors_named(doing)

    def _fault(self, reason: BaseException) -> BaseException:
        return client_error(self._doing, reason) if isinstance(reason, KafkaError) else reason
