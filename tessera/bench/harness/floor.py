"""Floors: the least that a part can cost on this machine, measured in the run that measures the part.

A claim is a ratio to a floor, so that it means the same on a fast and on a slow machine.
"""

import contextlib
import http.client
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
from redis import Redis

from streaming.log.protocol import EventLog, ends_of

_ROUNDS, _WARM = 200, 20


def p50_p99_ms(call: Callable[[], object], *, rounds: int = _ROUNDS, warm: int = _WARM) -> tuple[float, float]:
    """Times a call.

    Args:
        call: Timed from its start to its return.
        rounds: Number of timed calls.
        warm: Number of calls before them, which do not count.

    Returns:
        The 50th and the 99th percentile in milliseconds.
    """
    times: list[float] = []
    for number in range(warm + rounds):
        began = time.perf_counter()
        call()
        if number >= warm:
            times.append(1_000 * (time.perf_counter() - began))
    p50, p99 = np.percentile(times, [50, 99])
    return float(p50), float(p99)


@contextmanager
def plain_values(address: str, *, rows: int, size_bytes: int) -> Iterator["PlainValues"]:
    """Yields a plain Redis layout, one key a row, and removes its keys at the end."""
    with contextlib.closing(Redis.from_url(address)) as client:
        values = PlainValues(client, rows, size_bytes)
        try:
            yield values
        finally:
            values.remove()


class PlainValues:
    """Rows as plain Redis values: no versions, no order, no pages.

    Args:
        client: A connection.
        rows: Number of rows R.
        size_bytes: Bytes of a row.
    """

    def __init__(self, client: Redis, rows: int, size_bytes: int) -> None:
        self._client = client
        name = f"bench-floor-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._keys = np.array([f"{name}:{row}" for row in range(rows)], dtype=object)
        self._size_bytes = size_bytes
        self.write(np.arange(rows))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Reads rows by one MGET; returns (n, size_bytes / 4) float32."""
        stored = cast(list[bytes], self._client.mget(self._keys[rows].tolist()))
        return np.frombuffer(b"".join(stored), dtype=np.float32).reshape(len(rows), -1)

    def write(self, rows: np.ndarray) -> None:
        """Writes rows by one MSET for each 10,000."""
        for start in range(0, len(rows), 10_000):
            keys = self._keys[rows[start : start + 10_000]].tolist()
            self._client.mset(dict.fromkeys(keys, bytes(self._size_bytes)))

    def remove(self) -> None:
        """Removes the keys."""
        for start in range(0, len(self._keys), 10_000):
            self._client.unlink(*self._keys[start : start + 10_000].tolist())


def request_ms(port: int, path: str) -> float:
    """Times a request on one open connection to this machine's `port`; returns the 50th percentile in milliseconds."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:

        def ask() -> None:
            connection.request("GET", path)
            connection.getresponse().read()

        return p50_p99_ms(ask)[0]


def round_trip_ms(log: EventLog, topic: str) -> float:
    """Appends single messages and reads each back; returns the 50th percentile in milliseconds.

    Args:
        log: The event log.
        topic: A topic of one partition that nothing else uses.
    """
    log.create_topics({topic: 1})
    with contextlib.closing(log.follow(topic, ends_of(log, topic))) as follower:

        def there_and_back() -> None:
            log.append(topic, [(None, b"{}")])
            while not follower.poll(1, 1.0):
                pass

        return p50_p99_ms(there_and_back, rounds=100, warm=10)[0]


def transaction_ms(
    log: EventLog, topic: str, *, size_bytes: int, behind: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Times bare transactions: one message is appended and committed, and a reader of committed messages gets it.

    Args:
        log: The event log.
        topic: A topic of one partition that nothing else uses.
        size_bytes: Size of the message.
        behind: Called when the reader has the message. A round trip ends when it returns.

    Returns:
        The 50th and the 99th percentile in milliseconds.
    """
    log.create_topics({topic: 1})
    value = os.urandom(size_bytes)
    with contextlib.ExitStack() as stack:
        transactor = stack.enter_context(contextlib.closing(log.transactor(topic)))
        follower = stack.enter_context(contextlib.closing(log.follow(topic, ends_of(log, topic))))

        def there_and_back() -> None:
            with transactor.begin() as transaction:
                transaction.append(topic, value)
            while not follower.poll(1, 1.0):
                pass
            behind()

        return p50_p99_ms(there_and_back, rounds=100, warm=10)
