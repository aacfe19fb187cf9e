"""Appends messages of the server to the event log: the one protocol of all parts that write to it."""

from collections.abc import Sequence
from typing import Literal, Protocol

Kind = Literal["events", "items", "outcomes", "impressions", "skew"]
"""Kinds of messages. Each is the name of a topic in `Topics`."""


class Sink(Protocol):
    """Receiver of messages that have been checked. The server's sink is `serving.api.log_sink.LogSink`."""

    def forget(self, user: str, *, by: str) -> None:
        """Appends a request to forget a user; see `streaming.forget.request.forget`.

        Raises:
            EventError: The id cannot be a user's.
            LogError: The log is unavailable.
        """
        ...

    def append(self, kind: Kind, messages: Sequence[tuple[bytes, bytes]]) -> None:
        """Appends messages to the topic of a kind.

        Args:
            kind: Kind of the messages.
            messages: Key and payload of each.

        Raises:
            LogError: The log is unavailable. Some messages may have been appended.
        """
        ...
