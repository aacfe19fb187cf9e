"""The event log on a Kafka cluster."""

import difflib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec
from kafka.errors import KafkaTimeoutError, TopicAlreadyExistsError, for_code
from kafka.protocol.consumer import IsolationLevel

from features.errors import LogError
from streaming.log.kafka.client import (
    CONNECTION,
    NO_SUCH_TOPIC,
    PRODUCER,
    REQUEST_MS,
    SESSION_TIMEOUT_MS,
    LastingConnections,
    as_message,
    check_address,
    errors_named,
    topic_config,
)
from streaming.log.kafka.clients import KafkaPythonClient, client_of, seek
from streaming.log.kafka.reader import KafkaReader
from streaming.log.protocol import (
    Follower,
    Kept,
    Message,
    Offsets,
    Positions,
    Reader,
    Transactor,
    check_partitions,
    check_size,
    offset_in,
    unknown_partition,
    unknown_topic,
)

_STALL_S = 30.0
_ASK_EVERY_S = 1.0


class KafkaLog:
    """Event log on a Kafka cluster; see `EventLog` for the contract.

    Topics are created with unlimited retention, because all other state is rebuilt from the log. Change the retention
    on the broker if that is too much. A reader whose committed position was deleted continues at the oldest message.

    Args:
        address: `host:port` of any broker, several separated by commas.
        replication_factor: Copies of each partition of created topics.
        client: Client of sole readers, followers and transactors: `kafka-python`, `librdkafka`, or `auto`, which takes
            librdkafka if confluent-kafka is installed and librdkafka has the connection options.
        client_options: kafka-python's connection options (`security_protocol`, `ssl_cafile`, `sasl_mechanism`, …).

    Raises:
        LogError: The client or an option is unknown or not available, or no broker answers.
    """

    def __init__(
        self, address: str, *, replication_factor: int = 1, client: str = "kafka-python", **client_options: Any
    ) -> None:
        for name in sorted(client_options.keys() - KafkaAdminClient.DEFAULT_CONFIG.keys()):
            near = difflib.get_close_matches(name, KafkaAdminClient.DEFAULT_CONFIG, 1)
            raise LogError(f"client option {name!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else ""))
        self._address = "" if client_options.keys() & {"proxy_url", "socks5_proxy"} else address
        self._python = KafkaPythonClient(address, client_options)
        chosen, self.client_fault = client_of(client, address, client_options)
        self._client = chosen or self._python
        self._make_sure()
        self._options = {**CONNECTION, "bootstrap_servers": address.split(","), **client_options}
        self._replication_factor = replication_factor
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._turn = count()
        self._producer: KafkaProducer | None = None
        self._appended = time.monotonic()
        self._idle: list[KafkaConsumer] = []
        with errors_named(
            f"address: {address} listens, but does not answer as a Kafka broker; check port, TLS and SASL"
        ):
            self._admin = KafkaAdminClient(**self._options)

    @property
    def client(self) -> str:
        """Name of the client that sole readers, followers and transactors run on; `client_fault` says why.

        The fault is empty unless `auto` chose kafka-python.
        """
        return self._client.name

    def create_topics(self, partitions: Mapping[str, int], kept: Mapping[str, Kept] | None = None) -> None:
        check_partitions(partitions)
        with errors_named(f"create topics {', '.join(sorted(partitions))}"):
            # Asks for these topics alone: a broker may hold thousands, and the client reads each in Python.
            described = self._admin.describe_topics(sorted(partitions))
            missing = [topic["name"] for topic in described if topic["error_code"] in NO_SUCH_TOPIC]
            self._counts |= {one["name"]: len(one["partitions"]) for one in described if not one["error_code"]}
            new = {
                topic: {
                    "num_partitions": partitions[topic],
                    "replication_factor": self._replication_factor,
                    "configs": topic_config((kept or {}).get(topic, Kept())),
                }
                for topic in missing
            }
            if new:
                # Another process may create them at this moment, which is as good.
                with suppress(TopicAlreadyExistsError):
                    self._admin.create_topics(new)
                self._admin.wait_for_topics(list(new))

    def settings(self, topic: str) -> dict[str, str]:
        """Returns the topic's settings on the broker that are not the broker's defaults."""
        with errors_named(f"settings of {topic!r}"):
            described = self._admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return {name: str(setting["value"]) for name, setting in described["topic"][topic].items()}

    def append(self, topic: str, messages: Sequence[tuple[bytes | None, bytes]]) -> None:
        if time.monotonic() - self._appended > _ASK_EVERY_S:
            # The client would keep the messages for minutes before it reports that no broker answers.
            self._make_sure()
        with errors_named(f"append to {topic!r}"):
            with self._lock:
                if self._producer is None:
                    self._producer = KafkaProducer(**{**PRODUCER, **self._options})
                producer = self._producer
            try:
                sent = [
                    producer.send(topic, value, key=key, partition=self.place(topic, key, value))
                    for key, value in messages
                ]
                producer.flush(timeout=REQUEST_MS / 1000)
            except KafkaTimeoutError:
                # The client's remaining messages are discarded, or they would be written beside those that the caller
                # sends again.
                with self._lock:
                    self._producer = None
                producer.close(timeout=0)
                raise
            for future in sent:
                future.get(timeout=0)
        self._appended = time.monotonic()

    def _make_sure(self) -> None:
        if self._address:
            check_address(self._address)

    def place(self, topic: str, key: bytes | None, value: bytes, partition: int | None = None) -> int | None:
        """Checks a message and returns its partition; see `MessagePlaces`. A given partition wins over the key."""
        check_size(topic, key, value)
        count = self._known_count(topic)
        if partition is None and key is None:
            partition = next(self._turn) % count
        elif partition is not None and not 0 <= partition < count:
            raise unknown_partition(topic, partition, count)
        return partition

    def _known_count(self, topic: str) -> int:
        """Returns the number of a topic's partitions, which stays for the topic's life. The broker is asked once."""
        if topic not in self._counts:
            self._counts[topic] = self._partition_count(topic)
        return self._counts[topic]

    def _partition_count(self, topic: str) -> int:
        return len(self._described(topic)["partitions"])

    def _described(self, topic: str) -> Any:
        with errors_named(f"topic {topic!r}"):
            (described,) = self._admin.describe_topics([topic])
            if described["error_code"] in NO_SUCH_TOPIC:
                raise unknown_topic(topic, (name for name in self._admin.list_topics() if not name.startswith("__")))
            if described["error_code"]:
                raise for_code(described["error_code"])()
        return described

    def reader(
        self, topics: Sequence[str], *, group: str, sole: bool = False, start: Positions | None = None
    ) -> Reader:
        topic_partitions = [TopicPartition(topic, n) for topic in topics for n in range(self._partition_count(topic))]
        if sole:
            return self._client.sole_reader(topic_partitions, group=group, start=start)
        with errors_named(f"reader of group {group!r}"):
            # A reader that dies holds its partitions for the session's timeout; the client's default is 45 s.
            consumer = self._python.consumer(group_id=group, session_timeout_ms=SESSION_TIMEOUT_MS)
            consumer.subscribe(list(topics))
            # Joining before the topics' metadata arrives gives an empty assignment first and a second one later.
            for topic in topics:
                consumer.partitions_for_topic(topic)
        return KafkaReader(consumer, group)

    def follow(self, topic: str, start: Offsets) -> Follower:
        starts = {partition: offset_in(start, partition) for partition in range(self._partition_count(topic))}
        return self._client.follow(topic, starts)

    def transactor(self, transactional_id: str) -> Transactor:
        return self._client.transactor(transactional_id, self)

    def committed(self, topics: Sequence[str], *, group: str) -> Positions:
        topic_partitions = [TopicPartition(topic, n) for topic in topics for n in range(self._partition_count(topic))]
        with errors_named(f"committed positions of group {group!r}"):
            # This is a consumer that never joins, not the admin client: it waits for a transaction that is being
            # settled.
            # It needs no metadata of topics, and ends so soon that it would leave a request for them behind.
            consumer = self._python.consumer(group_id=group, kafka_client=LastingConnections)
            try:
                offsets = {
                    tuple(topic_partition): consumer.committed(topic_partition, timeout_ms=REQUEST_MS)
                    for topic_partition in topic_partitions
                }
                return {topic_partition: offset for topic_partition, offset in offsets.items() if offset is not None}
            finally:
                consumer.close(autocommit=False)

    def end_offsets(self, topic: str) -> dict[int, int]:
        # With READ_COMMITTED the broker answers with the last stable offset.
        return self._offsets(topic, OffsetSpec.LATEST)

    def offsets_at(self, topic: str, timestamp_ms: int) -> dict[int, int]:
        if timestamp_ms <= 0:
            # All messages, so no lookup by time: an offset after the last message counts as kept.
            return self._offsets(topic, OffsetSpec.EARLIEST)
        found, ends = self._offsets(topic, timestamp_ms), self.end_offsets(topic)
        return {number: min(offset, ends[number]) if offset >= 0 else ends[number] for number, offset in found.items()}

    def _offsets(self, topic: str, spec: int) -> dict[int, int]:
        """Returns an offset in each partition of a topic, -1 if no message has the time `spec` or a later time."""
        topic_partitions = {TopicPartition(topic, n): spec for n in range(self._known_count(topic))}
        try:
            with errors_named(f"offsets of {topic!r}"):
                found = self._admin.list_partition_offsets(
                    topic_partitions, isolation_level=IsolationLevel.READ_COMMITTED
                )
        except LogError:
            self._counts.pop(topic, None)
            # Raises the error of a topic that is gone.
            self._partition_count(topic)
            raise
        return {topic_partition.partition: found[topic_partition].offset for topic_partition in sorted(found)}

    def identity(self, topic: str) -> str:
        return str(self._described(topic)["topic_id"])

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        ends = self.end_offsets(topic)
        if partition not in ends:
            raise unknown_partition(topic, partition, len(ends))
        return self._read(TopicPartition(topic, partition), max(start, 0), min(stop, ends[partition]))

    def _read(self, topic_partition: TopicPartition, start: int, stop: int) -> Iterator[Message]:
        if start >= stop:
            return
        with errors_named(f"read {topic_partition.topic!r} partition {topic_partition.partition}"):
            consumer = self._idle.pop() if self._idle else self._python.consumer()
            try:
                seek(consumer, {topic_partition: start})
                yield from self._until(consumer, topic_partition, stop)
            finally:
                self._idle.append(consumer)

    @staticmethod
    def _until(consumer: KafkaConsumer, topic_partition: TopicPartition, stop: int) -> Iterator[Message]:
        # The position ends the loop, not the last message: transaction markers take offsets too, and the position
        # moves past them.
        at, moved_at = -1, time.monotonic()
        while (position := consumer.position(topic_partition, timeout_ms=REQUEST_MS)) < stop:
            if position > at:
                at, moved_at = position, time.monotonic()
            elif time.monotonic() - moved_at > _STALL_S:
                raise LogError(
                    f"read: the broker sent nothing for {_STALL_S:.0f} s at offset {position} of {topic_partition}"
                )
            for record in consumer.poll(timeout_ms=200).get(topic_partition, ()):
                if record.offset >= stop:
                    return
                yield as_message(record)

    def delete_records(self, positions: Positions) -> dict[str, int]:
        """Deletes all messages before positions, by partition. Returns the number of deleted offsets by topic.

        The broker removes the bytes from its disks when it deletes the segments that hold them.
        """
        oldest = {topic: self.offsets_at(topic, 0) for topic in {topic for topic, _ in positions}}
        with errors_named("delete records"):
            wanted = {TopicPartition(*place): offset for place, offset in positions.items() if offset > 0}
            if wanted:
                self._admin.delete_records(wanted)
        counts: dict[str, int] = {}
        for (topic, partition), offset in positions.items():
            counts[topic] = counts.get(topic, 0) + max(0, offset - oldest[topic][partition])
        return {topic: count for topic, count in counts.items() if count}

    def close(self) -> None:
        self._admin.close()
        with self._lock:
            if self._producer is not None:
                self._producer.close(timeout=REQUEST_MS / 1000)
        while self._idle:
            self._idle.pop().close(autocommit=False)
