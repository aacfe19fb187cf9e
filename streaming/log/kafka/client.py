"""Sets up the Kafka client, and converts its errors to LogError."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kafka.errors import InvalidTopicError, KafkaConnectionError, KafkaError, UnknownTopicOrPartitionError
from kafka.net.compat import KafkaNetClient

from features.errors import LogError
from streaming.log.faults import fenced, oversized
from streaming.log.protocol import MESSAGE_BYTES, Kept, Message

SESSION_TIMEOUT_MS = 10_000
REQUEST_MS = 30_000
_COMPACTION_LAG_MS = 24 * 3_600 * 1_000


class LastingConnections(KafkaNetClient):
    """Connections of the client that survive a broker that is unavailable for a while."""

    def await_ready(self, node_id: Any, timeout_ms: float = REQUEST_MS) -> bool:
        # If this raises, the producer's thread loses a transactional request, and its caller waits forever. If it
        # returns False instead, the request is tried again.
        try:
            return bool(super().await_ready(node_id, timeout_ms=timeout_ms))
        except KafkaConnectionError:
            time.sleep(0.05)
            return False


class PromptConnections(LastingConnections):
    """Connections that ask for the metadata of a topic as soon as for anything else.

    The client passes `retry_backoff_ms` to all parts but the metadata. The metadata's default of 100 ms lies between
    the answers about the brokers and about the first topic, so each new consumer would wait as long for its messages.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cluster.config["retry_backoff_ms"] = options["retry_backoff_ms"]


CONNECTION: dict[str, Any] = {
    "bootstrap_timeout_ms": 10_000,
    "request_timeout_ms": REQUEST_MS,
    # The default of 30 s would delay a reader long after the broker is back.
    "reconnect_backoff_max_ms": 1_000,
    "kafka_client": LastingConnections,
}
CONSUMER: dict[str, Any] = {
    "isolation_level": "read_committed",
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",
    "allow_auto_create_topics": False,
    # A partition that is left out of the fetch in flight waits this long for the next one: the default of 500 is
    # noticeable online. A shorter wait costs processor time when idle, 9 % of a core at 10 ms and 4 % at 50.
    "fetch_max_wait_ms": 20,
    "max_partition_fetch_bytes": MESSAGE_BYTES,
    # Wait of a poll when there is nothing to fetch, and before it asks again for an unsettled position.
    "retry_backoff_ms": 10,
    "metrics_enabled": False,
}
PRODUCER: dict[str, Any] = {
    "enable_idempotence": True,
    "acks": "all",
    "allow_auto_create_topics": False,
    # The client's and the broker's own limits are 1 MiB, which a batch of deltas exceeds. The client counts its
    # headers.
    "max_request_size": MESSAGE_BYTES + 1_024,
    "batch_size": 512 * 1024,
    # A transaction often meets the end of the one before; the default wait of 100 ms would be most of its time.
    "retry_backoff_ms": 5,
    "metrics_enabled": False,
}
# Batch size of a transaction: a topic with a small limit refuses a batch of messages that would each fit.
TRANSACTION_BATCH_BYTES = 64 * 1024
NO_SUCH_TOPIC = (UnknownTopicOrPartitionError.errno, InvalidTopicError.errno)
_OVERSIZED = ("MessageSizeTooLargeError", "RecordListTooLargeError", "RecordTooLargeError")
_FENCED = ("ProducerFencedError", "InvalidProducerEpochError")


def client_error(doing: str, error: BaseException) -> LogError:
    """Returns the LogError for an error of the client."""
    # Later calls of a fenced producer raise a plain KafkaError that only quotes the first error, hence the text.
    text = f"{type(error).__name__}: {error}"
    if any(name in text for name in _FENCED):
        return fenced(doing, text)
    if any(name in text for name in _OVERSIZED):
        return oversized(doing, text)
    return LogError(f"{doing}: {text}")


@contextmanager
def errors_named(doing: str) -> Iterator[None]:
    """Converts errors of the client in the body into LogError, whose message begins with the attempted operation."""
    try:
        yield
    except KafkaError as error:
        raise client_error(doing, error) from error


def check_address(address: str) -> None:
    """Refuses addresses without a listener at once; the client would try silently until its timeout."""
    failures = []
    for broker in address.split(","):
        host, _, port = broker.strip().rpartition(":")
        if not host or not port.isdigit():
            raise LogError(f"address: expected host:port, several separated by commas, got {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            failures.append(f"{broker.strip()}: {error}")
    raise LogError(f"address: no Kafka broker listens ({'; '.join(failures)}); start one, or set TESSERA_KAFKA")


def topic_config(kept: Kept) -> dict[str, str]:
    """Returns the broker's settings. Compaction leaves the last day whole, so that batches can be repeated from it."""
    policies = [name for name, on in (("compact", kept.newest_by_key), ("delete", kept.seconds is not None)) if on]
    return {
        "cleanup.policy": ",".join(policies) or "delete",
        "retention.ms": "-1" if kept.seconds is None else str(int(1000 * kept.seconds)),
        "min.compaction.lag.ms": str(_COMPACTION_LAG_MS),
        "max.message.bytes": str(MESSAGE_BYTES + 1_024),
    }


def as_message(record: Any) -> Message:
    """Returns a client's record as ours."""
    return Message(record.topic, record.partition, record.offset, record.key, record.value or b"", record.timestamp)
