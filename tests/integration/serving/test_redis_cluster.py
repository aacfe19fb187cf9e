"""A bundle on a Redis Cluster of three nodes: all nodes have a share, and what a node loses or moves is noticed.

`tests/contract/test_online_store.py` holds the store's contract on a cluster.
"""

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.crc import key_slot

from features.errors import StoreError
from models.bundle import record
from serving.store.protocol import POSITION
from serving.store.redis.store import RedisStore
from tests.servers import SLOTS, RedisCluster, until

ROWS, DIM = 64 * 640, 32  # ten pages a share


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with contextlib.closing(RedisCluster(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.fixture
def store(cluster: RedisCluster) -> Iterator[RedisStore]:
    with contextlib.closing(RedisStore(cluster.address)) as store:
        yield store


@pytest.fixture
def bundle(store: RedisStore) -> Iterator[str]:
    name = f"test-{uuid.uuid4()}"
    yield name
    store.drop(name)


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def load(store: RedisStore, bundle: str) -> np.ndarray:
    loaded = vectors()
    store.create_table(bundle, rows=ROWS, dim=DIM)
    store.load_rows(bundle, loaded, seq=0)
    return loaded


def keys_of(node: redis.Redis, bundle: str, part: str = "") -> list[bytes]:
    """Keys of a bundle on a node, at home and in shares."""
    return [key for key in node.scan_iter(count=10_000) if bundle.encode() in key and part.encode() in key]


def test_each_node_has_its_share_of_pages_and_of_records(cluster: RedisCluster, store: RedisStore, bundle: str) -> None:
    load(store, bundle)
    users = [f"u{n}" for n in range(3_000)]
    store.write_records(bundle, "history", users, [1] * len(users), [b"x"] * len(users))
    for node in cluster.clients:
        pages = keys_of(node, bundle, ":page:")
        records = sum(node.hlen(key) for key in keys_of(node, bundle, "record:history"))
        assert abs(len(pages) / (ROWS // 64 / 3) - 1) < 0.2
        assert abs(records / (len(users) / 3) - 1) < 0.2


def test_a_table_of_few_pages_lies_on_all_nodes(cluster: RedisCluster, store: RedisStore, bundle: str) -> None:
    store.create_table(bundle, rows=64 * 6, dim=DIM)
    store.load_rows(bundle, np.ones((64 * 6, DIM), dtype=np.float32), seq=0)
    assert sorted(len(keys_of(node, bundle, ":page:")) for node in cluster.clients) == [1, 2, 3]


def test_a_read_asks_each_node_once(store: RedisStore, bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(store, bundle)
    rows = np.random.default_rng(1).integers(0, ROWS, 500)
    store.read_rows(bundle, rows)
    sent: list[int] = []
    for node in store._redis.servers.every():
        pool = node.connection_pool
        take = pool.get_connection
        monkeypatch.setattr(pool, "get_connection", lambda *a, take=take, **k: (sent.append(1), take(*a, **k))[1])
    np.testing.assert_array_equal(store.read_rows(bundle, rows), loaded[rows])
    assert len(sent) == 3


def test_a_node_that_stops_is_named_and_comes_back_equal(cluster: RedisCluster, store: RedisStore, bundle: str) -> None:
    loaded, rows = load(store, bundle), np.arange(0, ROWS, 61)
    store.write_rows(bundle, rows, np.full(len(rows), 5), -loaded[rows])
    loaded[rows] *= -1
    cluster.stop_node(0)  # the node of the address: the others are known by now
    began = time.monotonic()
    try:
        for call in (lambda: store.read_rows(bundle, rows), lambda: store.read_table(bundle), store.ping):
            with pytest.raises(StoreError, match=f"127.0.0.1:{cluster.ports[0]}"):
                call()
        with pytest.raises(StoreError, match=f"127.0.0.1:{cluster.ports[0]}"):
            store.write_rows(bundle, rows, np.full(len(rows), 9), loaded[rows])
        assert time.monotonic() - began < 60
    finally:
        cluster.start_node(0)
    # A part of the failed write is there; the same call again completes it.
    store.write_rows(bundle, rows, np.full(len(rows), 9), loaded[rows])
    found, seqs = store.read_table(bundle)
    np.testing.assert_array_equal(found, loaded)
    np.testing.assert_array_equal(seqs, np.where(np.isin(np.arange(ROWS), rows), 9, 0))


def test_a_replica_that_takes_over_is_followed(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(contextlib.closing(RedisCluster(tmp_path, replica=True)))
        store = stack.enter_context(contextlib.closing(RedisStore(cluster.address)))
        bundle, rows = "taken-over", np.arange(0, ROWS, 61)
        loaded = load(store, bundle)
        store.write_rows(bundle, rows, np.full(len(rows), 5), -loaded[rows])
        loaded[rows] *= -1
        assert cluster.clients[0].wait(1, 5_000) == 1
        cluster.stop_node(0)
        until(lambda: cluster.clients[3].info("replication")["role"] == "master", seconds=60)
        np.testing.assert_array_equal(store.read_rows(bundle, rows), loaded[rows])
        assert len(keys_of(cluster.clients[3], bundle)) > 1
        store.write_rows(bundle, rows, np.full(len(rows), 9), loaded[rows])
        found, seqs = store.read_table(bundle)
        np.testing.assert_array_equal(found, loaded)
        assert set(seqs[rows].tolist()) == {9}


def test_a_node_that_comes_back_empty_is_named_and_the_bundle_is_loaded_again(
    cluster: RedisCluster, store: RedisStore, bundle: str
) -> None:
    load(store, bundle)
    store.write_records(bundle, record.LOADED, ["bundle"], [0], [b"first"])
    store.write_records(bundle, POSITION, ["topic"], [7], [b"7"])
    lost = (key_slot(f"{{{bundle}}}".encode()) * 3 // SLOTS + 1) % 3  # not the node of the home
    cluster.clients[lost].flushall()
    assert store.read_records(bundle, record.LOADED, ["bundle"]) == [None]
    assert store.read_records(bundle, POSITION, ["topic"]) == [None]
    for call in (lambda: store.read_rows(bundle, np.arange(ROWS)[::80]), lambda: store.read_table(bundle)):
        with pytest.raises(StoreError, match=rf"not loaded .* on 127.0.0.1:{cluster.ports[lost]}: .*tessera replay"):
            call()
    assert not store.keep(bundle)
    assert sum(len(keys_of(node, bundle)) for node in cluster.clients) == 0
    loaded = load(store, bundle)
    np.testing.assert_array_equal(store.read_table(bundle)[0], loaded)
    assert store.keep(bundle)


def test_shares_without_a_home_are_removed_before_a_bundle_is_loaded_again(
    cluster: RedisCluster, store: RedisStore, bundle: str
) -> None:
    load(store, bundle)
    store.write_records(bundle, "item", ["a"], [9], [b"old"])
    for node in cluster.clients:
        for key in keys_of(node, bundle):
            if key.startswith(f"tessera:{{{bundle}}}".encode()):
                node.delete(key)
    with contextlib.closing(RedisStore(store._redis.address)) as other:
        assert other.read_records(bundle, "item", ["a"]) == [None]
        other.create_table(bundle, rows=64, dim=DIM)
        assert other.read_records(bundle, "item", ["a"]) == [None]
        assert sum(len(keys_of(node, bundle, ":page:")) for node in cluster.clients) == 0


def test_the_oldest_copy_of_a_position_counts(store: RedisStore, bundle: str) -> None:
    """A node that has lost its last second has an older copy. The rows that it lost are after that position."""
    load(store, bundle)
    store.write_records(bundle, POSITION, ["topic"], [7], [b"7"])
    key = store._layouts.state(bundle).key(17, f"record:{POSITION}")
    store._redis.all([(key, ("HSET", key, "topic", (4).to_bytes(6, "big") + b"3"))])
    assert store.read_records(bundle, POSITION, ["topic"]) == [b"3"]
    assert store.write_records(bundle, POSITION, ["topic"], [6], [b"6"]) == 1
    assert store.read_records(bundle, POSITION, ["topic"]) == [b"6"]


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[RedisCluster]:
    """A cluster whose slots a test may move."""
    with contextlib.closing(RedisCluster(tmp_path)) as cluster:
        yield cluster


def test_a_slot_that_moves_is_followed_and_nothing_is_lost(moving: RedisCluster) -> None:
    bundle = "b"
    with contextlib.closing(RedisStore(moving.address)) as store:
        loaded = load(store, bundle)
        spread = store._layouts.state(bundle)
        name = next(f"u{n}" for n in range(1_000) if spread.shares_of("history", [b"u%d" % n]) == [5])
        store.write_records(bundle, "history", [name], [1], [b"x"])
        slot = spread.slot(5)
        source, target = moving.clients[slot * 3 // SLOTS], moving.clients[(slot * 3 // SLOTS + 1) % 3]
        names = [node.execute_command("CLUSTER MYID").decode() for node in (source, target)]
        target.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[0])
        source.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[1])
        pages = sorted(keys_of(source, bundle, "{" + spread.key(5, "").decode().split("{")[1].split("}")[0] + "}"))
        moved = [key for key in pages if key.endswith(b"record:history")] + [key for key in pages if b":page:" in key][
            :4
        ]
        rest = [key for key in pages if key not in moved]
        port = target.connection_pool.connection_kwargs["port"]

        def move(keys: list[bytes]) -> None:
            source.execute_command("MIGRATE", "127.0.0.1", port, "", 0, 5_000, "KEYS", *keys)

        def finish() -> None:
            time.sleep(1.0)
            move(rest)
            for node in (target, source):
                node.execute_command("CLUSTER SETSLOT", slot, "NODE", names[1])

        rows = np.arange(ROWS)[::61]
        move(moved)
        assert store.read_records(bundle, "history", [name]) == [b"x"]  # redirected to the node that imports the slot
        mover = threading.Thread(target=finish)
        mover.start()
        # A script whose keys are on two nodes waits until they are on one.
        np.testing.assert_array_equal(store.read_rows(bundle, rows), loaded[rows])
        assert store.write_rows(bundle, rows, np.full(len(rows), 3), -loaded[rows]) == len(rows)
        mover.join()
        loaded[rows] *= -1
        np.testing.assert_array_equal(store.read_table(bundle)[0], loaded)
        with contextlib.closing(RedisStore(moving.address)) as other:
            np.testing.assert_array_equal(other.read_rows(bundle, rows), loaded[rows])


def test_a_slot_without_a_node_is_an_error_that_names_it(tmp_path: Path) -> None:
    with (
        contextlib.closing(RedisCluster(tmp_path)) as cluster,
        contextlib.closing(RedisStore(cluster.address)) as store,
    ):
        load(store, "b")
        began = time.monotonic()
        gone = range(SLOTS - 300, SLOTS)
        for node in cluster.clients:
            node.execute_command("CLUSTER DELSLOTS", *gone)
        for call in (store.ping, lambda: store.read_table("b"), lambda: load(store, "c")):
            with pytest.raises(StoreError, match=f"no node owns the hash slots {gone[0]}-{gone[-1]}.*--cluster check"):
                call()
        with contextlib.closing(RedisStore(cluster.address)) as other, pytest.raises(StoreError, match="hash slots"):
            other.ping()
        assert time.monotonic() - began < 60
        cluster.clients[2].execute_command("CLUSTER ADDSLOTS", *gone)
        time.sleep(1.5)
        np.testing.assert_array_equal(store.read_table("b")[0], vectors())
        store.ping()


def test_a_bundle_of_one_share_goes_on_and_the_next_is_spread(
    cluster: RedisCluster, store: RedisStore, bundle: str
) -> None:
    """A release before shares has loaded the bundle: all keys are in the slot of its home."""
    with contextlib.closing(RedisStore(cluster.address)) as older:
        older._redis.servers.shares = 1
        loaded = load(older, bundle)
        older.write_records(bundle, "item", ["a"], [1], [b"x"])
    assert sorted(len(keys_of(node, bundle, ":page:")) for node in cluster.clients) == [0, 0, ROWS // 64]
    assert store.in_one_slot(bundle)
    cursor = store.changes(bundle, "item", "").cursor
    np.testing.assert_array_equal(store.read_table(bundle)[0], loaded)
    rows = np.arange(ROWS)[::61]
    np.testing.assert_array_equal(store.read_rows(bundle, rows), loaded[rows])
    assert store.write_rows(bundle, rows, np.full(len(rows), 3), -loaded[rows]) == len(rows)
    assert store.write_records(bundle, "item", ["a"], [2], [b"y"]) == 1
    assert store.read_records(bundle, "item", ["a"]) == [b"y"]
    assert store.changes(bundle, "item", cursor).ids == ["a"]
    store.create_table(bundle, rows=ROWS, dim=DIM)
    assert store.keep(bundle)
    store.drop(bundle)
    assert sum(len(keys_of(node, bundle)) for node in cluster.clients) == 0
    load(store, bundle)
    assert all(keys_of(node, bundle, ":page:") for node in cluster.clients)
    assert not store.in_one_slot(bundle)


def test_a_drop_leaves_no_key_and_an_expiry_reaches_every_key(
    cluster: RedisCluster, store: RedisStore, bundle: str
) -> None:
    load(store, bundle)
    for kind in ("item", "history", record.ADMITTED, record.LOADED, POSITION):
        store.write_records(bundle, kind, [f"i{n}" for n in range(200)], [1] * 200, [b"x"] * 200)
    store.forget_records(bundle, "history", ["i1", "i2"], [5, 5])
    store.changes(bundle, "item", "")
    store.expire(bundle, after_s=300)
    store.write_records(bundle, "late", ["a"], [1], [b"x"])
    for node in cluster.clients:
        assert all(200_000 < node.pttl(key) <= 300_000 for key in keys_of(node, bundle))
    assert store.keep(bundle)
    assert all(node.pttl(key) == -1 for node in cluster.clients for key in keys_of(node, bundle))
    store.drop(bundle)
    assert sum(len(keys_of(node, bundle)) for node in cluster.clients) == 0


def test_a_drop_that_was_cut_off_is_finished_before_the_table_is_created_again(
    cluster: RedisCluster, store: RedisStore, bundle: str
) -> None:
    load(store, bundle)
    (home,) = [node for node in cluster.clients if node_has(node, f"tessera:{{{bundle}}}:table")]
    home.rename(f"tessera:{{{bundle}}}:table", f"tessera:{{{bundle}}}:dropping")
    store.create_table(bundle, rows=64, dim=2)
    assert sum(len(keys_of(node, bundle, ":page:")) for node in cluster.clients) == 0
    assert store.read_table(bundle)[0].shape == (64, 2)


def node_has(node: redis.Redis, key: str) -> bool:
    try:
        return bool(node.exists(key))
    except redis.ResponseError:
        return False


def test_the_shares_of_another_shape_are_refused_and_of_the_first_shape_kept(store: RedisStore, bundle: str) -> None:
    loaded = load(store, bundle)
    with pytest.raises(StoreError, match="drop it, or name another bundle"):
        store.create_table(bundle, rows=ROWS, dim=DIM + 1)
    np.testing.assert_array_equal(store.read_table(bundle)[0], loaded)


def test_another_client_meets_a_table_that_was_created_again(store: RedisStore, bundle: str) -> None:
    with contextlib.closing(RedisStore(store._redis.address)) as other:
        load(store, bundle)
        rows = np.arange(ROWS)[::61]
        other.read_rows(bundle, rows)
        store.drop(bundle)
        with pytest.raises(StoreError, match="is not loaded"):
            other.read_rows(bundle, rows)
        load(store, bundle)
        other.read_rows(bundle, rows)
        store.drop(bundle)
        store.create_table(bundle, rows=ROWS, dim=2)
        assert other.read_rows(bundle, rows).shape == (len(rows), 2)
        assert other.read_seqs(bundle, rows).max() == -1


def test_keys_of_a_share_are_in_one_slot() -> None:
    from serving.store.redis.spread import Spread

    spread = Spread("b", 64)
    for share in range(64):
        keys = [spread.key(share, name) for name in ("table", "kinds", "record:item")]
        assert {key_slot(key) for key in keys} == {spread.slot(share)}
    pages = np.arange(200)
    assert [key_slot(key) for key in spread.page_keys(pages)] == [spread.slot(page % 64) for page in pages.tolist()]
