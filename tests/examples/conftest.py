"""Makes the scripts of `examples/` importable, and shares one bundle among them."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from features.content import kinds as encoders
from models.semantic_id.codebook import kinds as codebooks
from serving.api.app import create_app
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.traffic.router import Router
from tests.integration.world import World, make_world
from tests.servers import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A small synthetic dataset and the bundle of its run."""
    return make_world(tmp_path_factory.mktemp("world"), quantizer="residual-kmeans")


@pytest.fixture(scope="module", autouse=True)
def _examples() -> Iterator[None]:
    """Makes the scripts importable in a module, and then undoes their imports and the kinds that they register."""
    kinds = (encoders.KINDS, codebooks.KINDS)
    before = [dict(registered) for registered in kinds]
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))
    for script in EXAMPLES.glob("*.py"):
        sys.modules.pop(script.stem, None)
    for registered, original in zip(kinds, before, strict=True):
        registered.clear()
        registered.update(original)


@pytest.fixture(scope="session")
def url(world: World) -> Iterator[str]:
    """Address of a server of the bundle, in a thread."""
    store = MemoryStore()
    fill_store(store, world.bundle)
    app = create_app(Router(RankService(world.bundle, store)))
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
