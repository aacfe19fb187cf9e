"""Fixtures of the integration tests."""

from pathlib import Path

import pytest

from features.lock import locked
from models.towers.config import TowerConfig
from tests.integration.world import World, make_world, open_world


@pytest.fixture(scope="session")
def world(shared_directory: Path) -> World:
    """A small synthetic dataset and the bundle of its run; the first of the parallel workers makes it."""
    directory = shared_directory / "world"
    with locked(shared_directory / "world.lock", wait_s=300):
        return open_world(directory) if (directory / "made").exists() else make_world(directory)


@pytest.fixture(scope="session")
def towered_world(shared_directory: Path) -> World:
    """The same dataset and the bundle of a run with towers."""
    directory = shared_directory / "towered"
    with locked(shared_directory / "towered.lock", wait_s=300):
        if (directory / "made").exists():
            return open_world(directory)
        return make_world(directory, retrieval="towers", towers=TowerConfig(max_epochs=3, content_weight=1.0))
