"""One stage for all rehearsals: its parts take long to start and little to ask."""

import contextlib
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.warm import warm_tessera
from tests.rehearsal.process import MlflowServer
from tests.rehearsal.stage import Stage
from tests.rehearsal.truth import train

_HELD = pytest.StashKey[contextlib.ExitStack]()


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest, kafka_address: str, redis_address: str) -> Iterator[Stage]:
    """Trained bundles in a registry, and two servers that answer by the first of them."""
    with contextlib.ExitStack() as held:
        request.config.stash[_HELD] = held
        # A socket's path must be short.
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (directory / "tools").mkdir()
        # Both load while the bundles are trained.
        mlflow = held.enter_context(contextlib.closing(MlflowServer(directory / "mlflow")))
        tools = held.enter_context(warm_tessera(directory / "tools"))
        # The servers are everybody's: bundles get ids that nobody else has.
        bundles = train(directory / "data", f"rehearsal-{uuid.uuid4().hex[:8]}")
        mlflow.wait()
        made = Stage(directory, tools / "tessera", mlflow, kafka_address, redis_address)
        held.enter_context(contextlib.closing(made))
        made.open(bundles)
        yield made


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Behind the last rehearsal all of it ends: nothing takes time from the tests that come after."""
    if nextitem is None or nextitem.path.parent != item.path.parent:
        item.config.stash.get(_HELD, contextlib.ExitStack()).close()
