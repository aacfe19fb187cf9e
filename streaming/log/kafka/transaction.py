"""Transactions on Kafka: a producer with a transactional id, of which only the newest may write."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from kafka import KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError

from features.errors import FencedError, LogError
from streaming.log.kafka.client import REQUEST_MS, client_error, errors_named
from streaming.log.kafka.reader import KafkaReader
from streaming.log.protocol import Positions, Reader


class Sender(Protocol):
    """Part of the log that a transaction needs."""

    def send(
        self, producer: KafkaProducer, topic: str, key: bytes | None, value: bytes, partition: int | None = None
    ) -> Any: ...


class KafkaTransaction:
    """Open transaction of a producer; see `Transaction` for the contract."""

    def __init__(self, log: Sender, producer: KafkaProducer, doing: str) -> None:
        self._log = log
        self._producer = producer
        self._doing = doing
        self._sent: list[Any] = []
        self._read: list[tuple[KafkaReader, int]] = []

    def append(self, topic: str, value: bytes, *, key: bytes | None = None, partition: int | None = None) -> None:
        with errors_named(self._doing):
            self._sent.append(self._log.send(self._producer, topic, key, value, partition))

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, KafkaReader):
            raise LogError(f"reader: expected one that this log made, got {type(reader).__name__}")
        with errors_named(self._doing):
            # The broker compares the generation in membership() with the group's. The group's name alone would skip
            # this check and let a reader that lost its partitions commit.
            self._producer.send_offsets_to_transaction(reader.offsets(), reader.membership())
        self._read.append((reader, reader.returned()))

    def commit_positions(self, group: str, positions: Positions) -> None:
        offsets = {TopicPartition(*place): OffsetAndMetadata(at, "", -1) for place, at in positions.items()}
        with errors_named(self._doing):
            self._producer.send_offsets_to_transaction(offsets, group)

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

    def __init__(self, log: Sender, producer: KafkaProducer, transactional_id: str) -> None:
        self._log = log
        self._producer = producer
        self._doing = f"transactor {transactional_id!r}"
        self._open = False
        self._broken: LogError | None = None

    @contextmanager
    def begin(self) -> Iterator[KafkaTransaction]:
        if self._open:
            raise LogError(f"{self._doing}: a transaction is open already; end it before the next begin()")
        if self._broken:
            raise self._broken
        self._open = True
        try:
            with errors_named(self._doing):
                self._producer.begin_transaction()
                transaction = KafkaTransaction(self._log, self._producer, self._doing)
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
