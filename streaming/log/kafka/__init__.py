"""The event log on Kafka; the only package that imports the Kafka client.

Reads use `read_committed` everywhere, and writes are idempotent with `acks=all`. Positions that a transaction commits
carry the reader's group generation, so that the broker refuses them from a reader that has lost its partitions.
"""

from streaming.log.kafka.log import KafkaLog

__all__ = ["KafkaLog"]
