"""Sends commands to one Redis server over one connection, and reads the replies later."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import hiredis
import redis
from redis.connection import Connection

from serving.store.redis.servers import name_of

Words: TypeAlias = Sequence[Any]
"""A command and its arguments: text, bytes and numbers."""

_LOST = (redis.ConnectionError, redis.TimeoutError)


class Sent:
    """A command and its reply.

    Attributes:
        slot: Hash slot of the keys.
        words: The command and its arguments.
        reply: Reply of the server.
        failure: Reason why there is no reply, or None.
    """

    __slots__ = ("failure", "reply", "slot", "words")

    def __init__(self, slot: int, words: Words) -> None:
        self.slot = slot
        self.words = words
        self.reply: Any = None
        self.failure: redis.RedisError | None = None

    @property
    def asked(self) -> redis.exceptions.AskError | None:
        """The redirection of this command alone to a node that is importing its slot, or None."""
        error = self.failure
        if isinstance(error, redis.exceptions.AskError) and not isinstance(error, redis.exceptions.MovedError):
            return error
        return None


class RoundTrip:
    """Commands on their way to a server and back.

    Args:
        client: The server.
        commands: The commands, which the server runs in this order.
    """

    def __init__(self, client: redis.Redis, commands: Sequence[Sent]) -> None:
        self._client = client
        self._commands = commands
        self._redirected = [command.failure is not None and command.asked is not None for command in commands]
        self._connection: Connection | None = None
        self._unread = True
        self._lost: redis.RedisError | None = None

    def send(self) -> None:
        """Sends the commands. A failure is the failure of each command."""
        packed: list[bytes] = []
        for command, redirected in zip(self._commands, self._redirected, strict=True):
            if redirected:
                packed.append(hiredis.pack_command(("ASKING",)))
            packed.append(hiredis.pack_command(tuple(command.words)))
        try:
            self._connection = self._client.connection_pool.get_connection()
            self._connection.send_packed_command([b"".join(packed)])
        except _LOST as error:
            self._lost = named(self._client, error)

    def receive(self) -> None:
        """Sets the reply or the failure of each command."""
        for command, redirected in zip(self._commands, self._redirected, strict=True):
            if redirected:
                self._read()
            reply = self._read()
            command.failure = reply if isinstance(reply, redis.RedisError) and not _expected(reply) else None
            command.reply = reply
        self._unread = self._lost is not None

    def end(self) -> None:
        """Returns the connection to its pool. A connection with unread replies is closed."""
        if self._connection is not None:
            if self._unread:
                self._connection.disconnect()
            self._client.connection_pool.release(self._connection)
            self._connection = None

    def _read(self) -> Any:
        """Returns the next reply, or its error. The error of a lost connection is the reply to every later command."""
        if self._lost is not None:
            return self._lost
        assert self._connection is not None
        try:
            return self._connection.read_response()
        except _LOST as error:
            self._lost = named(self._client, error)
            return self._lost
        except redis.ResponseError as error:
            return named(self._client, error)


def _expected(error: redis.RedisError) -> bool:
    """Returns True for an error that the caller of a command handles as its reply."""
    return isinstance(error, redis.exceptions.NoScriptError) or "no such key" in str(error)


def named(client: redis.Redis, error: redis.RedisError) -> redis.RedisError:
    """Returns an error of the same kind whose text names the server."""
    name, text = name_of(client), str(error)
    if name in text or isinstance(error, redis.exceptions.AskError):
        return error
    if not isinstance(error, redis.ResponseError):
        kind = redis.TimeoutError if isinstance(error, redis.TimeoutError) else redis.ConnectionError
        return kind(f"node {name}: {text}")
    error.args = (f"node {name}: {text}",)
    return error
