"""A store that is dropped, emptied or filled again under running servers and writers: who notices, and what is lost."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from features.errors import StoreError
from models.bundle import record
from models.bundle.bundle import Bundle, write_bundle
from serving.api.app import AppParts, create_app
from serving.ranking.mirror import Mirror
from serving.ranking.rows import MirrorRows, StoreRows
from serving.ranking.service import RankService
from serving.store.admitted import Admitted
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.protocol import OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.store import RedisStore
from serving.store.verify import verify
from serving.traffic.router import Router
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.trainer import Trainer, TrainerOptions
from tessera.stream_service import open_writer
from tests.build import coloured_parts
from tests.servers import RedisCluster, until

STORES = ("memory", "embedded", "redis", "cluster")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("bundle")
    return write_bundle(coloured_parts(directory, events=300), directory / "bundle")


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path, bundle: Bundle) -> Iterator[OnlineStore]:
    with contextlib.ExitStack() as stack:
        found: OnlineStore
        if request.param == "memory":
            found = MemoryStore()
        elif request.param == "embedded":
            found = open_embedded(tmp_path / "store")
        elif request.param == "redis":
            found = RedisStore(request.getfixturevalue("redis_address"))
        else:
            found = RedisStore(stack.enter_context(contextlib.closing(RedisCluster(tmp_path))).address)
        stack.callback(found.close)
        stack.callback(lambda: found.drop(bundle.id))
        yield found


class Place:
    """A trainer, a writer and a server that run, over one log."""

    def __init__(self, directory: Path, bundle: Bundle, store: OnlineStore) -> None:
        self.bundle, self.store, self.topics = bundle, store, Topics()
        self.log = LocalLog(directory / "log.db")
        self.log.create_topics(self.topics.partitions())
        self.snapshots = Snapshots(directory / "snapshots")
        fill_store(store, bundle)
        options = TrainerOptions(batch=1, wait_s=0)
        self.trainer = Trainer(self.log, bundle, topics=self.topics, options=options, snapshots=self.snapshots)
        self.writer = open_writer(bundle, self.log, store, self.topics, snapshots=self.snapshots)
        self.service = RankService(bundle, store)

    def item(self, name: str, **fields: str) -> None:
        value = json.dumps({"item_id": name, "text": "a red thing", "colour": "red"} | fields).encode()
        self.log.append(self.topics.items, [(name.encode(), value if fields != {"gone": ""} else b"")])

    def pump(self) -> None:
        while self.trainer.run_once(wait_s=0.0):
            pass
        while self.writer.run_once():
            pass

    def candidates(self, service: RankService, *names: str) -> set[str]:
        """The items of these that a service holds, without asking the store about those it does not know."""
        numbers, deleted = service._catalogue.item_numbers, service._catalogue.deleted
        return {name for name in names if name in numbers and name not in deleted}

    def is_equal(self) -> None:
        done = verify(self.log, self.bundle, self.store, self.topics)
        assert done.difference == ""

    def close(self) -> None:
        self.trainer.close()
        self.writer.close()
        self.log.close()


@pytest.fixture
def place(tmp_path: Path, bundle: Bundle, store: OnlineStore) -> Iterator[Place]:
    with contextlib.closing(Place(tmp_path, bundle, store)) as made:
        yield made


def test_a_running_server_follows_a_store_that_was_dropped_and_replayed(place: Place) -> None:
    old, new = [f"a{n}" for n in range(6)], [f"b{n}" for n in range(4)]
    for name in old:
        place.item(name)
    place.pump()
    assert place.service.refresh() == 6
    assert place.service.refresh() == 0
    place.trainer.write_snapshot()
    place.store.drop(place.bundle.id)
    with pytest.raises(StoreError, match="is not loaded"):
        place.service.refresh()
    # The writer fills the store by itself, from the snapshot and the log.
    place.pump()
    place.is_equal()
    for name in new:
        place.item(name)
    place.item("a0", gone="")
    place.item("a1", colour="blue")
    place.pump()
    place.service.refresh()
    late = RankService(place.bundle, place.store)
    for service in (place.service, late):
        assert place.candidates(service, *old, *new) == {*old[1:], *new}
    seen = place.service.item("a1")
    assert seen is not None
    assert seen.attributes["colour"] == "blue"
    place.is_equal()


def test_a_store_that_was_emptied_is_filled_before_a_position_is_noted_in_it(place: Place) -> None:
    """A batch without rows could be written into an emptied store, and its position would hide what was lost."""
    place.log.append(place.topics.events, [(None, event(n)) for n in range(8)])
    place.item("a0")
    place.pump()
    trained = place.store.read_table(place.bundle.id)[1]
    assert trained.max() > 0
    place.store.drop(place.bundle.id)
    place.item("a1")
    place.pump()
    seqs = place.store.read_table(place.bundle.id)[1]
    np.testing.assert_array_equal(seqs, trained)
    place.is_equal()


def test_a_store_that_a_server_put_back_is_filled_by_the_writer(place: Place) -> None:
    place.log.append(place.topics.events, [(None, event(n)) for n in range(8)])
    place.pump()
    place.store.drop(place.bundle.id)
    fill_store(place.store, place.bundle)
    place.writer.run_once()
    place.is_equal()


@pytest.mark.parametrize("store", ["cluster"], indirect=True)
@pytest.mark.parametrize("node", range(3))
def test_a_node_of_a_cluster_that_lost_its_data_is_filled_by_the_writer(place: Place, node: int) -> None:
    """One of the three nodes has the bundle's home, and each has rows, records and copies of the position."""
    place.log.append(place.topics.events, [(None, event(n)) for n in range(40)])
    for number in range(20):
        place.item(f"a{number}")
    place.pump()
    place.is_equal()
    place.store._redis.servers.every()[node].flushall()
    place.item("late")
    place.pump()
    place.is_equal()
    place.service.refresh()
    assert place.candidates(place.service, "a0", "a19", "late") == {"a0", "a19", "late"}


