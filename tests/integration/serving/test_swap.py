"""Bundles that take over: no request fails or mixes two, and what cannot be served is left alone."""

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from features.errors import BundleError, StoreError
from models.bundle.bundle import Bundle
from models.bundle.record import ITEM, ItemRecord, encode
from models.registry.lineage import Lineage
from models.registry.registry import Registry
from models.registry.release import PREVIOUS
from serving.api.app import AppParts, create_app
from serving.metrics import Metrics
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.protocol import OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.store import RedisStore
from serving.traffic.follow import RegistryFollower, ServiceOpener
from serving.traffic.router import Router
from tessera.settings import Settings
from tests.integration.served import Served
from tests.integration.world import World, make_world
from tests.servers import RedisCluster

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")

# Swaps of a server with two workers; 100 by hand.
SWAPS = int(os.environ.get("WORKER_SWAPS", "3"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The same data, trained from another seed."""
    return make_world(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def published(world: World, other: World, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A registry with both, the first of which is the champion."""
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    registry = settings.open_registry()
    for one in (world, other):
        registry.publish(one.bundle, params={}, metrics={}, lineage=Lineage(dataset="d"))
    return settings


class Server:
    """A follower and what it swaps, over one store."""

    def __init__(self, settings: Settings, store: Any, first: Bundle) -> None:
        self.settings, self.store, self.registry = settings, store, settings.open_registry()
        opener = ServiceOpener(store)
        service, close = opener(first)
        self.current, self.metrics = Router(service, close=close), Metrics()
        self.follower = RegistryFollower(
            settings.open_registry(create=False),
            settings.bundles,
            self.current,
            opener,
            model=None,
            grace_s=600,
            metrics=self.metrics,
        )
        app = create_app(self.current, AppParts(metrics=self.metrics, reload=self.follower.look))
        self.client = TestClient(app, raise_server_exceptions=False)

    def promote(self, bundle: Bundle) -> str:
        self.registry.promote(self.registry.release(None, bundle.id))
        return self.follower.look()


@pytest.fixture
def server(published: Settings, world: World, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    registry = published.open_registry()
    registry.promote(registry.release(None, world.bundle.id))
    with contextlib.ExitStack() as stack:
        store: OnlineStore = MemoryStore()
        if getattr(request, "param", "memory") == "cluster":
            store = RedisStore(stack.enter_context(contextlib.closing(RedisCluster(tmp_path))).address)
            stack.callback(store.close)
        found = Server(published, store, world.bundle)
        with contextlib.closing(found.current), found.client:
            yield found


def offline(bundle: Bundle, users: list[str], items: list[str]) -> dict[str, dict[str, float]]:
    """Returns the scores of a bundle alone."""
    store = MemoryStore()
    fill_store(store, bundle)
    service = RankService(bundle, store)
    return {user: dict(service.rank(user, items, len(items)).items) for user in users}


@pytest.mark.parametrize("server", ["memory", "cluster"], indirect=True)
def test_a_hundred_swaps_under_load_fail_and_mix_nothing(server: Server, world: World, other: World) -> None:
    users, items = world.bundle.users["user_id"].to_list()[:20], world.bundle.items["item_id"].to_list()[:50]
    expected = {one.bundle.id: offline(one.bundle, users, items) for one in (world, other)}
    stop = threading.Event()
    seen: dict[str, int] = {}
    wrong: list[Any] = []

    def load(number: int) -> None:
        rng = np.random.default_rng(number)
        while not stop.is_set():
            user = users[rng.integers(len(users))]
            answer = server.client.post("/v1/rank", json={"user": user, "candidates": items, "k": len(items)})
            body = answer.json()
            if answer.status_code != 200 or body["bundle"] not in expected:
                wrong.append((answer.status_code, body))
                continue
            right = expected[body["bundle"]][user]
            scores = {one["item"]: one["score"] for one in body["items"]}
            if scores.keys() != right.keys() or max(abs(scores[name] - right[name]) for name in right) > 1e-5:
                wrong.append((body["bundle"], user))
            seen[body["bundle"]] = seen.get(body["bundle"], 0) + 1

    threads = [threading.Thread(target=load, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    opener = ServiceOpener(server.store)
    made = {one.bundle.id: opener(one.bundle) for one in (world, other)}
    for number in range(100):
        taking, leaving = (world.bundle, other.bundle) if number % 2 else (other.bundle, world.bundle)
        assert not fill_store(server.store, taking)  # cancels its expiry
        server.current.swap(made[taking.id][0])
        server.store.expire(leaving.id, after_s=600)
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    for _, close in made.values():
        close()
    assert not wrong, wrong[:3]
    assert seen.keys() == expected.keys()
    assert min(seen.values()) > 20


def test_the_server_follows_the_champion_and_the_one_before_lies_beside_it_until_it_expires(
    server: Server, world: World, other: World
) -> None:
    assert server.follower.look() == world.bundle.id
    assert server.promote(other.bundle) == other.bundle.id
    assert server.client.get("/v1/version").json()["bundle"] == other.bundle.id
    assert server.registry.resolve(None, PREVIOUS).bundle == world.bundle.id
    for bundle in (world.bundle, other.bundle):
        assert server.store.table(bundle.id).rows == bundle.schema.rows
    assert server.store._until.keys() == {world.bundle.id}
    # Back: what was to expire stays, and the other goes.
    assert server.promote(world.bundle) == world.bundle.id
    assert server.store._until.keys() == {other.bundle.id}
    text = server.client.get("/metrics").text
    assert "tessera_swaps_total 2.0" in text
    assert f'tessera_bundle_info{{bundle="{world.bundle.id}"}} 1.0' in text
    assert other.bundle.id not in text
    assert server.client.post("/v1/admin/reload").json()["bundle"] == world.bundle.id


def test_two_bundles_lie_side_by_side_in_redis_and_the_old_one_has_a_time(
    published: Settings, world: World, other: World, tmp_path: Path
) -> None:
    registry = published.open_registry()
    registry.promote(registry.release(None, world.bundle.id))
    with contextlib.closing(open_embedded(tmp_path)) as store:
        server = Server(published, store, world.bundle)
        server.promote(other.bundle)
        redis = store._redis.servers.every()[0]
        kept = [redis.ttl(key) for key in redis.scan_iter(f"tessera:{{{other.bundle.id}}}:*")]
        going = [redis.ttl(key) for key in redis.scan_iter(f"tessera:{{{world.bundle.id}}}:*")]
        assert set(kept) == {-1}
        assert len(going) > world.bundle.schema.rows // 64
        assert all(500 < left <= 600 for left in going)
        before = offline(world.bundle, ["nobody"], world.bundle.items["item_id"].to_list()[:5])
        assert server.promote(world.bundle) == world.bundle.id
        found = server.current.service.rank("nobody", list(before["nobody"]), 5).items
        assert dict(found) == pytest.approx(before["nobody"], abs=1e-5)
        server.current.close()


def _damage_table(directory: Path) -> None:
    data = bytearray((directory / "table.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "table.safetensors").write_bytes(data)


def _another_contract(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["hash"]["rows"] += 1
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _another_schema(directory: Path) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["schema"]["features"] = "none"
    (directory / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [_damage_table, _another_contract, _another_schema])
def test_a_bundle_that_was_altered_is_not_loaded_and_the_server_keeps_its_own(
    world: World, other: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    settings = Settings(home=tmp_path)
    registry: Registry = settings.open_registry()
    for one in (world, other):
        registry.publish(one.bundle, params={}, metrics={})
    server = Server(settings, MemoryStore(), world.bundle)
    for path in (tmp_path / "mlflow").rglob("manifest.json"):
        if json.loads(path.read_text())["id"] == other.bundle.id:
            damage(path.parent)
    with pytest.raises(BundleError):
        server.promote(other.bundle)
    with contextlib.closing(server.current), server.client:
        assert server.client.get("/v1/version").json()["bundle"] == world.bundle.id
        assert server.client.post("/v1/rank", json={"user": "1"}).status_code == 200
        assert server.client.post("/v1/admin/reload").status_code == 503
    assert server.metrics.swap_failures._value.get() == 2
    assert not (settings.home / "bundles" / other.bundle.id).exists()


def test_a_damaged_copy_is_fetched_again(world: World, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    registry = settings.open_registry()
    release = registry.publish(world.bundle, params={}, metrics={})
    copy = registry.open(release, tmp_path / "bundles").directory
    _damage_table(copy)
    assert registry.open(release, tmp_path / "bundles").id == world.bundle.id
    shutil.rmtree(copy)


def test_a_store_that_is_away_while_a_bundle_takes_over_leaves_the_old_one_serving(
    server: Server, other: World, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the store does not answer")

    with monkeypatch.context() as away:
        away.setattr(server.store, "create_table", refuse)
        with pytest.raises(StoreError):
            server.promote(other.bundle)
        assert server.client.get("/v1/version").json()["bundle"] == world.bundle.id
    assert server.follower.look() == other.bundle.id


def test_a_vector_of_another_encoder_is_refused_however_wide_it_is(server: Server, world: World) -> None:
    bundle, ids = world.bundle, world.bundle.items["item_id"].to_list()
    vector = np.ones(bundle.encoder.dim, dtype="<f4")
    foreign = ItemRecord("lsa-another", vector.tobytes(), [], {}, "")
    server.store.write_records(bundle.id, ITEM, ["strange"], [10**6], [encode(foreign)])
    answer = server.client.post("/v1/rank", json={"user": "1", "candidates": [ids[0], "strange"]})
    assert answer.status_code == 503
    assert "the two must not be mixed" in answer.json()["detail"]
    assert server.client.post("/v1/rank", json={"user": "1", "candidates": ids[:2]}).status_code == 200
    near = server.client.post("/v1/retrieve", json={"item": ids[0], "k": 50}).json()
    assert "strange" not in {one["item"] for one in near["items"]}


def test_what_a_service_holds_is_let_go_of_when_its_last_request_has_ended(world: World) -> None:
    store = MemoryStore()
    fill_store(store, world.bundle)
    closed: list[str] = []
    current = Router(RankService(world.bundle, store), close=lambda: closed.append("first"))
    with current.pinned() as pinned:
        current.swap(RankService(world.bundle, store), close=lambda: closed.append("second"))
        assert pinned is not current.service
        assert closed == []
    assert closed == ["first"]
    current.close()
    assert closed == ["first", "second"]


def test_the_registry_keeps_where_a_bundle_came_from(published: Settings, world: World) -> None:
    client = published.open_registry()._tracking
    version = client.version(world.dataset.name, "1")
    assert version.tags["tessera.dataset"] == "d"
    assert client.run(version.run_id).data.tags["tessera.bundle"] == world.bundle.id


def test_every_worker_swaps_and_no_answer_mixes(world: World, other: World, tmp_path: Path) -> None:
    registry = Settings(home=tmp_path).open_registry()
    bundles = [one.bundle.id for one in (world, other)]
    releases = [registry.publish(one.bundle, params={}, metrics={}) for one in (world, other)]
    registry.promote(releases[0])
    options = ("--workers", "2", "--mirror", "--follow-s", "0.2", "--drain-s", "0")
    served = Served(world, tmp_path, *options, bundle=False)
    found: dict[str, set[str]] = {}
    try:
        with ThreadPoolExecutor(4) as pool:
            for swap in range(SWAPS + 1):
                registry.promote(releases[swap % 2])
                give_up, settled = time.monotonic() + 60, 0
                while settled < 30:
                    assert time.monotonic() < give_up, served.log.read_text()
                    answers = list(pool.map(lambda _: served.ask(world), range(10)))
                    assert {answer.status_code for answer in answers} == {200}
                    for answer in answers:
                        found.setdefault(answer.json()["bundle"], set()).add(str(answer.json()["items"]))
                    swapped = {answer.json()["bundle"] for answer in answers} == {bundles[swap % 2]}
                    settled = settled + 10 if swapped else 0
        assert set(found) == set(bundles)
        assert {len(answers) for answers in found.values()} == {1}
    finally:
        served.stop()
