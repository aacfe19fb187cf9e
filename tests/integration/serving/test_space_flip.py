"""A served index changes its space: under a live stream, after a kill, at once, and without an item lost."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from features.content import lsa
from features.content.chain import View
from features.content.kinds import load_encoder
from features.content.space_map import load_map
from features.content.step import Centre, Linear
from features.jobs.shard import read_shards
from models.bundle.bundle import Bundle, load_bundle
from models.bundle.record import ITEM, decode_item
from models.bundle.reembedded import through
from models.ranker.loading import content_vectors
from models.registry.lineage import Lineage
from serving.api.app import AppParts, create_app
from serving.metrics import Metrics
from serving.traffic.follow import RegistryFollower, ServiceOpener
from serving.traffic.router import Router
from streaming.log.topics import Topics
from streaming.trainer import TrainerOptions
from tessera.demo.synthetic import new_item
from tessera.encoders import reembed as reembedding
from tessera.encoders.flip import register_reembedded
from tessera.encoders.reembed import reembed
from tessera.encoders.upgrade import UpgradeOptions, upgrade
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.compare import _as_seen_by
from tessera.settings import Settings
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.killed_reembedding import KILLED
from tests.integration.world import World

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
DIM = 24
OPTIONS = TrainerOptions(batch=16, wait_s=0.02, lateness_s=1e9)


@pytest.fixture(scope="module")
def upgraded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the world's published run with an upgrade to an encoder of fewer dimensions."""
    place = tmp_path_factory.mktemp("flip")
    shutil.copytree(world.directory, place / "run")
    texts = read_shards(place / "run" / "encode" / "texts")["text"].to_list()
    (place / "new").mkdir()
    lsa.fit(texts[: len(texts) * 9 // 10], dim=DIM, seed=3).save(place / "new")
    upgrade(place / "run", place / "new", UpgradeOptions(name="up", least={"first_codes": 0.0}))
    return place / "run"


@pytest.fixture
def run(upgraded: Path, tmp_path: Path) -> Path:
    """A copy of the upgraded run, whose items no test has re-embedded."""
    return shutil.copytree(upgraded, tmp_path / "run")


class Live:
    """A server that follows a registry, and a stream of the served bundle, over one log and one store."""

    def __init__(self, settings: Settings, first: Bundle) -> None:
        self.settings, self.registry = settings, settings.open_registry()
        self.stop, self.threads = threading.Event(), []
        self.log, self.store = settings.open_log(), settings.open_store()
        self.log.create_topics(settings.topics.partitions())
        self.registry.publish(first, params={}, metrics={}, lineage=Lineage(dataset="d"))
        opener = ServiceOpener(self.store)
        service, close = opener(first)
        router = Router(service, close=close)
        registry = settings.open_registry(create=False)
        self.follower = RegistryFollower(
            registry, settings.bundles, router, opener, model=None, grace_s=600, metrics=Metrics()
        )
        self.router = router
        self.client = TestClient(create_app(router, AppParts(reload=self.follower.look)), raise_server_exceptions=False)
        self.failed: list[BaseException] = []
        self.streamed: list[str] = []

    def stream(self, bundle: Bundle) -> None:
        """Trains a bundle in a thread until the end of the test."""
        service = StreamService(bundle, StreamConnections.of(self.settings), OPTIONS)
        self.streamed.append(bundle.id)

        def work() -> None:
            try:
                service.run(self.stop)
            except BaseException as error:
                self.failed.append(error)

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()

    def send(self, *numbers: int) -> None:
        items = [json.dumps(new_item(number)).encode() for number in numbers]
        self.log.append(self.settings.topics.items, [(None, item) for item in items])

    def stored(self, bundle: Bundle, *numbers: int) -> list[bytes | None]:
        return self.store.read_records(bundle.id, ITEM, [f"new-{number:04}" for number in numbers])

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def close(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()
        self.router.close()
        self.store.close()
        self.log.close()


@pytest.fixture(params=["embedded", "servers"])
def live(request: pytest.FixtureRequest, world: World, tmp_path: Path) -> Iterator[Live]:
    """Over the embedded log and store, and then over Kafka and Redis."""
    settings = Settings(home=tmp_path)
    if request.param == "servers":
        kafka, redis = (request.getfixturevalue(f"{name}_address") for name in ("kafka", "redis"))
        settings = replace(settings, kafka=kafka, redis=redis, topics=Topics(f"t{uuid.uuid4().hex[:8]}-"))
    with contextlib.closing(settings.open_store()) as store:
        # The server is shared, so another test may have left the bundle of the world.
        store.drop(world.bundle.id)
        found = Live(settings, world.bundle)
        with contextlib.closing(found), found.client:
            yield found
        for bundle in found.streamed:
            store.drop(bundle)


def wait(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 150
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def kill_a_reembedding(run: Path) -> None:
    """Starts the re-embedding of a run's items in a process that dies on the way."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run), "up"], check=False)
    assert killed.returncode == -signal.SIGKILL


@contextlib.contextmanager
def asking(work: Callable[[], None], *, threads: int) -> Iterator[None]:
    """Calls a function again and again in threads, until the end of the block."""
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            work()

    loads = [threading.Thread(target=load) for _ in range(threads)]
    for thread in loads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in loads:
            thread.join()


def test_the_index_of_a_server_flips_under_a_live_stream_and_no_answer_mixes_two_spaces(
    live: Live, run: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reembedding, "SHARD_ITEMS", 50)
    old, ids = world.bundle, world.bundle.items["item_id"].to_list()
    answers: list[tuple[str, str, dict[str, float]]] = []
    asked = {"item": ids[0], "k": 300, "view": "base"}

    def retrieve() -> None:
        answer = live.ask("/v1/retrieve", **asked)
        scores = {one["item"]: one["score"] for one in answer["items"] if not one["item"].startswith("new")}
        answers.append((answer["bundle"], answer["space"], scores))

    live.stream(old)
    with asking(retrieve, threads=2):
        live.send(1, 2)
        before = live.ask("/v1/rank", user="r00001", candidates=ids[:40], k=40)
        kill_a_reembedding(run)
        live.send(3)
        with monkeypatch.context() as patch:
            patch.setattr("models.bundle.reembedded.write_manifest", lambda directory, manifest: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                reembed(run, "up")
        assert not (run / "maps" / "up" / "bundle").exists()
        live.send(4)
        wait(lambda: all(live.stored(old, 1, 2, 3, 4)))
        assert live.follower.look() == old.id
        state = reembed(run, "up")
        assert state.bundle is not None
        new = load_bundle(state.bundle)
        version = register_reembedded(run, new, live.settings)
        live.stream(new)
        wait(lambda: all(live.stored(new, 1, 2, 3, 4)))
        # The server still answers from the old space, though the store holds both bundles.
        assert live.ask("/v1/retrieve", **asked)["space"] == old.manifest.encoder
        live.registry.promote(version)
        assert live.follower.look() == new.id
        live.send(5)
        wait(lambda: all(live.stored(new, 5)))
        live.router.service.refresh()

    assert {(bundle, space) for bundle, space, _ in answers} == {
        (old.id, old.manifest.encoder),
        (new.id, new.manifest.encoder),
    }
    expected = {}
    for bundle in (old, new):
        vectors = content_vectors(bundle.items)
        expected[bundle.id] = dict(zip(ids, (vectors @ vectors[0]).tolist(), strict=True))
    for bundle_id, _, scores in answers:
        assert len(scores) > 250
        assert max(abs(score - expected[bundle_id][item]) for item, score in scores.items()) < 1e-5
    # The ranker reads what it read before, to the bit, and each item of the stream is in the new space.
    after = live.ask("/v1/rank", user="r00001", candidates=ids[:40], k=40)
    assert [after["bundle"], before["bundle"]] == [new.id, old.id]
    assert after["items"] == before["items"]
    for number, data in enumerate(live.stored(new, 1, 2, 3, 4, 5), 1):
        assert data is not None
        record = decode_item(data)
        assert (record.encoder, len(record.content()), record.codebook) == (new.manifest.encoder, DIM, new.codebook.id)
        found = live.ask("/v1/retrieve", item=f"new-{number:04}", k=3)
        assert found["space"] == new.manifest.encoder
        nearest = live.ask("/v1/retrieve", item=found["items"][0]["item"], k=300)["items"]
        assert f"new-{number:04}" in {one["item"] for one in nearest}
    assert not live.failed


def test_a_bundle_of_a_killed_reembedding_is_that_of_a_whole_one(
    run: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reembedding, "SHARD_ITEMS", 50)
    kill_a_reembedding(run)
    resumed = reembed(run, "up").bundle
    assert resumed is not None
    shutil.copytree(run / "maps" / "up", run / "maps" / "whole", ignore=shutil.ignore_patterns("reembed*", "bundle"))
    whole = reembed(run, "whole").bundle
    assert whole is not None
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    new = load_bundle(whole)
    assert (new.id, new.manifest.parent) == (load_bundle(resumed).id, world.bundle.id)
    assert reembed(run, "whole").bundle == whole


def test_codes_and_scores_of_new_texts_come_through_the_map(run: Path, world: World) -> None:
    place = reembed(run, "up").bundle
    assert place is not None
    new, old = load_bundle(place), world.bundle
    found = load_map(run / "maps" / "up")
    assert new.map is not None
    assert (new.map.id, new.manifest.encoder) == (found.id, found.source)
    texts = ["a red bicycle with a bell", "tomato soup with rice", ""]
    encoded = new.encode_items(texts)
    mapped = load_encoder(run / "maps" / "up" / "encoder").encode(texts)
    assert np.array_equal(found.of(encoded.vectors, space=found.source), mapped)
    assert np.array_equal(encoded.codes, old.codebook.encode(mapped))
    users, items = old.users["user_id"].to_list()[:3], old.items["item_id"].to_list()[:50]
    for user in users:
        assert np.array_equal(new.rank(user, items), old.rank(user, items))
    # The gates compare both on the vectors that their rankers read.
    frame = read_frame(run / "frame")
    one, other = (_as_seen_by(bundle, frame, old.manifest.encoder).items["content_vector"] for bundle in (old, new))
    assert one.equals(other)


def test_a_view_reads_the_old_space_through_the_map(run: Path) -> None:
    found, rng = load_map(run / "maps" / "up"), np.random.default_rng(0)
    new = load_encoder(run / "maps" / "up" / "encoder" / "base-0")
    vectors = new.encode([*read_shards(run / "encode" / "texts")["text"].to_list()[:50], ""])
    width = found.legs[-1].dim
    view = View(
        "similar", found.target, (Centre(mean=rng.normal(size=width)), Linear(matrix=rng.normal(size=(width, 8))))
    )
    composed = through(found, view)
    assert composed.source == found.source
    assert np.array_equal(composed.of(vectors), view.of(found.of(vectors, space=found.source)))
