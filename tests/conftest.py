"""Fixtures that more than one kind of test needs."""

import os
from collections import defaultdict
from collections.abc import Generator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from starlette.testclient import TestClient

# A server without keys answers to this machine's names alone, and the client's own default is none of them.
TestClient.__init__ = partialmethod(TestClient.__init__, base_url="http://localhost")  # type: ignore[assignment,method-assign]


# An example takes as long as the machine and the other workers let it.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Gives parallel workers whole groups of tests."""
    from tests.scheduling import GroupScheduling

    return GroupScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """Keeps from the next test what a command in this process did to the loggers."""
    from tests.logs import levels_kept

    with levels_kept():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the groups with slow tests first, so that no worker ends long after the others."""
    from tests.scheduling import group_of

    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        groups[group_of(item.nodeid)].append(item)
    fast = {
        group: group != "servers" and all(item.get_closest_marker("slow") is None for item in members)
        for group, members in groups.items()
    }
    items[:] = [item for group in sorted(groups, key=lambda group: fast[group]) for item in groups[group]]


@pytest.fixture(scope="session")
def shared_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory that all parallel workers of this run share; the worker's own when there is one process."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


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
