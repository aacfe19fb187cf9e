"""Appends requests to forget users to the log, and reads the forgotten users from it."""

import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence

from features.errors import EventError
from features.value.forgotten import SALT_BYTES, Forgotten, ForgottenUsers, hashed
from streaming.forget.message import Line, decode_line, encode_line, encode_tombstone
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics

_MOST_BYTES, _NEWEST = 4_096, 200


def forget(log: EventLog, topics: Topics, users: Sequence[str], *, by: str) -> list[Forgotten]:
    """Appends a request to forget each user: a line of the topic `forgotten`, then a tombstone of the topic `events`.

    The line comes first. After an interrupted call the next frame leaves the user out, and the same call again appends
    the tombstone. A repeated request removes what the user has done since.

    Args:
        log: Log of the topics, which exist.
        topics: Names of the topics.
        users: Canonical ids.
        by: Name of who asks, for the audit.

    Raises:
        EventError: An id is empty, or longer than 4,096 bytes. Nothing was appended.
        LogError: The log does not answer.
    """
    for user in users:
        size = len(user.encode(errors="surrogatepass"))
        if not 0 < size <= _MOST_BYTES:
            raise EventError(f"user: expected an id of 1 to {_MOST_BYTES:,} bytes, got {size}; give the id of one user")
    salt, at_us = salt_of(log, topics), time.time_ns() // 1_000
    requests = [Forgotten(hashed(user, salt), salt, at_us) for user in users]
    log.append(topics.forgotten, [(None, encode_line("requested", request, by=by)) for request in requests])
    keys = [user.encode(errors="replace") for user in users]
    tombstones = [encode_tombstone(request) for request in requests]
    log.append(topics.events, list(zip(keys, tombstones, strict=True)))
    return requests


def salt_of(log: EventLog, topics: Topics) -> str:
    """Returns the salt of the log's first request, or a new random salt. Two first callers may use two salts."""
    first = next(audit(log, topics), None)
    return secrets.token_hex(SALT_BYTES) if first is None else first.salt


def audit(log: EventLog, topics: Topics, start: int = 0) -> Iterator[Line]:
    """Yields the lines of the topic `forgotten` from an offset on, oldest first. Other messages are skipped."""
    end, oldest = log.end_offsets(topics.forgotten)[0], log.offsets_at(topics.forgotten, 0)[0]
    start = max(start, oldest)
    for message in log.read(topics.forgotten, 0, start, end) if start < end else ():
        line = decode_line(message.value)
        if line is not None:
            yield line


class ForgottenFeed:
    """Follows the topic `forgotten`.

    Attributes:
        users: Forgotten users, as of the last call of `read_on`.
        newest: The last 200 lines, oldest first.
        rewrites: Number of lines about rewrites of the log.

    Args:
        log: Log of the topic, which exists.
        topics: Names of the topics.
    """

    def __init__(self, log: EventLog, topics: Topics) -> None:
        self.users = ForgottenUsers()
        self.newest: deque[Line] = deque(maxlen=_NEWEST)
        self.rewrites = 0
        self._log, self._topics = log, topics
        self._next = 0

    def read_on(self) -> ForgottenUsers:
        """Reads new lines, and returns all forgotten users."""
        end = self._log.end_offsets(self._topics.forgotten)[0]
        if end > self._next:
            for line in audit(self._log, self._topics, self._next):
                self.users.add(Forgotten(line.user, line.salt, line.at_us))
                self.newest.append(line)
                self.rewrites += line.kind == "rewritten"
            self._next = end
        return self.users
