"""Fixtures that more than one kind of test needs."""

import os
from functools import partialmethod

import pytest
from starlette.testclient import TestClient

# A server without keys answers to this machine's names alone, and the client's own default is none of them.
TestClient.__init__ = partialmethod(TestClient.__init__, base_url="http://localhost")  # type: ignore[assignment,method-assign]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """On a busy machine two threads wait for each other at every tiny product: a hundred times slower than one."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def kafka_address() -> str:
    """Address of a real broker; without one the test is skipped, or fails where services are required."""
    return _address(
        "TESSERA_TEST_KAFKA", "no Kafka broker: `make up` starts one (needs Java 17 and Maven)", "host:port"
    )


@pytest.fixture(scope="session")
def redis_address() -> str:
    """Address of a real Redis server; skipped or failed without one, like `kafka_address`."""
    return _address("TESSERA_TEST_REDIS", "no Redis server: `make up` starts one", "redis://host:port/0")


def _address(variable: str, missing: str, form: str) -> str:
    if address := os.environ.get(variable):
        return address
    message = f"{missing}; then set {variable}={form}"
    if os.environ.get("REQUIRE_SERVICES") == "1":
        pytest.fail(message)
    pytest.skip(message)
