"""Sends commands and scripts to the Redis servers of a store, and raises their failures as StoreError."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import redis
from redis.connection import Connection
from redis.crc import key_slot

from features.errors import StoreError
from serving.store.page import key_of
from serving.store.redis.scripts import Call, Script
from serving.store.redis.servers import name_of, open_servers, without_password

_TRIES = 4  # of a server that fails
_GIVE_UP_S = 15.0  # tries of a server that hangs, or of a slot that moves
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_NAMED = 3
_T = TypeVar("_T")

Words: TypeAlias = Sequence[Any]
"""A command and its arguments."""

_MOVING = (redis.exceptions.AskError, redis.exceptions.TryAgainError)  # a MovedError is an AskError
_AWAY = (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ClusterError, redis.exceptions.ClusterDownError)


class Packet(NamedTuple):
    """Commands for one server, which it runs one after another.

    Attributes:
        slot: Hash slot of the keys.
        commands: The commands.
    """

    slot: int
    commands: Sequence[Words]


class RedisCommands:
    """Client of the servers of one address.

    Every method raises StoreError if a server fails.

    Attributes:
        servers: The servers, see `serving.store.redis.servers`.
        address: The address without its password, for messages.

    Args:
        address: See `serving.store.redis.servers.open_servers`.
    """

    def __init__(self, address: str) -> None:
        self.servers = open_servers(address)
        self.address = without_password(address)

    def close(self) -> None:
        """Closes the connections."""
        self.servers.close()

    def trip(self, packets: Sequence[Packet]) -> list[list[Any]]:
        """Returns the replies to each packet, in one round trip.

        The packets are sent to all servers before the first reply is read, so servers work at the same time. A packet
        is sent again if a connection is lost or its slot has moved, so each command must be repeatable. An error of a
        script that the server does not know is a reply.

        Args:
            packets: Commands by hash slot.
        """
        replies: list[list[Any]] = [[] for _ in packets]
        left: dict[int, Packet] = dict(enumerate(packets))
        redirected: dict[int, redis.exceptions.AskError] = {}
        began = time.monotonic()
        for number in itertools.count(1):
            failures = self._send(left, redirected, replies)
            if not failures:
                return replies
            moving = all(isinstance(error, _MOVING) for error in failures.values())
            away = all(isinstance(error, (*_MOVING, *_AWAY)) for error in failures.values())
            late = time.monotonic() - began > _GIVE_UP_S
            if late or not away or (number == _TRIES and not moving):
                raise self._failed(failures.values())
            left = {position: packets[position] for position in failures}
            redirected = {
                position: error
                for position, error in failures.items()
                if isinstance(error, redis.exceptions.AskError) and not isinstance(error, redis.exceptions.MovedError)
            }
            if len(redirected) < len(left):
                self._look_again()
            time.sleep(min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S) if number > 1 else 0)
        raise AssertionError("unreachable")

    def run(self, script: Script, calls: Iterable[Call]) -> list[Any]:
        """Returns the replies to calls of a script, in one round trip. Loads the script where a server has lost it.

        Args:
            script: The script.
            calls: Keys and arguments of each call. The keys of a call are in one slot.
        """
        packets = [
            Packet(key_slot(keys[0]), [("EVALSHA", script.sha, len(keys), *keys, *arguments)])
            for keys, arguments in calls
        ]
        replies = [reply for (reply,) in self.trip(packets)]
        for _ in range(3):  # another client may flush the scripts before each try
            lost = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
            if not lost:
                return replies
            load = ("SCRIPT LOAD", script.text)
            again = [Packet(packets[i].slot, [load, *packets[i].commands]) for i in lost]
            for i, (_, reply) in zip(lost, self.trip(again), strict=True):
                replies[i] = reply
        raise self._failed(reply for reply in replies if isinstance(reply, redis.exceptions.NoScriptError))

    def all(self, commands: Sequence[tuple[bytes, Words]]) -> list[Any]:
        """Returns the replies to many commands, each with a key of its slot, in one round trip."""
        return [reply for (reply,) in self.trip([Packet(key_slot(key), [words]) for key, words in commands])]

    def command(self, bundle: str, *words: Any) -> Any:
        """Returns the reply to one command at the home of a bundle, parsed by the client."""
        return self.ask(bundle, lambda client: client.execute_command(*words))

    def each(self, bundle: str, commands: Sequence[Words]) -> list[Any]:
        """Returns the replies to many commands at the home of a bundle, in one round trip."""
        (replies,) = self.trip([Packet(key_slot(key_of(bundle, "table")), commands)]) if commands else ([],)
        return replies

    def ask(self, bundle: str, call: Callable[[redis.Redis], _T]) -> _T:
        """Returns the answer of the server of a bundle's home. Asks again if a cluster has moved the home."""
        slot = key_slot(key_of(bundle, "table"))
        try:
            try:
                return call(self.servers.of(slot))
            except (redis.exceptions.MovedError, redis.ConnectionError, redis.TimeoutError):
                if not self.servers.look_again():
                    raise
                return call(self.servers.of(slot))
        except redis.RedisError as error:
            raise self._failed([error]) from error

    def every(self, call: Callable[[redis.Redis], _T]) -> list[_T]:
        """Returns the answer of each server."""
        try:
            answers = []
            for client in self.servers.every():
                try:
                    answers.append(call(client))
                except redis.RedisError as error:
                    self._look_again()
                    raise self._failed([_named(client, error)]) from error
            return answers
        except redis.RedisError as error:
            raise self._failed([error]) from error

    def require_coverage(self) -> None:
        """Raises StoreError if no server owns some hash slots."""
        try:
            uncovered = self.servers.uncovered()
        except redis.RedisError as error:
            raise self._failed([error]) from error
        if uncovered:
            self._look_again()
            raise self._failed([])

    def _send(
        self,
        packets: dict[int, Packet],
        redirected: dict[int, redis.exceptions.AskError],
        replies: list[list[Any]],
    ) -> dict[int, redis.RedisError]:
        """Sends packets and sets their replies. Returns the error of each packet that failed."""
        failures: dict[int, redis.RedisError] = {}
        servers: dict[int, redis.Redis] = {}
        positions: dict[redis.Redis, list[int]] = {}
        for position, packet in packets.items():
            try:
                if (to := redirected.get(position)) is not None:
                    client = self.servers.at(to.host, to.port)
                else:
                    client = servers.get(packet.slot) or self.servers.of(packet.slot)
                    servers[packet.slot] = client
            except redis.RedisError as error:
                failures[position] = error
            else:
                positions.setdefault(client, []).append(position)
        trips = []
        try:
            for client, own in positions.items():
                trip = _Trip(client, [(position, packets[position], position in redirected) for position in own])
                trips.append(trip)
                trip.send()
            for trip in trips:
                failures |= trip.receive(replies)
        finally:
            for trip in trips:
                trip.end()
        return failures

    def _look_again(self) -> None:
        try:
            self.servers.look_again()
        except redis.RedisError as error:
            raise self._failed([error]) from error

    def _failed(self, errors: Iterable[redis.RedisError]) -> StoreError:
        """Returns the error of a failed trip. It names each node that is away."""
        errors = list(errors)
        away = [error for error in errors if isinstance(error, (redis.ConnectionError, redis.TimeoutError))]
        texts = list(dict.fromkeys(str(error) for error in away or errors))[:_NAMED]
        try:
            uncovered = self.servers.uncovered()
        except redis.RedisError:
            uncovered = ""
        if uncovered:
            texts.append(f"no node owns the hash slots {uncovered} (see `redis-cli --cluster check`)")
        return StoreError(
            f"the online store at {self.address} failed: {', '.join(texts)}; see that the server runs and has memory, "
            "and that TESSERA_REDIS names it"
        )


