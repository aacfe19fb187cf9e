"""Sets up librdkafka from kafka-python's options, and opens readers and transactors on it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition

from streaming.log.client import MessagePlaces
from streaming.log.faults import no_longer_kept
from streaming.log.librdkafka.fault import errors_named
from streaming.log.librdkafka.reader import LibrdkafkaFollower, LibrdkafkaSoleReader, oldest_offsets
from streaming.log.librdkafka.transaction import LibrdkafkaTransactor
from streaming.log.protocol import MESSAGE_BYTES, Positions

_START_S = 30.0
_LOGGER = logging.getLogger("librdkafka")

_CONNECTION: dict[str, Any] = {
    "reconnect.backoff.max.ms": 1_000,
    "socket.nagle.disable": True,
    "socket.keepalive.enable": True,
    "log_level": 4,
}
_CONSUMER: dict[str, Any] = {
    "isolation.level": "read_committed",
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "earliest",
    "allow.auto.create.topics": False,
    # Positions pass the marks of transactions by these events alone.
    "enable.partition.eof": True,
    "check.crcs": True,
    "fetch.wait.max.ms": 100,
    "fetch.message.max.bytes": MESSAGE_BYTES,
    # Messages that are fetched ahead. Above it a partition is left out of fetches, and the default leaves it out for a
    # second.
    "queued.min.messages": 8_192,
    "queued.max.messages.kbytes": 4 * MESSAGE_BYTES // 1024,
    "fetch.queue.backoff.ms": 5,
    "fetch.error.backoff.ms": 50,
}
_PRODUCER: dict[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    # A commit flushes at once, so a wait for more messages is lost time.
    "linger.ms": 0,
    "message.max.bytes": MESSAGE_BYTES + 1_024,
    # A topic with a small limit refuses a batch of messages that would each fit.
    "batch.size": 64 * 1024,
    # The partition of a key is the one that Java clients and kafka-python choose.
    "partitioner": "murmur2_random",
    "delivery.report.only.error": True,
    # A transaction often meets the end of the one before.
    "retry.backoff.ms": 5,
    "retry.backoff.max.ms": 100,
}


class LibrdkafkaClient:
    """Client of a cluster; see `StreamClient`.

    Args:
        address: `host:port` of any broker, several separated by commas.
        options: Connection options in librdkafka's names.
    """

    name = "librdkafka"

    def __init__(self, address: str, options: Mapping[str, Any]) -> None:
        self._options = {**_CONNECTION, "bootstrap.servers": address, **options}

    def sole_reader(
        self, partitions: Sequence[tuple[str, int]], *, group: str, start: Positions | None
    ) -> LibrdkafkaSoleReader:
        with errors_named(f"reader of group {group!r}"):
            return LibrdkafkaSoleReader(self._consumer(group), partitions, group, start)

    def follow(self, topic: str, starts: Mapping[int, int]) -> LibrdkafkaFollower:
        with errors_named(f"follow {topic!r}"):
            # The group is a name that librdkafka asks for. No member joins it and no position is committed.
            consumer = self._consumer(f"follow-{topic}")
            try:
                kept = oldest_offsets(consumer, [(topic, partition) for partition in starts])
                for partition, start in starts.items():
                    if start < kept[topic, partition]:
                        raise no_longer_kept(topic, partition, kept[topic, partition], start)
                consumer.assign([TopicPartition(topic, *place) for place in starts.items()])
            except BaseException:
                consumer.close()
                raise
        return LibrdkafkaFollower(consumer, topic, list(starts))

    def transactor(self, transactional_id: str, places: MessagePlaces) -> LibrdkafkaTransactor:
        with errors_named(f"transactor {transactional_id!r}"):
            options = {**_PRODUCER, **self._options, "transactional.id": transactional_id}
            producer = Producer({**options, "error_cb": _ignore}, logger=_LOGGER)
            producer.init_transactions(_START_S)
        return LibrdkafkaTransactor(producer, transactional_id, places)

    def _consumer(self, group: str) -> Consumer:
        options = {**_CONSUMER, **self._options, "group.id": group}
        return Consumer({**options, "error_cb": _ignore}, logger=_LOGGER)


def _ignore(error: Any) -> None:
    """Drops an event about a connection: librdkafka connects again, and calls that wait have time limits."""
