"""Converts errors of librdkafka to LogError."""

from collections.abc import Iterator
from contextlib import contextmanager

from confluent_kafka import KafkaError, KafkaException

from features.errors import LogError
from streaming.log.faults import fenced, oversized

_FENCED = (KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH)
_OVERSIZED = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE)


def client_error(doing: str, error: KafkaException | KafkaError | BufferError) -> LogError:
    """Returns the LogError for an error of the client."""
    fault = error.args[0] if isinstance(error, KafkaException) else error
    if not isinstance(fault, KafkaError):
        return LogError(f"{doing}: {type(error).__name__}: {error}")
    text = f"{fault.name()}: {fault.str()}"
    if fault.code() in _FENCED:
        return fenced(doing, text)
    if fault.code() in _OVERSIZED:
        return oversized(doing, text)
    return LogError(f"{doing}: {text}")


@contextmanager
def errors_named(doing: str) -> Iterator[None]:
    """Converts errors of the client in the body into LogError, whose message begins with the attempted operation."""
    try:
        yield
    except (KafkaException, BufferError) as error:
        raise client_error(doing, error) from error
