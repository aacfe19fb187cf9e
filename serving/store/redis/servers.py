"""Finds the Redis server of a bundle: the only server, or the cluster's node of the bundle's hash slot.

All keys of a bundle have the same hash tag, so a bundle is in one slot, on one node. Its scripts and pipelines work as
on a single server. Another bundle may be on another node.
"""

import re
from typing import Protocol

import redis
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from features.errors import StoreError

_CLUSTER = "+cluster"
_TIMEOUT_S, _CONNECT_S, _TRIES = 5, 3, 5


class Servers(Protocol):
    """One or more Redis servers."""

    def of(self, key: bytes) -> redis.Redis:
        """Returns the server of a key."""
        ...

    def every(self) -> list[redis.Redis]:
        """Returns all servers that have keys."""
        ...

    def look_again(self) -> bool:
        """Reads the assignment of keys to servers again. Returns False if the assignment cannot change."""
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


class SingleServer:
    """The only server of an address."""

    def __init__(self, address: str) -> None:
        self._client = redis.Redis.from_url(
            address,
            decode_responses=False,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_CONNECT_S,
            retry=_retry(),
        )

    def of(self, key: bytes) -> redis.Redis:
        """See `Servers`."""
        return self._client

    def every(self) -> list[redis.Redis]:
        """See `Servers`."""
        return [self._client]

    def look_again(self) -> bool:
        """See `Servers`."""
        return False

    def close(self) -> None:
        """See `Servers`."""
        self._client.close()


class ClusterServers:
    """The primaries of a cluster, found through any node. Replicas are not read, since they may lag."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._cluster: RedisCluster | None = None

    def of(self, key: bytes) -> redis.Redis:
        """See `Servers`."""
        cluster = self._open()
        return self._client(cluster.get_node_from_key(key))

    def every(self) -> list[redis.Redis]:
        """See `Servers`."""
        return [self._client(node) for node in self._open().get_primaries()]

    def look_again(self) -> bool:
        """See `Servers`."""
        self.close()
        return True

    def close(self) -> None:
        """See `Servers`."""
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()

    def _open(self) -> RedisCluster:
        if self._cluster is None:
            self._cluster = RedisCluster.from_url(
                self._address, decode_responses=False, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_CONNECT_S
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


def _retry() -> Retry:
    return Retry(ExponentialBackoff(base=0.02, cap=0.3), _TRIES)