@pytest.mark.parametrize("store", ["cluster"], indirect=True)
def test_a_node_of_a_cluster_that_lost_its_last_writes_gets_them_from_the_log(place: Place) -> None:
    """The other nodes have the newest position. The node's own copies say what it has."""
    place.log.append(place.topics.events, [(None, event(n)) for n in range(8)])
    place.pump()
    node = place.store._redis.servers.every()[1]
    state = {key: (node.dump(key), node.pttl(key)) for key in node.scan_iter()}
    place.log.append(place.topics.events, [(None, event(n)) for n in range(8, 40)])
    place.item("late")
    place.pump()
    place.is_equal()
    node.flushall()
    for key, (data, _) in state.items():
        node.restore(key, 0, data)
    # What a start of the node does: the writer follows from the position that the store has.
    place.writer._life = ("before", place.writer._life[1])
    place.pump()
    place.is_equal()


def event(number: int) -> bytes:
    row = {"user_id": f"u{number % 3}", "item_id": f"i{number}", "time": 10_000 + number, "label": 1}
    return json.dumps(row).encode()


def test_an_item_that_cannot_be_read_is_left_out_and_the_others_are_not(bundle: Bundle) -> None:
    store = MemoryStore()
    fill_store(store, bundle)
    made_by = {"encoder": bundle.manifest.encoder or "", "codebook": bundle.manifest.codebook or ""}
    vector = np.ones(4, dtype="<f4").tobytes()
    right = record.encode(record.ItemRecord(vector=vector, codes=[0, 0], features={"colour": "red"}, **made_by))
    wrong = record.encode(record.ItemRecord(vector=vector[:-4], codes=[0, 0], features={"colour": "red"}, **made_by))
    records = {"a": right, "b": wrong, "c": b"no record", "d": right}

    def write(seq: int, **some: bytes) -> None:
        store.write_records(bundle.id, record.ITEM, list(some), [seq] * len(some), list(some.values()))

    running = RankService(bundle, store)
    write(1, **records)
    for service in (running, RankService(bundle, store)):
        service.refresh()
        assert service.unreadable == {"b", "c"}
        assert {"a", "d"} <= set(dict(service.rank("u1", [*records], 9).items))
        assert set(service.rank("u1", [*records], 9).unknown_items) == {"b", "c"}
    write(2, b=right)
    running.refresh()
    assert running.unreadable == {"c"}


def test_a_mirror_that_outlasts_an_emptied_store_says_so(bundle: Bundle) -> None:
    store = MemoryStore()
    fill_store(store, bundle)
    service = RankService(
        bundle, store, MirrorRows(Mirror(store, bundle.id, bundle.schema.aggregates), StoreRows(store, bundle.id))
    )
    parts = AppParts(refresh_s=0.02)
    with TestClient(create_app(Router(service), parts)) as client:
        body = {"user": "u0", "k": 3}
        before = client.post("/v1/rank", json=body).json()
        assert (before["known_user"], before["stale"]) == (True, False)
        assert "store" not in client.get("/readyz").json()
        store.drop(bundle.id)
        until(lambda: parts.refreshing.broken)
        ready = client.get("/readyz")
        assert ready.status_code == 200
        assert "is not loaded in the online store" in ready.json()["store"]
        during = client.post("/v1/rank", json=body).json()
        assert (during["known_user"], during["stale"], during["items"]) == (True, True, before["items"])
        fill_store(store, bundle)
        until(lambda: not client.post("/v1/rank", json=body).json()["stale"])
        assert "store" not in client.get("/readyz").json()


def test_a_bundle_stays_while_a_server_answers_from_it_that_another_lets_go_of(bundle: Bundle) -> None:
    store = MemoryStore()
    fill_store(store, bundle)
    service = RankService(bundle, store)
    store.expire(bundle.id, after_s=0.3)
    service._renew_at = 0.0
    service.refresh()
    time.sleep(0.4)
    service.refresh()
    assert service.rank("u0", None, 3).items


# Values that were admitted.


def test_records_of_admitted_values_are_merged_and_no_value_is_lost(
    bundle: Bundle, store: OnlineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "_ADMITTED_KEYS", 64)
    fill_store(store, bundle)
    keys = np.random.default_rng(0).integers(0, 2**64, 3_000, dtype=np.uint64)
    writers = [Admitted(store, bundle.id) for _ in range(2)]
    for number, part in enumerate(np.array_split(keys, 600)):
        names = [str(number)]
        store.write_records(bundle.id, record.ADMITTED, names, [number], [record.encode_admitted(part)])
        for writer in writers:
            writer.wrote(names)
    held = {name: data for chunk in store.scan_records(bundle.id, record.ADMITTED) for name, data in chunk}
    found = np.concatenate([record.decode_admitted(data) for data in held.values()])
    np.testing.assert_array_equal(np.unique(found), np.sort(keys))
    assert len(held) < 600 / 2
    service = RankService(bundle, store)
    assert service._catalogue.admission.admitted_since(keys).all()


def test_a_filling_of_a_store_is_named_anew_each_time(bundle: Bundle) -> None:
    names: list[bytes | None] = []
    for _ in range(2):
        store = MemoryStore()
        fill_store(store, bundle)
        names += store.read_records(bundle.id, record.LOADED, ["bundle"])
    assert None not in names
    assert len(set(names)) == 2
