"""Sends commands and scripts to the Redis servers of a store, and raises their failures as StoreError."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import redis
from redis.crc import key_slot

from features.errors import StoreError
from serving.store.page import key_of
from serving.store.redis.round_trip import RoundTrip, Sent, Words, named
from serving.store.redis.scripts import Call, Script
from serving.store.redis.servers import open_servers, without_password

_TRIES = 4  # of a server that fails
_GIVE_UP_S = 15.0  # tries of a server that hangs, or of a slot that moves
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
_NAMED = 3
_T = TypeVar("_T")

_MOVING = (redis.exceptions.AskError, redis.exceptions.TryAgainError)  # a MovedError is an AskError
_AWAY = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.exceptions.ClusterDownError,
)


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

        The packets are sent to all servers before the first reply is read, so servers work at the same time. A command
        is sent again if a connection is lost or its slot has moved, so each command must be repeatable. Errors of an
        unknown script and of a missing key are replies.

        Args:
            packets: Commands by hash slot.
        """
        sent = [Sent(packet.slot, words) for packet in packets for words in packet.commands]
        self._answer(sent)
        replies = (command.reply for command in sent)
        return [list(itertools.islice(replies, len(packet.commands))) for packet in packets]

    def _answer(self, commands: Sequence[Sent]) -> None:
        """Sends commands until each has a reply."""
        began, left = time.monotonic(), commands
        for number in itertools.count(1):
            self._send(left)
            left = [command for command in left if command.failure is not None]
            if not left:
                return
            failures = [command.failure for command in left if command.failure is not None]
            moving = all(isinstance(error, _MOVING) for error in failures)
            away = all(isinstance(error, (*_MOVING, *_AWAY)) for error in failures)
            late = time.monotonic() - began > _GIVE_UP_S
            if late or not away or (number == _TRIES and not moving):
                raise self._failed(failures)
            if not all(command.asked for command in left):
                self._look_again()
            if number > 1:
                time.sleep(min(_FIRST_PAUSE_S * 2**number, _LONGEST_PAUSE_S))

    def run(self, script: Script, calls: Iterable[Call]) -> list[Any]:
        """Returns the replies to calls of a script, in one round trip. Loads the script where a server has lost it.

        Args:
            script: The script.
            calls: Keys and arguments of each call. The keys of a call are in one slot.
        """
        sent = [
            Sent(_slot(keys[0]), (b"EVALSHA", script.sha, len(keys), *keys, *arguments)) for keys, arguments in calls
        ]
        self._answer(sent)
        replies = [command.reply for command in sent]
        for _ in range(3):  # another client may flush the scripts before each try
            lost = [i for i, reply in enumerate(replies) if isinstance(reply, redis.exceptions.NoScriptError)]
            if not lost:
                return replies
            load = ("SCRIPT", "LOAD", script.text)
            again = [Packet(sent[i].slot, [load, sent[i].words]) for i in lost]
            for i, (_, reply) in zip(lost, self.trip(again), strict=True):
                replies[i] = reply
        raise self._failed(reply for reply in replies if isinstance(reply, redis.exceptions.NoScriptError))

    def all(self, commands: Sequence[tuple[bytes, Words]]) -> list[Any]:
        """Returns the replies to many commands, each with a key of its slot, in one round trip."""
        sent = [Sent(_slot(key), words) for key, words in commands]
        self._answer(sent)
        return [command.reply for command in sent]

    def command(self, bundle: str, *words: Any) -> Any:
        """Returns the reply to one command at the home of a bundle."""
        (reply,) = self.each(bundle, [words])
        return reply

    def each(self, bundle: str, commands: Sequence[Words]) -> list[Any]:
        """Returns the replies to many commands at the home of a bundle, in one round trip."""
        (replies,) = self.trip([Packet(_slot(key_of(bundle, "table")), commands)]) if commands else ([],)
        return replies

    def every(self, call: Callable[[redis.Redis], _T]) -> list[_T]:
        """Returns the answer of each server."""
        try:
            answers = []
            for client in self.servers.every():
                try:
                    answers.append(call(client))
                except redis.RedisError as error:
                    self._look_again()
                    raise self._failed([named(client, error)]) from error
            return answers
        except redis.RedisError as error:
            raise self._failed([error]) from error

    def require_coverage(self) -> None:
        """Raises StoreError if no server owns some hash slots."""
        self._look_again()
        if self.servers.uncovered():
            raise self._failed([])

    def _send(self, commands: Sequence[Sent]) -> None:
        """Sends commands and sets the reply or the failure of each."""
        servers: dict[int, redis.Redis] = {}
        parts: dict[redis.Redis, list[Sent]] = {}
        for command in commands:
            try:
                if command.failure is not None and (to := command.asked) is not None:
                    client = self.servers.at(to.host, to.port)
                else:
                    client = servers.get(command.slot) or self.servers.of(command.slot)
                    servers[command.slot] = client
            except redis.RedisError as error:
                command.failure = error
            else:
                parts.setdefault(client, []).append(command)
        trips = []
        try:
            for client, part in parts.items():
                trip = RoundTrip(client, part)
                trips.append(trip)
                trip.send()
            for trip in trips:
                trip.receive()
        finally:
            for trip in trips:
                trip.end()

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


def _slot(key: bytes) -> int:
    """Returns the hash slot of a key."""
    start = key.find(b"{")
    return _slot_of_tag(key[start + 1 : key.find(b"}", start)])


_slot_of_tag = functools.lru_cache(4_096)(key_slot)  # the tags of shares, and the ids of bundles
