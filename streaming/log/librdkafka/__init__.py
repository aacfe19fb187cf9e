"""Readers and transactions of Kafka on librdkafka; the only package that imports confluent-kafka.

librdkafka fetches, decodes and sends in threads of its own in C, so that a message costs a tenth of kafka-python's
processor time. Topics, groups with members and appends outside transactions stay with `streaming.log.kafka`.
"""

from streaming.log.librdkafka.client import LibrdkafkaClient

__all__ = ["LibrdkafkaClient"]