class _Trip:
    """Packets on their way to one server and back, over one connection.

    Args:
        client: The server.
        packets: Position and packet, and whether the cluster has redirected the packet to this server.
    """

    def __init__(self, client: redis.Redis, packets: list[tuple[int, Packet, bool]]) -> None:
        self._client = client
        self._packets = packets
        self._connection: Connection | None = None
        self._failure: redis.RedisError | None = None
        self._unread = True

    def send(self) -> None:
        """Sends all packets. A failure is returned by `receive`."""
        words: list[Words] = []
        for _, packet, redirected in self._packets:
            for command in packet.commands:
                if redirected:
                    words.append(("ASKING",))
                words.append(command)
        try:
            self._connection = self._client.connection_pool.get_connection()
            self._connection.send_packed_command(self._connection.pack_commands(words))
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._failure = _named(self._client, error)

    def receive(self, replies: list[list[Any]]) -> dict[int, redis.RedisError]:
        """Sets the replies of packets. Returns the error of each packet that failed."""
        failures: dict[int, redis.RedisError] = {}
        for position, packet, redirected in self._packets:
            own: list[Any] = []
            for _ in packet.commands:
                if redirected:
                    self._read()
                own.append(self._read())
            errors = [reply for reply in own if isinstance(reply, redis.RedisError)]
            serious = [error for error in errors if not isinstance(error, redis.exceptions.NoScriptError)]
            if serious:
                failures[position] = serious[0]
            else:
                replies[position] = own
        self._unread = self._failure is not None
        return failures

    def end(self) -> None:
        """Returns the connection to its pool. A connection with unread replies is closed."""
        if self._connection is not None:
            if self._unread:
                self._connection.disconnect()
            self._client.connection_pool.release(self._connection)

    def _read(self) -> Any:
        """Returns the next reply, or its error. The error of a lost connection is the reply to every later command."""
        if self._failure is not None:
            return self._failure
        assert self._connection is not None
        try:
            return self._connection.read_response()
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._failure = _named(self._client, error)
            return self._failure
        except redis.ResponseError as error:
            return _named(self._client, error)


def _named(client: redis.Redis, error: redis.RedisError) -> redis.RedisError:
    """Returns an error of the same kind whose text names the server."""
    name, text = name_of(client), str(error)
    if name in text or isinstance(error, redis.exceptions.AskError):
        return error
    if not isinstance(error, redis.ResponseError):
        kind = redis.TimeoutError if isinstance(error, redis.TimeoutError) else redis.ConnectionError
        return kind(f"node {name}: {text}")
    error.args = (f"node {name}: {text}",)
    return error
