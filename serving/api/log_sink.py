"""Appends events, items and outcomes that came over HTTP to the event log."""

import contextlib
import threading
from collections.abc import Callable, Sequence

from features.errors import LogError
from serving.breaker import Breaker
from serving.sink import Kind
from streaming.forget.request import forget
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics

# Longest wait for the log, and seconds for which all callers are refused after the log did not answer.
_TURN_S, _AWAY_S = 1.0, 1.0


class LogSink:
    """Sink over an event log that is opened when it is first needed; see `serving.sink.Sink`.

    While the log is unavailable, callers are refused at once. Otherwise callers that wait for the log would occupy the
    threads that answer readers. After each pause one caller tries the log again.

    Args:
        open_log: Opens the event log.
        topics: Names of the log's topics. Missing topics are created.
    """

    def __init__(self, open_log: Callable[[], EventLog], topics: Topics) -> None:
        self._open_log = open_log
        self._topics = topics
        self._lock = threading.Lock()
        self._log: EventLog | None = None
        self._breaker = Breaker(_AWAY_S)

    def open(self) -> None:
        """Opens the log before the first request needs it. Does nothing if the log is unavailable."""
        with self._lock, contextlib.suppress(LogError):
            self._opened()

    def append(self, kind: Kind, messages: Sequence[tuple[bytes, bytes]]) -> None:
        """Appends (key, message) pairs to the topic of a kind. Callers append in turn.

        Raises:
            LogError: The log is unavailable, or was within the last second.
        """
        self._in_turn(kind, lambda log: log.append(getattr(self._topics, kind), list(messages)))

    def forget(self, user: str, *, by: str) -> None:
        """Appends a request to forget a user; see `serving.sink.Sink`."""
        self._in_turn("users", lambda log: forget(log, self._topics, [user], by=by))

    def _in_turn(self, kind: str, work: Callable[[EventLog], object]) -> None:
        """Calls a function with the log, one caller at a time."""
        if not self._breaker.allows():
            raise LogError(f"{kind}: the event log did not answer a moment ago; send them again")
        if not self._lock.acquire(timeout=_TURN_S):
            self._breaker.failed()
            raise LogError(f"{kind}: the event log takes too long; send them again")
        try:
            work(self._opened())
        except LogError:
            self._breaker.failed()
            raise
        else:
            self._breaker.succeeded()
        finally:
            self._lock.release()

    def close(self) -> None:
        """Closes the log."""
        if self._log is not None:
            self._log.close()

    def _opened(self) -> EventLog:
        if self._log is None:
            log = self._open_log()
            log.create_topics(self._topics.partitions())
            self._log = log
        return self._log
