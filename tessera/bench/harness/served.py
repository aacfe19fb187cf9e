"""Shared parts of the serving benchmarks: `tessera serve` in a process of its own, and its callers."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import TesseraError
from models.bundle.bundle import Bundle
from tessera.bench.harness.load import TIMEOUT_S

_READY_S = 120.0


@contextlib.contextmanager
def server(environment: Mapping[str, str], *options: str, log: Path) -> Iterator[int]:
    """A server with an environment of its own; yields its port when it answers."""
    with served_process(environment, *options, log=log) as (port, _):
        yield port


@contextlib.contextmanager
def served_process(environment: Mapping[str, str], *options: str, log: Path) -> Iterator[tuple[int, int]]:
    """A server with an environment of its own; yields its port and its process when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "tessera", "serve", "--port", str(port), "--drain-s", "0", *options]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            command, env=os.environ | {"OMP_WAIT_POLICY": "passive"} | dict(environment), stdout=out, stderr=out
        ) as process,
    ):
        try:
            give_up = time.monotonic() + _READY_S
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > give_up:
                    raise TesseraError(f"the server did not start; see {log}")
                time.sleep(0.1)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


class Caller:
    """One connection; asks for rankings of random candidates for random users.

    Args:
        items, users: ids to choose from.
    """

    def __init__(self, port: int, bundle: Bundle, *, candidates: int, seed: int = 0) -> None:
        self._port = port
        self._items = bundle.items["item_id"].to_list()
        self._users = bundle.users["user_id"].to_list()
        self._candidates = min(candidates, len(self._items))
        self._rng = np.random.default_rng(seed)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)

    def body(self) -> bytes:
        """Returns a request."""
        chosen = self._rng.choice(len(self._items), self._candidates, replace=False)
        user = self._users[self._rng.integers(len(self._users))]
        return json.dumps({"user": user, "candidates": [self._items[index] for index in chosen], "k": 20}).encode()

    def rank(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and answer; raises what the connection raises, and connects again next time."""
        try:
            self._connection.request("POST", "/v1/rank", body, {"content-type": "application/json"})
            response = self._connection.getresponse()
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def close(self) -> None:
        """Releases the connection."""
        self._connection.close()


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
