"""Fixtures of the tests of serving: the service of the small bundle, and an HTTP client of its application."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from serving.api.app import create_app
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from tests.integration.world import World


@pytest.fixture(scope="module")
def service(world: World) -> RankService:
    """Service of the bundle, on a store that the module does not share."""
    store = MemoryStore()
    fill_store(store, world.bundle)
    return RankService(world.bundle, store)


@pytest.fixture(scope="module")
def client(service: RankService) -> Iterator[TestClient]:
    """Client of an application without keys and without a log."""
    with TestClient(create_app(Router(service)), raise_server_exceptions=False) as opened:
        yield opened
