"""Errors of a log on Kafka, in the same words for every client."""

from features.errors import FencedError, LogError, OversizedError


def fenced(doing: str, text: str) -> FencedError:
    """Returns the error of a writer whose transactional id has a newer holder."""
    return FencedError(
        f"{doing}: another writer with this transactional id has taken over, or the transaction outlived its "
        f"timeout; stop this writer ({text})"
    )


def oversized(doing: str, text: str) -> OversizedError:
    """Returns the error of a message that its topic does not accept."""
    return OversizedError(f"{doing}: a message is larger than its topic accepts ({text})")


def no_longer_kept(topic: str, partition: int, kept: int, start: int) -> LogError:
    """Returns the error of a start whose messages are deleted."""
    return LogError(
        f"start: topic {topic!r} partition {partition} keeps messages from {kept} on, got {start}; start there, from a "
        "snapshot that is new enough"
    )


def foreign_reader(reader: object) -> LogError:
    """Returns the error of a transaction that gets another log's reader."""
    return LogError(f"reader: expected one that this log made, got {type(reader).__name__}")


def open_already(doing: str) -> LogError:
    """Returns the error of a second transaction inside the first."""
    return LogError(f"{doing}: a transaction is open already; end it before the next begin()")
