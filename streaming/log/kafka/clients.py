"""Chooses the client of sole readers, followers and transactors: kafka-python, or librdkafka where it is set."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from features.errors import LogError
from streaming.log.client import MessagePlaces, StreamClient
from streaming.log.faults import no_longer_kept
from streaming.log.kafka.client import (
    CONNECTION,
    CONSUMER,
    PRODUCER,
    REQUEST_MS,
    TRANSACTION_BATCH_BYTES,
    PromptConnections,
    errors_named,
)
from streaming.log.kafka.options import as_librdkafka, without_counterpart
from streaming.log.kafka.reader import KafkaFollower, KafkaSoleReader
from streaming.log.kafka.transaction import KafkaTransactor
from streaming.log.protocol import Positions

CLIENTS = ("auto", "kafka-python", "librdkafka")


def client_of(name: str, address: str, options: Mapping[str, Any]) -> tuple[StreamClient | None, str]:
    """Returns librdkafka if the name chooses it, else None for kafka-python, and why `auto` did not choose librdkafka.

    Args:
        name: One of `CLIENTS`.
        address: `host:port` of any broker, several separated by commas.
        options: Connection options in kafka-python's names.

    Raises:
        LogError: The name is unknown, or librdkafka is chosen by name and cannot be used.
    """
    if name not in CLIENTS:
        raise LogError(f"client {name!r}: expected one of {', '.join(CLIENTS)}; set TESSERA_KAFKA_CLIENT to one")
    if name == "kafka-python":
        return None, ""
    if fault := _unusable(options):
        if name == "librdkafka":
            raise LogError(f"client {name!r}: {fault}, or set TESSERA_KAFKA_CLIENT=kafka-python")
        return None, fault
    from streaming.log.librdkafka import LibrdkafkaClient

    return LibrdkafkaClient(address, as_librdkafka(options)), ""


def _unusable(options: Mapping[str, Any]) -> str:
    """Returns why librdkafka cannot be used, and the remedy; empty if it can."""
    if find_spec("confluent_kafka") is None:
        return "confluent-kafka is not installed; pip install 'tessera[librdkafka]'"
    if names := without_counterpart(options):
        return f"librdkafka has no counterpart of {', '.join(names)}; leave it out"
    return ""


class KafkaPythonClient:
    """kafka-python as the client of a cluster; see `StreamClient`.

    Args:
        address: `host:port` of any broker, several separated by commas.
        options: Connection options in kafka-python's names.
    """

    name = "kafka-python"

    def __init__(self, address: str, options: Mapping[str, Any]) -> None:
        self._options = {**CONNECTION, "bootstrap_servers": address.split(","), **options}

    def consumer(self, **options: Any) -> KafkaConsumer:
        """Returns a consumer with the log's settings and these."""
        return KafkaConsumer(**{**CONSUMER, **self._options, "kafka_client": PromptConnections, **options})

    def sole_reader(
        self, partitions: Sequence[tuple[str, int]], *, group: str, start: Positions | None
    ) -> KafkaSoleReader:
        with errors_named(f"reader of group {group!r}"):
            consumer = self.consumer(group_id=group)
            consumer.assign([TopicPartition(*place) for place in partitions])
        return KafkaSoleReader(consumer, group, start)

    def follow(self, topic: str, starts: Mapping[int, int]) -> KafkaFollower:
        places = {TopicPartition(topic, partition): start for partition, start in starts.items()}
        with errors_named(f"follow {topic!r}"):
            consumer = self.consumer()
            seek(consumer, places)
        return KafkaFollower(consumer, list(places))

    def transactor(self, transactional_id: str, places: MessagePlaces) -> KafkaTransactor:
        identity = {"transactional_id": transactional_id, "batch_size": TRANSACTION_BATCH_BYTES}
        with errors_named(f"transactor {transactional_id!r}"):
            producer = KafkaProducer(**{**PRODUCER, **self._options, **identity})
            try:
                producer.init_transactions()
            except BaseException:
                producer.close(timeout=0)
                raise
        return KafkaTransactor(producer, transactional_id, places)


def seek(consumer: KafkaConsumer, starts: Mapping[TopicPartition, int]) -> None:
    """Moves a consumer to the start of each partition, and to these partitions alone.

    Raises:
        LogError: Messages from a start on are no longer kept.
    """
    consumer.assign(list(starts))
    kept = consumer.beginning_offsets(list(starts), timeout_ms=REQUEST_MS)
    for place, start in starts.items():
        if start < kept[place]:
            raise no_longer_kept(place.topic, place.partition, kept[place], start)
        consumer.seek(place, start)
