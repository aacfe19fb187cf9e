"""The event log on Kafka; the only module that imports the Kafka client.

Reading is `read_committed` everywhere and writing is idempotent with `acks=all`. Positions that a transaction commits
carry the reader's group generation, so that the broker refuses them from a reader whose partitions have moved on.
"""

import difflib
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, OffsetAndMetadata, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient, OffsetSpec
from kafka.errors import (
    InvalidTopicError,
    KafkaConnectionError,
    KafkaError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from kafka.net.compat import KafkaNetClient
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import ConsumerGroupMetadata, MemberState

from features.error import FencedError, LogError
from streaming.log import (
    Kept,
    Message,
    Positions,
    Reader,
    check_partitions,
    check_poll,
    unknown_partition,
    unknown_topic,
)

# A message may hold 8 MiB; the client's and the broker's own limits are 1 MiB, which a batch of deltas passes.
_MESSAGE_BYTES = 8 * 1024 * 1024
_SESSION_TIMEOUT_MS = 10_000
_JOIN_S = 60.0
_REQUEST_MS = 30_000
_STALL_S = 30.0
_COMPACTION_LAG_MS = 24 * 3_600 * 1_000


class _Connections(KafkaNetClient):
    """The client's connections, made to survive a broker that is away for a while."""

    def await_ready(self, node_id: Any, timeout_ms: float = _REQUEST_MS) -> bool:
        # The producer's thread loses a transactional request when this raises, and whoever waits for the answer waits
        # for ever. When it returns False instead, the request is tried again.
        try:
            return bool(super().await_ready(node_id, timeout_ms=timeout_ms))
        except KafkaConnectionError:
            time.sleep(0.05)
            return False


_CONNECTION = {
    "bootstrap_timeout_ms": 10_000,
    "request_timeout_ms": _REQUEST_MS,
    # The default of 30 s would keep a reader away from a broker that has long come back.
    "reconnect_backoff_max_ms": 1_000,
    "kafka_client": _Connections,
}
_CONSUMER = {
    "isolation_level": "read_committed",
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",
    "allow_auto_create_topics": False,
    # A partition that is left out of the fetch in flight waits this long for the next one: the default of 500 is felt
    # online. Shorter costs processor time when idle, 9 % of a core at 10 ms and 4 % at 50.
    "fetch_max_wait_ms": 20,
    "max_partition_fetch_bytes": _MESSAGE_BYTES,
    # How long a look waits while there is nothing to fetch, and before it asks again for an unsettled position.
    "retry_backoff_ms": 10,
    "metrics_enabled": False,
}
_PRODUCER = {
    "enable_idempotence": True,
    "acks": "all",
    "allow_auto_create_topics": False,
    "max_request_size": _MESSAGE_BYTES,
    "batch_size": 512 * 1024,
    # A transaction often meets the tail of the one before; waiting the default 100 ms would be most of its time.
    "retry_backoff_ms": 5,
    "metrics_enabled": False,
}
_NO_SUCH_TOPIC = (UnknownTopicOrPartitionError.errno, InvalidTopicError.errno)
_FENCED = ("ProducerFencedError", "InvalidProducerEpochError")


def _error(doing: str, error: BaseException) -> LogError:
    """Return our error for one of the client's."""
    # Later calls of a fenced producer raise a plain KafkaError that only quotes the first one, hence the text.
    text = f"{type(error).__name__}: {error}"
    if any(name in text for name in _FENCED):
        return FencedError(
            f"{doing}: another writer with this transactional id has taken over, or the transaction outlived its "
            f"timeout; stop this writer ({text})"
        )
    return LogError(f"{doing}: {text}")


@contextmanager
def _told(doing: str) -> Iterator[None]:
    try:
        yield
    except KafkaError as error:
        raise _error(doing, error) from error


def _check_address(address: str) -> None:
    """Refuse addresses that nothing listens on, at once; the client would try for its whole timeout, in silence."""
    failures = []
    for one in address.split(","):
        host, _, port = one.strip().rpartition(":")
        if not host or not port.isdigit():
            raise LogError(f"address: expected host:port, several separated by commas, got {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            failures.append(f"{one.strip()}: {error}")
    raise LogError(f"address: no Kafka broker listens ({'; '.join(failures)}); start one, or set TESSERA_KAFKA")


def _topic_config(kept: Kept) -> dict[str, str]:
    """The broker's own settings; compaction leaves the last day whole, so that batches can be done again from it."""
    policies = [name for name, on in (("compact", kept.newest_by_key), ("delete", kept.seconds is not None)) if on]
    return {
        "cleanup.policy": ",".join(policies) or "delete",
        "retention.ms": "-1" if kept.seconds is None else str(int(1000 * kept.seconds)),
        "min.compaction.lag.ms": str(_COMPACTION_LAG_MS),
        "max.message.bytes": str(_MESSAGE_BYTES),
    }


def _message(record: Any) -> Message:
    return Message(record.topic, record.partition, record.offset, record.key, record.value or b"", record.timestamp)


class KafkaReader:
    """One member of a consumer group; see `Reader` for the contract.

    Several readers of a group share its partitions. When the group is rebalanced, what this reader has returned and
    not committed may go to another one: its next commit then raises LogError until `rewind()`.
    """

    def __init__(self, consumer: KafkaConsumer, group: str) -> None:
        self.group = group
        self._consumer = consumer
        self._member: tuple[int, str] | None = None
        self._position: Positions = {}
        # Messages returned since the reader was made, and how many of them were behind the last commit.
        self._returned = 0
        self._settled = 0
        self._stale = False

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        messages: list[Message] = []
        with _told(f"poll for group {self.group!r}"):
            self._join()
            deadline = time.monotonic() + timeout_s
            while True:
                left_ms = max(0.0, 1000 * (deadline - time.monotonic()))
                found = self._consumer.poll(timeout_ms=left_ms, max_records=max_messages - len(messages))
                if self._moved():
                    # The group was rebalanced meanwhile: what came before may be another reader's by now.
                    messages.clear()
                    self._join()
                else:
                    messages += [_message(record) for records in found.values() for record in records]
                if len(messages) >= max_messages or time.monotonic() >= deadline:
                    break
            self._note_position()
        self._returned += len(messages)
        return messages

    def _moved(self) -> bool:
        now: ConsumerGroupMetadata = self._consumer.group_metadata()
        return now.state != MemberState.STABLE or (now.generation_id, now.member_id) != self._member

    def _join(self) -> None:
        """Wait until the group has given this reader its partitions, and stand at their committed positions."""
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
            # What this returns is read again: the seek below goes back to the committed positions.
            self._consumer.poll(timeout_ms=50)
        self._member = (now.generation_id, now.member_id)
        self._seek_committed()

    def _seek_committed(self) -> None:
        held = sorted(self._consumer.assignment())
        start = self._consumer.beginning_offsets(held, timeout_ms=_REQUEST_MS) if held else {}
        for place in held:
            position = self._consumer.committed(place, timeout_ms=_REQUEST_MS)
            self._consumer.seek(place, start[place] if position is None else position)
        self._note_position()

    def _note_position(self) -> None:
        self._position = {
            (place.topic, place.partition): self._consumer.position(place, timeout_ms=_REQUEST_MS)
            for place in self._consumer.assignment()
        }

    def position(self) -> Positions:
        if self._member is None:
            with _told(f"position of group {self.group!r}"):
                self._join()
        return dict(self._position)

    def rewind(self) -> None:
        with _told(f"rewind of group {self.group!r}"):
            self._join()
            self._seek_committed()
        self._stale = False
        self._returned = self._settled = 0

    def offsets(self) -> dict[TopicPartition, OffsetAndMetadata]:
        """Return `position()` in the client's terms; raises LogError when it is not this reader's to commit."""
        position = self.position()
        if self._stale or self._moved():
            raise LogError(
                f"group {self.group!r}: its partitions were shared out anew after they were read here; abort the "
                "transaction, rewind() and read again"
            )
        return {TopicPartition(*place): OffsetAndMetadata(at, "", -1) for place, at in position.items()}

    def membership(self) -> ConsumerGroupMetadata:
        """Return the group, member and generation that positions are committed under."""
        return self._consumer.group_metadata()

    def returned(self) -> int:
        """Return how many messages were returned so far, to be given to `settle` when they are committed."""
        return self._returned

    def settle(self, returned: int) -> None:
        """Note that the first `returned` messages are behind the committed position."""
        self._settled = max(self._settled, returned)

    def commit(self) -> None:
        with _told(f"commit for group {self.group!r}"):
            self._consumer.commit(self.offsets(), timeout_ms=_REQUEST_MS)
        self.settle(self._returned)

    def close(self) -> None:
        self._consumer.close(autocommit=False)


class KafkaSoleReader(KafkaReader):
    """Reads all partitions in a group's name without joining it; see `EventLog.reader`."""

    def __init__(self, consumer: KafkaConsumer, group: str) -> None:
        super().__init__(consumer, group)
        self._started = False

    def _moved(self) -> bool:
        return False

    def _join(self) -> None:
        if not self._started:
            self._seek_committed()
            self._started = True

    def position(self) -> Positions:
        with _told(f"position of group {self.group!r}"):
            self._join()
        return dict(self._position)


class KafkaFollower:
    """A consumer without a group; see `Follower` for the contract."""

    def __init__(self, consumer: KafkaConsumer, place: TopicPartition) -> None:
        self._consumer = consumer
        self._place = place

    def poll(self, max_messages: int, timeout_s: float) -> list[Message]:
        check_poll(max_messages, timeout_s)
        deadline = time.monotonic() + timeout_s
        with _told(f"follow {self._place.topic!r}"):
            while True:
                left_ms = max(0.0, 1000 * (deadline - time.monotonic()))
                found = self._consumer.poll(timeout_ms=left_ms, max_records=max_messages).get(self._place, ())
                # A fetch of nothing but transaction markers returns early and empty.
                if found or time.monotonic() >= deadline:
                    return [_message(record) for record in found]

    def close(self) -> None:
        self._consumer.close(autocommit=False)


class KafkaTransaction:
    """An open transaction of a producer; see `Transaction` for the contract."""

    def __init__(self, log: "KafkaLog", producer: KafkaProducer, doing: str) -> None:
        self._log = log
        self._producer = producer
        self._doing = doing
        self._sent: list[Any] = []
        self._read: list[tuple[KafkaReader, int]] = []

    def append(self, topic: str, value: bytes, *, key: bytes | None = None) -> None:
        with _told(self._doing):
            self._sent.append(self._log.send(self._producer, topic, key, value))

    def commit_offsets(self, reader: Reader) -> None:
        if not isinstance(reader, KafkaReader):
            raise LogError(f"reader: expected one that this log made, got {type(reader).__name__}")
        with _told(self._doing):
            # The broker compares the generation in membership() with the group's; the group's bare name would do
            # without that, and let a reader that lost its partitions commit.
            self._producer.send_offsets_to_transaction(reader.offsets(), reader.membership())
        self._read.append((reader, reader.returned()))

    def commit(self) -> None:
        # Each message's fate is looked at before the end is asked for: the client would end a transaction whose
        # producer was given a new epoch meanwhile as if it had been empty.
        self._producer.flush()
        for sent in self._sent:
            sent.get(timeout=0)
        self._producer.commit_transaction()
        for reader, returned in self._read:
            reader.settle(returned)


class KafkaTransactor:
    """A producer with a transactional id; see `Transactor` for the contract."""

    def __init__(self, log: "KafkaLog", producer: KafkaProducer, transactional_id: str) -> None:
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
            with _told(self._doing):
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
        told = _error(self._doing, reason) if isinstance(reason, KafkaError) else reason
        if isinstance(told, FencedError):
            self._broken = told
        try:
            self._producer.abort_transaction()
        except KafkaError as error:
            # The body's own error is the one to show; this one is for whoever begins again. The broker aborts what is
            # left open when the id's next holder comes, or at the transaction's timeout.
            self._broken = self._broken or _error(f"{self._doing}: make a new transactor, this one cannot go on", error)

    def close(self) -> None:
        self._producer.close(timeout=_REQUEST_MS / 1000)


class KafkaLog:
    """The event log on a Kafka cluster; see `EventLog` for the contract.

    Topics are created with unlimited retention, because the log is what all other state is rebuilt from; change it on
    the broker where that is too much. A reader whose committed position was deleted goes on at the oldest message.

    Args:
        address: `host:port` of any broker, several separated by commas.
        replication_factor: copies of each partition of created topics.
        client_options: kafka-python's connection options (`security_protocol`, `ssl_cafile`, `sasl_mechanism`, …).

    Raises:
        LogError: an option is unknown, or no broker answers.
    """

    def __init__(self, address: str, *, replication_factor: int = 1, **client_options: Any) -> None:
        for name in sorted(client_options.keys() - KafkaAdminClient.DEFAULT_CONFIG.keys()):
            near = difflib.get_close_matches(name, KafkaAdminClient.DEFAULT_CONFIG, 1)
            raise LogError(f"client option {name!r} is unknown" + (f"; did you mean {near[0]!r}?" if near else ""))
        if not client_options.keys() & {"proxy_url", "socks5_proxy"}:
            _check_address(address)
        self._options = {**_CONNECTION, "bootstrap_servers": address.split(","), **client_options}
        self._replication_factor = replication_factor
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}
        self._turn = count()
        self._producer: KafkaProducer | None = None
        self._idle: list[KafkaConsumer] = []
        with _told(f"address: {address} listens, but does not answer as a Kafka broker; check port, TLS and SASL"):
            self._admin = KafkaAdminClient(**self._options)

    def create_topics(self, partitions: Mapping[str, int], kept: Mapping[str, Kept] | None = None) -> None:
        check_partitions(partitions)
        with _told(f"create topics {', '.join(sorted(partitions))}"):
            missing = partitions.keys() - set(self._admin.list_topics())
            new = {
                topic: {
                    "num_partitions": partitions[topic],
                    "replication_factor": self._replication_factor,
                    "configs": _topic_config((kept or {}).get(topic, Kept())),
                }
                for topic in missing
            }
            if new:
                # Another process may create them at this moment; that is as good.
                with suppress(TopicAlreadyExistsError):
                    self._admin.create_topics(new)
                self._admin.wait_for_topics(list(new))

    def settings(self, topic: str) -> dict[str, str]:
        """The topic's settings on the broker that are not the broker's defaults."""
        with _told(f"settings of {topic!r}"):
            found = self._admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
        return {name: str(setting["value"]) for name, setting in found["topic"][topic].items()}

    def append(self, topic: str, messages: Sequence[tuple[bytes | None, bytes]]) -> None:
        with _told(f"append to {topic!r}"):
            with self._lock:
                if self._producer is None:
                    self._producer = KafkaProducer(**{**_PRODUCER, **self._options})
            sent = [self.send(self._producer, topic, key, value) for key, value in messages]
            self._producer.flush()
            for one in sent:
                one.get(timeout=0)

    def send(self, producer: KafkaProducer, topic: str, key: bytes | None, value: bytes) -> Any:
        """Hand one message to a producer; returns its future. A key's partition is the one Java clients choose."""
        if topic not in self._counts:
            self._counts[topic] = self._partition_count(topic)
        partition = next(self._turn) % self._counts[topic] if key is None else None
        return producer.send(topic, value, key=key, partition=partition)

    def _partition_count(self, topic: str) -> int:
        with _told(f"topic {topic!r}"):
            (found,) = self._admin.describe_topics([topic])
            if found["error_code"] in _NO_SUCH_TOPIC:
                raise unknown_topic(topic, (name for name in self._admin.list_topics() if not name.startswith("__")))
            if found["error_code"]:
                raise for_code(found["error_code"])()
            return len(found["partitions"])

    def reader(self, topics: Sequence[str], *, group: str, sole: bool = False) -> KafkaReader:
        places = [TopicPartition(topic, n) for topic in topics for n in range(self._partition_count(topic))]
        if sole:
            with _told(f"reader of group {group!r}"):
                consumer = self._consumer(group_id=group)
                consumer.assign(places)
            return KafkaSoleReader(consumer, group)
        with _told(f"reader of group {group!r}"):
            # A reader that dies holds its partitions for the session's timeout; the client's default is 45 s.
            consumer = self._consumer(group_id=group, session_timeout_ms=_SESSION_TIMEOUT_MS)
            consumer.subscribe(list(topics))
            # Joining before the topics' metadata is there gives an empty assignment first and a second one later.
            for topic in topics:
                consumer.partitions_for_topic(topic)
        return KafkaReader(consumer, group)

    def follow(self, topic: str, start: int) -> KafkaFollower:
        self._partition_count(topic)
        place = TopicPartition(topic, 0)
        with _told(f"follow {topic!r}"):
            consumer = self._consumer()
            self._seek(consumer, place, start)
        return KafkaFollower(consumer, place)

    @staticmethod
    def _seek(consumer: KafkaConsumer, place: TopicPartition, start: int) -> None:
        consumer.assign([place])
        kept = consumer.beginning_offsets([place], timeout_ms=_REQUEST_MS)[place]
        if start < kept:
            raise LogError(
                f"start: topic {place.topic!r} partition {place.partition} keeps messages from {kept} on, got "
                f"{start}; start there, from a snapshot that is new enough"
            )
        consumer.seek(place, start)

    def _consumer(self, **options: Any) -> KafkaConsumer:
        return KafkaConsumer(**{**_CONSUMER, **self._options, **options})

    def transactor(self, transactional_id: str) -> KafkaTransactor:
        with _told(f"transactor {transactional_id!r}"):
            producer = KafkaProducer(**{**_PRODUCER, **self._options}, transactional_id=transactional_id)
            try:
                producer.init_transactions()
            except BaseException:
                producer.close(timeout=0)
                raise
        return KafkaTransactor(self, producer, transactional_id)

    def committed(self, topics: Sequence[str], *, group: str) -> Positions:
        places = [TopicPartition(topic, n) for topic in topics for n in range(self._partition_count(topic))]
        with _told(f"committed positions of group {group!r}"):
            # A consumer that never joins, not the admin client: it waits for a transaction that is being settled.
            consumer = self._consumer(group_id=group)
            try:
                return {tuple(place): consumer.committed(place, timeout_ms=_REQUEST_MS) or 0 for place in places}
            finally:
                consumer.close(autocommit=False)

    def end_offsets(self, topic: str) -> dict[int, int]:
        places = {TopicPartition(topic, n): OffsetSpec.LATEST for n in range(self._partition_count(topic))}
        with _told(f"end offsets of {topic!r}"):
            # With READ_COMMITTED the broker answers with the last stable offset.
            found = self._admin.list_partition_offsets(places, isolation_level=IsolationLevel.READ_COMMITTED)
        return {place.partition: found[place].offset for place in sorted(found)}

    def read(self, topic: str, partition: int, start: int, stop: int) -> Iterator[Message]:
        ends = self.end_offsets(topic)
        if partition not in ends:
            raise unknown_partition(topic, partition, len(ends))
        return self._read(TopicPartition(topic, partition), max(start, 0), min(stop, ends[partition]))

    def _read(self, place: TopicPartition, start: int, stop: int) -> Iterator[Message]:
        if start >= stop:
            return
        with _told(f"read {place.topic!r} partition {place.partition}"):
            consumer = self._idle.pop() if self._idle else self._consumer()
            try:
                self._seek(consumer, place, start)
                yield from self._until(consumer, place, stop)
            finally:
                self._idle.append(consumer)

    @staticmethod
    def _until(consumer: KafkaConsumer, place: TopicPartition, stop: int) -> Iterator[Message]:
        # The position, not the last message, says when to end: transaction markers take offsets too, and it moves
        # past them.
        at, moved_at = -1, time.monotonic()
        while (position := consumer.position(place, timeout_ms=_REQUEST_MS)) < stop:
            if position > at:
                at, moved_at = position, time.monotonic()
            elif time.monotonic() - moved_at > _STALL_S:
                raise LogError(f"read: the broker sent nothing for {_STALL_S:.0f} s at offset {position} of {place}")
            for record in consumer.poll(timeout_ms=200).get(place, ()):
                if record.offset >= stop:
                    return
                yield _message(record)

    def close(self) -> None:
        self._admin.close()
        with self._lock:
            if self._producer is not None:
                self._producer.close(timeout=_REQUEST_MS / 1000)
        while self._idle:
            self._idle.pop().close(autocommit=False)
