"""The event log on Kafka; the only package that imports the Kafka client.

Reading is `read_committed` everywhere and writing is idempotent with `acks=all`. Positions that a transaction commits
carry the reader's group generation, so that the broker refuses them from a reader whose partitions have moved on.
"""

from streaming.log.kafka.log import KafkaLog

__all__ = ["KafkaLog"]
