"""What the integration tests share."""

import pytest

from tests.integration.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small synthetic dataset and the bundle of its run."""
    return make_world(tmp_path_factory.mktemp("world"))
