"""Sends commands and scripts to the Redis servers of a store, and raises their failures as StoreError."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import redis

from features.errors import StoreError
from serving.store.page import Call, key_of
from serving.store.redis.scripts import Script, run_batch
from serving.store.redis.servers import open_servers, without_password

_CALLS = 16  # script calls of one round trip
_T = TypeVar("_T")


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

    def run(self, bundle: str, script: Script, calls: Iterable[Call]) -> list[Any]:
        """Returns the replies to many calls of a script. A round trip takes several calls.

        Args:
            bundle: Id of the bundle whose server is asked.
            script: The script.
            calls: Keys and arguments of each call.
        """
        calls, replies = iter(calls), []
        while batch := list(itertools.islice(calls, _CALLS)):
            replies += self.ask(bundle, partial(run_batch, script=script, calls=batch))
        return replies

    def command(self, bundle: str, *words: Any) -> Any:
        """Returns the reply to one command."""
        return self.ask(bundle, lambda client: client.execute_command(*words))

    def each(self, bundle: str, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Returns the replies to many commands, in one round trip."""

        def send(client: redis.Redis) -> list[Any]:
            pipeline = client.pipeline(transaction=False)
            for words in commands:
                pipeline.execute_command(*words)
            return list(pipeline.execute())

        return self.ask(bundle, send) if commands else []

    def ask(self, bundle: str, call: Callable[[redis.Redis], _T]) -> _T:
        """Returns the answer of a bundle's server. Asks again if a cluster has moved the bundle."""
        try:
            try:
                return call(self.servers.of(key_of(bundle, "table")))
            except (redis.exceptions.MovedError, redis.ConnectionError, redis.TimeoutError):
                if not self.servers.look_again():
                    raise
                return call(self.servers.of(key_of(bundle, "table")))
        except redis.RedisError as error:
            raise self._failed(error) from error

    def every(self, call: Callable[[redis.Redis], _T]) -> list[_T]:
        """Returns the answer of each server."""
        try:
            return [call(client) for client in self.servers.every()]
        except redis.RedisError as error:
            self.servers.look_again()
            raise self._failed(error) from error

    def _failed(self, error: redis.RedisError) -> StoreError:
        return StoreError(
            f"the online store at {self.address} failed: {error}; see that the server runs and has memory, "
            "and that TESSERA_REDIS names it"
        )
