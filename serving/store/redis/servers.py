"""Finds the Redis server of a hash slot: the only server, or the cluster's node that owns the slot.

`serving.store.redis.spread` places the keys of a bundle in slots.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Protocol

import redis
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from features.errors import StoreError
from serving.store.redis.spread import SHARES, SLOTS

_CLUSTER = "+cluster"
_TIMEOUT_S, _CONNECT_S, _TRIES = 5, 3, 5


class Servers(Protocol):
    """One or more Redis servers.

    Attributes:
        shares: Number of shares of a new bundle, 1 for a single server.
    """

    shares: int

    def of(self, slot: int) -> redis.Redis:
        """Returns the server of a hash slot."""
        ...

    def at(self, host: str, port: int) -> redis.Redis:
        """Returns the server at an address, which a redirection of a cluster names."""
        ...

    def every(self) -> list[redis.Redis]:
        """Returns all servers that have keys."""
        ...

    def uncovered(self) -> str:
        """Returns the hash slots that no server owns, such as "0-99, 200", or ""."""
        ...

    def look_again(self) -> bool:
        """Reads the assignment of slots to servers again. Returns False if the assignment cannot change."""
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


class SingleServer:
    """The only server of an address."""

    shares = 1

    def __init__(self, address: str) -> None:
        self._client = redis.Redis.from_url(
            address,
            decode_responses=False,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_S,
            retry=_retry(),
        )

    def of(self, slot: int) -> redis.Redis:
        """See `Servers`."""
        return self._client

    def at(self, host: str, port: int) -> redis.Redis:
        """See `Servers`."""
        return self._client

    def every(self) -> list[redis.Redis]:
        """See `Servers`."""
        return [self._client]

    def uncovered(self) -> str:
        """See `Servers`."""
        return ""

    def look_again(self) -> bool:
        """See `Servers`."""
        return False

    def close(self) -> None:
        """See `Servers`."""
        self._client.close()


class ClusterServers:
    """The primaries of a cluster, found through any node. Replicas are not read, since they may lag."""

    shares = SHARES

    def __init__(self, address: str) -> None:
        self._address = address
        self._cluster: RedisCluster | None = None
        self._owners: dict[int, redis.Redis] = {}

    def of(self, slot: int) -> redis.Redis:
        """See `Servers`."""
        owners = self._owners  # another thread may replace it
        if (client := owners.get(slot)) is None:
            with _as_connection_error():
                client = owners[slot] = self._client(self._open().nodes_manager.get_node_from_slot(slot))
        return client

    def at(self, host: str, port: int) -> redis.Redis:
        """See `Servers`."""
        node = self._open().get_node(host, port)
        if node is None:
            raise redis.ConnectionError(f"the cluster does not list the node {host}:{port} yet")
        return self._client(node)

    def every(self) -> list[redis.Redis]:
        """See `Servers`."""
        return [self._client(node) for node in self._open().get_primaries()]

    def uncovered(self) -> str:
        """See `Servers`."""
        covered = self._open().nodes_manager.slots_cache
        ranges: list[list[int]] = []
        for slot in range(SLOTS):
            if slot not in covered:
                if ranges and ranges[-1][1] == slot - 1:
                    ranges[-1][1] = slot
                else:
                    ranges.append([slot, slot])
        return ", ".join(f"{low}-{high}" if low < high else str(low) for low, high in ranges)

    def look_again(self) -> bool:
        """See `Servers`. Connections stay open, since other threads may use them. Any known node is asked."""
        if self._cluster is not None:
            with _as_connection_error():
                self._cluster.nodes_manager.initialize()
            self._owners = {}
        return True

    def close(self) -> None:
        """See `Servers`."""
        cluster, self._cluster = self._cluster, None
        self._owners = {}
        if cluster is not None:
            cluster.close()

    def _open(self) -> RedisCluster:
        if self._cluster is None:
            with _as_connection_error():
                self._cluster = RedisCluster.from_url(
                    self._address,
                    decode_responses=False,
                    socket_timeout=_TIMEOUT_S,
                    socket_connect_timeout=_CONNECT_S,
                    require_full_coverage=False,  # a bundle may need none of the slots that no node owns
                )
        return self._cluster

    def _client(self, node: ClusterNode) -> redis.Redis:
        client = self._open().get_redis_connection(node)
        assert isinstance(client, redis.Redis)
        return client


def open_servers(address: str) -> Servers:
    """Opens the servers of an address.

    Args:
        address: Address, `redis://user:password@host:6379/0`, `rediss://…` for TLS, `unix:///path/to/socket`, or
            `redis+cluster://…` and `rediss+cluster://…` with any node of a cluster. A query may have options of the
            connection: `?ssl_ca_certs=ca.pem&ssl_certfile=own.pem&ssl_keyfile=own.key`.

    Raises:
        StoreError: The address has another scheme or cannot be read.
    """
    if not re.match(r"(redis|rediss)(\+cluster)?://|unix://", address):
        raise StoreError(
            "address must start with redis://, rediss://, redis+cluster://, rediss+cluster:// or unix://, "
            f"not {without_password(address)!r}"
        )
    scheme, colon, rest = address.partition(":")
    try:
        if scheme.endswith(_CLUSTER):
            return ClusterServers(scheme.removesuffix(_CLUSTER) + colon + rest)
        return SingleServer(address)
    except ValueError as error:
        raise StoreError(f"address {without_password(address)!r} cannot be read: {error}") from error


def without_password(address: str) -> str:
    """Returns an address without user and password, for messages."""
    return re.sub(r"//[^@/]*@", "//", address)


def name_of(client: redis.Redis) -> str:
    """Returns the host and port of a server, or the path of its socket, for messages."""
    options = client.connection_pool.connection_kwargs
    return str(options["path"]) if "path" in options else f"{options.get('host')}:{options.get('port')}"


@contextlib.contextmanager
def _as_connection_error() -> Iterator[None]:
    """Raises errors of the cluster as a whole as ConnectionError. The client's own type is no RedisError."""
    try:
        yield
    except redis.exceptions.RedisClusterException as error:
        raise redis.ConnectionError(str(error)) from error


def _retry() -> Retry:
    return Retry(ExponentialBackoff(base=0.02, cap=0.3), _TRIES)
