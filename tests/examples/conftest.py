"""Makes the scripts of `examples/` importable, and shares one bundle among them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.world import World, make_world

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small synthetic dataset and the bundle of its run."""
    return make_world(tmp_path_factory.mktemp("world"), quantizer="residual-kmeans")


@pytest.fixture(scope="session", autouse=True)
def _examples() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
