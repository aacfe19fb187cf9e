"""Transactions on Kafka: a producer with a transactional id, of which only the newest may write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError
from kafka.structs import ConsumerGroupMetadata

from features.errors import FencedError, LogError
from streaming.log.client import GroupReader, Membership, MessagePlaces
from streaming.log.faults import foreign_reader, open_already
from streaming.log.kafka.client import REQUEST_MS, client_error, errors_named
from streaming.log.kafka.reader import as_offsets
from streaming.log.protocol import Positions, Reader


class KafkaTransaction:
    """Open transaction of a producer; see `Transaction` for the contract."""

    def __init__(self, producer: KafkaProducer, doing: str, places: MessagePlaces) -> None:
        self._places = places
        self._producer = producer
        self._doing = doing
        self._sent: list[Any] = []
        self._read: list[tuple[GroupReader, int]] = []

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        place = self._places.place(topic, key, value, partition)
        with errors_named(self._doing):
            self._sent.append(self._producer.send(topic, value, key=key, partition=place))

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, GroupReader):
            raise foreign_reader(reader)
        # The broker compares the generation in membership() with the group's. The group's name alone would skip this
        # check and let a reader that lost its partitions commit.
        self._send_positions(reader.membership(), reader.committable())
        self._read.append((reader, reader.returned()))

    def commit_positions(self, group: str, positions: Positions) -> None:
        self._send_positions(Membership(group), positions)

    def _send_positions(self, membership: Membership, positions: Positions) -> None:
        group, generation, member = membership
        metadata = ConsumerGroupMetadata(group_id=group, generation_id=generation, member_id=member)
        with errors_named(self._doing):
            self._producer.send_offsets_to_transaction(as_offsets(positions), metadata)

    def commit(self) -> None:
        # Each message's result is checked before the commit: the client would commit a transaction whose producer was
        # given a new epoch meanwhile as if it had been empty.
        self._producer.flush()
        for sent in self._sent:
            sent.get(timeout=0)
        self._producer.commit_transaction()
        for reader, returned in self._read:
            reader.settle(returned)


class KafkaTransactor:
    """Producer with a transactional id; see `Transactor` for the contract."""

    def __init__(self, producer: KafkaProducer, transactional_id: str, places: MessagePlaces) -> None:
        self._places = places
        self._producer = producer
        self._doing = f"transactor {transactional_id!r}"
        self._open = False
        self._broken: LogError | None = None

    @contextmanager
    def begin(self) -> Iterator[KafkaTransaction]:
        if self._open:
            raise open_already(self._doing)
        if self._broken:
            raise self._broken
        self._open = True
        try:
            with errors_named(self._doing):
                self._producer.begin_transaction()
                transaction = KafkaTransaction(self._producer, self._doing, self._places)
                try:
                    yield transaction
                    transaction.commit()
                except BaseException as error:
                    self._abort(error)
                    raise
        finally:
            self._open = False

    def _abort(self, reason: BaseException) -> None:
        fault = client_error(self._doing, reason) if isinstance(reason, KafkaError) else reason
        if isinstance(fault, FencedError):
            self._broken = fault
        try:
            self._producer.abort_transaction()
        except KafkaError as error:
            # The body's own error is the one to show; this error is for the caller of the next begin. The broker aborts
            # an open transaction when the id's next holder comes, or at the transaction's timeout.
            self._broken = self._broken or client_error(
                f"{self._doing}: make a new transactor; this one cannot continue", error
            )

    def close(self) -> None:
        self._producer.close(timeout=REQUEST_MS / 1000)
