"""The contract of `OnlineStore`, held against every implementation; one constructor each joins the suite.

The real server is `TESSERA_TEST_REDIS=redis://host:port/n`. It may be in use: every test works in bundles of its own
and drops them.
"""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import StoreError
from serving.store.memory import MemoryStore
from serving.store.protocol import MAX_SEQ, NEVER, OnlineStore
from serving.store.redis.embedded import open_embedded
from serving.store.redis.scripts import Script
from serving.store.redis.store import RedisStore
from tests.servers import RedisCluster, TlsRedis

ROOT = Path(__file__).parents[2]
ROWS, DIM = 200, 3  # four pages, the last one partly beyond the end


def open_real() -> RedisStore:
    address = os.environ.get("TESSERA_TEST_REDIS")
    if not address:
        message = "no Redis server to test against: make up, then TESSERA_TEST_REDIS=redis://127.0.0.1:6379/0"
        if os.environ.get("REQUIRE_SERVICES") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return RedisStore(address)


CONSTRUCTORS: dict[str, Callable[[Path], OnlineStore]] = {
    "memory": lambda directory: MemoryStore(),
    "embedded": open_embedded,
    "redis": lambda directory: open_real(),
    "cluster": lambda directory: _open_cluster(directory),
}


def only_server(store: RedisStore) -> Any:
    return store._redis.servers.every()[0]


def _open_cluster(directory: Path) -> RedisStore:
    cluster = RedisCluster(directory)
    store = RedisStore(cluster.address)
    store._leave = weakref.finalize(store, cluster.close)
    return store


@pytest.fixture(scope="module", params=CONSTRUCTORS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnlineStore]:
    store = CONSTRUCTORS[request.param](tmp_path_factory.mktemp("store"))
    yield store
    store.close()


@pytest.fixture(scope="module", params=["embedded", "redis"])
def redis_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisStore]:
    store = CONSTRUCTORS[request.param](tmp_path_factory.mktemp("store"))
    assert isinstance(store, RedisStore)
    yield store
    store.close()


@pytest.fixture
def new_bundle() -> Iterator[Callable[[OnlineStore], str]]:
    made: list[tuple[OnlineStore, str]] = []

    def make(store: OnlineStore) -> str:
        made.append((store, f"test-{uuid.uuid4()}"))
        return made[-1][1]

    yield make
    for store, bundle in made:
        store.drop(bundle)


@pytest.fixture
def bundle(store: OnlineStore, new_bundle: Callable[[OnlineStore], str]) -> str:
    bundle = new_bundle(store)
    store.create_table(bundle, rows=ROWS, dim=DIM)
    return bundle


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def filled(*values: float) -> np.ndarray:
    """One vector for each value, all of whose components are that value."""
    return np.repeat(np.array(values, dtype=np.float32)[:, None], DIM, axis=1)


def test_rows_come_back_bit_for_bit_in_the_order_asked_for(store: OnlineStore, bundle: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=(ROWS, DIM), dtype=np.uint32)
    vectors = bits.view(np.float32)
    vectors[~np.isfinite(vectors)] = -0.0
    rows = rng.permutation(ROWS)
    assert store.write_rows(bundle, rows, rng.integers(0, MAX_SEQ, ROWS), vectors) == ROWS
    wanted = rng.integers(0, ROWS, 3 * ROWS)
    held = np.empty_like(vectors)
    held[rows] = vectors
    read = store.read_rows(bundle, wanted)
    assert read.dtype == np.float32
    assert read.tobytes() == held[wanted].tobytes()


def test_a_read_belongs_to_the_caller(store: OnlineStore, bundle: str) -> None:
    store.write_rows(bundle, ints(5), ints(1), filled(2))
    store.read_rows(bundle, ints(5))[:] = 7
    np.testing.assert_array_equal(store.read_rows(bundle, ints(5)), filled(2))


def test_rows_at_page_boundaries_keep_to_themselves(store: OnlineStore, bundle: str) -> None:
    rows = ints(0, 63, 64, 127, 128, ROWS - 1)
    store.write_rows(bundle, rows, rows + 1, filled(*rows))
    vectors, seqs = store.read_table(bundle)
    wanted = np.zeros((ROWS, DIM), dtype=np.float32)
    wanted[rows] = filled(*rows)
    np.testing.assert_array_equal(vectors, wanted)
    np.testing.assert_array_equal(np.flatnonzero(seqs != NEVER), rows)
    np.testing.assert_array_equal(seqs[rows], rows + 1)


def test_an_unwritten_row_reads_zeros_and_never(store: OnlineStore, bundle: str) -> None:
    store.write_rows(bundle, ints(10), ints(0), filled(1))
    rows = ints(11, 10, 150)
    np.testing.assert_array_equal(store.read_rows(bundle, rows), filled(0, 1, 0))
    np.testing.assert_array_equal(store.read_seqs(bundle, rows), [NEVER, 0, NEVER])


def test_nothing_asked_for_is_nothing_read_or_written(store: OnlineStore, bundle: str) -> None:
    assert store.read_rows(bundle, ints()).shape == (0, DIM)
    assert store.read_seqs(bundle, ints()).shape == (0,)
    assert store.write_rows(bundle, ints(), ints(), np.zeros((0, DIM), np.float32)) == 0
    assert store.write_records(bundle, "item", [], [], []) == 0
    assert store.read_records(bundle, "item", []) == []
    assert scanned(store, bundle) == {}


def test_sequence_numbers_compare_as_numbers_over_their_whole_range(store: OnlineStore, bundle: str) -> None:
    ladder = [0, 1, 255, 256, 2**16, 2**31, 2**32 - 1, 2**32, 2**47, MAX_SEQ]
    for low, high in itertools.pairwise(ladder):
        row = ints(ladder.index(low))
        assert store.write_rows(bundle, row, ints(high), filled(2)) == 1
        assert store.write_rows(bundle, row, ints(low), filled(1)) == 0
        np.testing.assert_array_equal(store.read_seqs(bundle, row), [high])
        np.testing.assert_array_equal(store.read_rows(bundle, row), filled(2))


def test_an_equal_sequence_number_does_not_overwrite(store: OnlineStore, bundle: str) -> None:
    assert store.write_rows(bundle, ints(3), ints(5), filled(1)) == 1
    assert store.write_rows(bundle, ints(3), ints(5), filled(2)) == 0
    np.testing.assert_array_equal(store.read_rows(bundle, ints(3)), filled(1))


def test_of_a_row_repeated_in_one_call_the_highest_then_the_first_wins(store: OnlineStore, bundle: str) -> None:
    rows, seqs = ints(7, 70, 7, 7, 70), ints(1, 4, 9, 9, 4)
    assert store.write_rows(bundle, rows, seqs, filled(1, 2, 3, 4, 5)) == 2
    np.testing.assert_array_equal(store.read_rows(bundle, ints(7, 70)), filled(3, 2))


writes = st.lists(
    st.lists(st.tuples(st.integers(0, ROWS - 1) | st.sampled_from([63, 64]), st.integers(0, 6)), min_size=1),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(writes=writes, data=st.data())
def test_any_order_and_any_replays_give_the_fold_by_highest_sequence_number(
    store: OnlineStore, writes: list[list[tuple[int, int]]], data: st.DataObject
) -> None:
    replayed = writes + data.draw(st.lists(st.sampled_from(writes), max_size=4))
    order = data.draw(st.permutations(replayed))
    fold = np.full(ROWS, NEVER)
    for row, seq in (version for call in writes for version in call):
        fold[row] = max(fold[row], seq)
    rows = np.arange(ROWS)
    reference, bundle = MemoryStore(), f"test-{uuid.uuid4()}"
    for each in (store, reference):
        each.create_table(bundle, rows=ROWS, dim=DIM)
    for call in order:
        # The vector is a function of row and seq, as a delta's is: one log position has one value.
        part = np.array(call, dtype=np.int64)
        arguments = (part[:, 0].copy(), part[:, 1].copy(), filled(*(part[:, 0] * 10 + part[:, 1])))
        assert store.write_rows(bundle, *arguments) == reference.write_rows(bundle, *arguments)
    np.testing.assert_array_equal(store.read_seqs(bundle, rows), fold)
    np.testing.assert_array_equal(store.read_rows(bundle, rows), filled(*np.where(fold < 0, 0, rows * 10 + fold)))
    np.testing.assert_array_equal(store.read_rows(bundle, rows), reference.read_rows(bundle, rows))
    store.drop(bundle)


@settings(max_examples=40, deadline=None)
@given(
    calls=st.lists(
        st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=2), st.integers(0, 5)), max_size=6),
        max_size=6,
    )
)
def test_records_equal_the_reference(store: OnlineStore, calls: list[list[tuple[str, int]]]) -> None:
    reference, bundle = MemoryStore(), f"test-{uuid.uuid4()}"
    for position, call in enumerate(calls):
        ids, seqs = [name for name, _ in call], [seq for _, seq in call]
        payloads = [b"%d of %d" % (i, position) for i in range(len(call))]
        counts = [each.write_records(bundle, "item", ids, seqs, payloads) for each in (store, reference)]
        assert counts[0] == counts[1]
    assert scanned(store, bundle) == scanned(reference, bundle)
    listed = list(dict.fromkeys(name for call in calls for name, _ in call))
    assert store.read_records(bundle, "item", listed) == reference.read_records(bundle, "item", listed)
    store.drop(bundle)


def test_racing_writers_end_at_the_highest_sequence_number(store: OnlineStore, bundle: str) -> None:
    rows = np.arange(ROWS)

    def write(start: int) -> None:
        for seq in np.random.default_rng(start).permutation(np.arange(start, 100, 2)):
            store.write_rows(bundle, rows, np.full(ROWS, seq), filled(*(rows + seq)))

    threads = [threading.Thread(target=write, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(store.read_seqs(bundle, rows), np.full(ROWS, 99))
    np.testing.assert_array_equal(store.read_rows(bundle, rows), filled(*(rows + 99)))


def test_a_load_equals_writing_every_row(store: OnlineStore, bundle: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    store.load_rows(bundle, vectors, seq=0)
    read, seqs = store.read_table(bundle)
    np.testing.assert_array_equal(read, vectors)
    np.testing.assert_array_equal(seqs, np.zeros(ROWS))


def test_a_load_leaves_rows_that_are_not_older(store: OnlineStore, bundle: str) -> None:
    store.write_rows(bundle, ints(2, 64, 65, ROWS - 1), ints(4, 5, 6, 9), filled(1, 2, 3, 4))
    store.load_rows(bundle, filled(*np.full(ROWS, 8)), seq=5)
    vectors, seqs = store.read_table(bundle)
    wanted, wanted_seqs = filled(*np.full(ROWS, 8)), np.full(ROWS, 5)
    wanted[[64, 65, ROWS - 1]], wanted_seqs[[64, 65, ROWS - 1]] = filled(2, 3, 4), (5, 6, 9)
    np.testing.assert_array_equal(vectors, wanted)
    np.testing.assert_array_equal(seqs, wanted_seqs)
    store.load_rows(bundle, filled(*np.zeros(ROWS)), seq=0)
    np.testing.assert_array_equal(store.read_table(bundle)[0], wanted)


def test_a_table_of_many_chunks_reads_as_written(store: OnlineStore, new_bundle: Callable[[OnlineStore], str]) -> None:
    count, bundle = 70_001, new_bundle(store)
    store.create_table(bundle, rows=count, dim=1)
    vectors = np.arange(count, dtype=np.float32)[:, None]
    store.load_rows(bundle, vectors, seq=0)
    rows = np.random.default_rng(2).permutation(count)
    newer = rows[:20_000]
    assert store.write_rows(bundle, newer, np.full(len(newer), 3), -vectors[newer]) == len(newer)
    vectors[newer] *= -1
    np.testing.assert_array_equal(store.read_rows(bundle, rows), vectors[rows])
    np.testing.assert_array_equal(store.read_table(bundle)[0], vectors)
    np.testing.assert_array_equal(store.read_seqs(bundle, newer), np.full(len(newer), 3))


def test_creating_a_table_again_keeps_it_and_another_shape_is_refused(store: OnlineStore, bundle: str) -> None:
    store.write_rows(bundle, ints(1), ints(1), filled(1))
    store.create_table(bundle, rows=ROWS, dim=DIM)
    np.testing.assert_array_equal(store.read_rows(bundle, ints(1)), filled(1))
    with pytest.raises(StoreError, match=r"200 rows of 3 dimensions in float32, not 200 rows of 4"):
        store.create_table(bundle, rows=ROWS, dim=4)


def test_an_unknown_bundle_is_not_loaded(store: OnlineStore) -> None:
    missing = f"test-{uuid.uuid4()}"
    calls: list[Callable[[], object]] = [
        lambda: store.read_rows(missing, ints(0)),
        lambda: store.read_seqs(missing, ints(0)),
        lambda: store.read_table(missing),
        lambda: store.write_rows(missing, ints(0), ints(0), filled(0)),
        lambda: store.load_rows(missing, filled(0), seq=0),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is not loaded"):
            call()


@pytest.mark.parametrize("row", [-1, ROWS, 2**40])
def test_a_row_out_of_range_is_refused(store: OnlineStore, bundle: str, row: int) -> None:
    for call in (store.read_rows, store.read_seqs):
        with pytest.raises(StoreError, match=rf"rows\[1\] is {row}, but the table has rows 0\.\.199"):
            call(bundle, ints(0, row))
    with pytest.raises(StoreError, match="rows"):
        store.write_rows(bundle, ints(0, row), ints(1, 1), filled(1, 1))
    np.testing.assert_array_equal(store.read_seqs(bundle, ints(0)), [NEVER])


@pytest.mark.parametrize(
    ("rows", "seqs", "vectors", "named"),
    [
        (ints(0).astype(np.int32), ints(1), filled(1), "rows"),
        (ints(0)[None], ints(1), filled(1), "rows"),
        ([0], ints(1), filled(1), "rows"),
        (ints(0), ints(1, 2), filled(1), "seqs"),
        (ints(0), ints(1).astype(np.float64), filled(1), "seqs"),
        (ints(0), ints(-1), filled(1), "seqs"),
        (ints(0), ints(MAX_SEQ + 1), filled(1), "seqs"),
        (ints(0), ints(1), filled(1, 2), "vectors"),
        (ints(0), ints(1), filled(1)[:, :2], "vectors"),
        (ints(0), ints(1), filled(1).astype(np.float64), "vectors"),
        (ints(0), ints(1), filled(np.nan), r"vectors\[0\]"),
        (ints(0), ints(1), filled(np.inf), r"vectors\[0\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named_and_nothing_is_written(
    store: OnlineStore, bundle: str, rows: np.ndarray, seqs: np.ndarray, vectors: np.ndarray, named: str
) -> None:
    with pytest.raises(StoreError, match=f"^{named}"):
        store.write_rows(bundle, rows, seqs, vectors)
    assert (store.read_table(bundle)[1] == NEVER).all()


def test_a_load_of_a_wrong_shape_or_with_nan_is_refused(store: OnlineStore, bundle: str) -> None:
    nan = filled(*np.zeros(ROWS))
    nan[9, 1] = np.nan
    for vectors, message in ((filled(1), r"shape \(200, 3\)"), (nan, r"vectors\[9\] holds NaN")):
        with pytest.raises(StoreError, match=message):
            store.load_rows(bundle, vectors, seq=0)
    with pytest.raises(StoreError, match=r"^seq "):
        store.load_rows(bundle, filled(*np.zeros(ROWS)), seq=-1)


@pytest.mark.parametrize("name", ["", "a{b}", "a\nb", None])
def test_a_name_that_cannot_be_a_key_is_refused(store: OnlineStore, name: str) -> None:
    with pytest.raises(StoreError, match=r"^bundle"):
        store.create_table(name, rows=1, dim=1)
    with pytest.raises(StoreError, match=r"^kind"):
        store.write_records("test", name, [], [], [])


def test_the_newest_record_wins_and_a_missing_one_is_none(store: OnlineStore, bundle: str) -> None:
    assert store.write_records(bundle, "item", ["a", "b", "a"], [5, 0, 6], [b"old", b"\0\xff", b"new"]) == 2
    assert store.write_records(bundle, "item", ["a", "b"], [5, 1], [b"older", b""]) == 1
    assert store.write_records(bundle, "item", ["a"], [6], [b"equal"]) == 0
    assert store.read_records(bundle, "item", ["b", "c", "a", "a"]) == [b"", None, b"new", b"new"]
    assert store.read_records(bundle, "user", ["a"]) == [None]


def scanned(store: OnlineStore, bundle: str, kind: str = "item") -> dict[str, bytes]:
    return {name: data for chunk in store.scan_records(bundle, kind) for name, data in chunk}


def test_all_records_are_scanned_some_at_a_time(store: OnlineStore, bundle: str) -> None:
    first = [f"i{n}" for n in range(1_700)]
    store.write_records(bundle, "item", first, [1] * 1_700, [b"x"] * 1_700)
    store.write_records(bundle, "item", ["i7", "ü"], [2, 2], [b"new", b""])
    store.write_records(bundle, "user", ["u"], [0], [b""])
    assert scanned(store, bundle) == dict.fromkeys(first, b"x") | {"i7": b"new", "ü": b""}
    assert scanned(store, bundle, "user") == {"u": b""}
    assert max(len(chunk) for chunk in store.scan_records(bundle, "item")) <= 1_000
    assert store.read_records(bundle, "item", [*first, "none"]) == [b"x"] * 7 + [b"new"] + [b"x"] * 1_692 + [None]
    store.remove_records(bundle, "item", [*first[1:], "none"])
    assert scanned(store, bundle) == {"i0": b"x", "ü": b""}


def test_a_follower_learns_of_every_write_that_changed_something_in_order(store: OnlineStore, bundle: str) -> None:
    start = store.changes(bundle, "item", "")
    assert (start.ids, start.lost) == ([], True)
    store.write_records(bundle, "item", ["a", "b"], [5, 5], [b"", b""])
    store.write_records(bundle, "item", ["c", "a", "b"], [1, 4, 6], [b"", b"", b""])
    store.write_records(bundle, "item", ["c"], [1], [b""])
    found = store.changes(bundle, "item", start.cursor)
    assert (sorted(found.ids), found.lost) == (["a", "b", "b", "c"], False)
    # A sequence number below those that were seen is a change all the same.
    store.write_records(bundle, "item", ["late"], [0], [b""])
    assert store.changes(bundle, "item", found.cursor).ids == ["late"]
    assert sorted(store.changes(bundle, "item", start.cursor).ids) == ["a", "b", "b", "c", "late"]
    with pytest.raises(StoreError, match="kind must be one of admitted, forgotten, item"):
        store.changes(bundle, "user", "")


def test_a_follower_of_a_store_that_was_dropped_and_filled_again_is_told_to_read_everything(
    store: OnlineStore, bundle: str
) -> None:
    before = [f"a{n}" for n in range(30)]
    for name in before:
        store.write_records(bundle, "item", [name], [1], [b""])
    cursor = store.changes(bundle, "item", "").cursor
    assert not store.changes(bundle, "item", cursor).lost
    store.drop(bundle)
    store.create_table(bundle, rows=ROWS, dim=DIM)
    # As many writes as before, or fewer, or more: their number says nothing.
    for name in [*before, "b"]:
        store.write_records(bundle, "item", [name], [1], [b""])
        assert store.changes(bundle, "item", cursor).lost
    found = store.changes(bundle, "item", cursor)
    store.write_records(bundle, "item", ["c"], [1], [b""])
    assert store.changes(bundle, "item", found.cursor).ids == ["c"]


def test_the_writes_that_are_listed_are_bounded_and_who_asks_too_late_is_told(store: OnlineStore, bundle: str) -> None:
    start = store.changes(bundle, "item", "").cursor
    ids, writes = [f"i{n}" for n in range(500)], 410 if isinstance(store, MemoryStore) else 0
    for seq in range(writes):
        store.write_records(bundle, "item", ids, [seq] * 500, [b""] * 500)
    if isinstance(store, RedisStore):
        names = ("record:item", "kinds", "table", "removed:item", "changes:item")
        one = [(f"{n}", bytes(5) + b"\x01") for n in range(5_000)]
        keys = [store._layouts.state(bundle).key(0, name) for name in names]
        store._redis.run(Script("write_records"), ((keys, [b"item", 0, b"mark", *pair]) for pair in one))
        (held,) = store._redis.all([(keys[-1], ("XLEN", keys[-1]))])
        assert 4_096 <= held < 4_300
    late = store.changes(bundle, "item", start)
    assert (late.ids, late.lost) == ([], True)
    assert not store.changes(bundle, "item", late.cursor).lost


@pytest.mark.parametrize(
    ("ids", "seqs", "payloads", "named"),
    [
        (["a"], [1, 2], [b""], "ids, seqs and payloads"),
        (["a"], [-1], [b""], "seqs"),
        (["a"], [1], ["text"], "payloads"),
        ([7], [1], [b""], "ids"),
        (["\ud800"], [1], [b""], "ids"),
        ("a", [1], [b""], "ids"),
    ],
)
def test_records_that_do_not_fit_are_named(
    store: OnlineStore, bundle: str, ids: list[str], seqs: list[int], payloads: list[bytes], named: str
) -> None:
    with pytest.raises(StoreError, match=f"^{named}"):
        store.write_records(bundle, "item", ids, seqs, payloads)
    assert scanned(store, bundle) == {}


def test_drop_removes_one_bundle_and_no_other(
    store: OnlineStore, bundle: str, new_bundle: Callable[[OnlineStore], str]
) -> None:
    other = new_bundle(store)
    store.create_table(other, rows=ROWS, dim=DIM)
    for each in (bundle, other):
        store.write_rows(each, ints(1), ints(1), filled(1))
        store.write_records(each, "item", ["a"], [1], [b"a"])
    store.drop(bundle)
    store.drop(bundle)
    with pytest.raises(StoreError, match="is not loaded"):
        store.read_rows(bundle, ints(1))
    with pytest.raises(StoreError, match="is not loaded"):
        store.write_rows(bundle, ints(1), ints(2), filled(1))
    assert store.read_records(bundle, "item", ["a"]) == [None]
    assert scanned(store, bundle) == {}
    np.testing.assert_array_equal(store.read_rows(other, ints(1)), filled(1))
    assert scanned(store, other) == {"a": b"a"}
    store.create_table(bundle, rows=ROWS, dim=DIM + 1)
    assert (store.read_table(bundle)[1] == NEVER).all()


def test_the_store_answers(store: OnlineStore) -> None:
    assert store.ping() is None


def test_forgotten_scripts_are_loaded_again(redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]) -> None:
    bundle = new_bundle(redis_store)
    redis_store.create_table(bundle, rows=5000, dim=DIM)
    rows = np.arange(5000)
    for seq in range(2):
        only_server(redis_store).script_flush()
        assert redis_store.write_rows(bundle, rows, np.full(5000, seq), filled(*(rows + seq))) == 5000
        only_server(redis_store).script_flush()
        np.testing.assert_array_equal(redis_store.read_rows(bundle, rows), filled(*(rows + seq)))
        only_server(redis_store).script_flush()
        assert redis_store.write_records(bundle, "item", ["a"], [seq], [b"a"]) == 1


def test_a_table_that_another_client_made_anew_is_noticed(
    redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle, other = new_bundle(redis_store), RedisStore(_address(redis_store))
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    other.create_table(bundle, rows=ROWS, dim=DIM)
    redis_store.drop(bundle)
    for call in (lambda: other.read_rows(bundle, ints(0)), lambda: other.read_table(bundle)):
        with pytest.raises(StoreError, match="is not loaded"):
            call()
    redis_store.create_table(bundle, rows=ROWS, dim=2)
    assert other.read_rows(bundle, ints(0)).shape == (1, 2)
    redis_store.drop(bundle)
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    with pytest.raises(StoreError, match=r"vectors .* shape \(1, 3\)"):
        other.write_rows(bundle, ints(0), ints(0), np.zeros((1, 2), np.float32))
    other.close()


def test_a_drop_that_was_cut_off_is_finished_before_the_table_is_made_anew(
    redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle = new_bundle(redis_store)
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    redis_store.write_rows(bundle, ints(1), ints(9), filled(1))
    only_server(redis_store).rename(f"tessera:{{{bundle}}}:table", f"tessera:{{{bundle}}}:dropping")
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    assert (redis_store.read_table(bundle)[1] == NEVER).all()


def test_drop_leaves_no_key_behind(redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]) -> None:
    bundle = new_bundle(redis_store)
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    redis_store.load_rows(bundle, filled(*np.zeros(ROWS)), seq=0)
    redis_store.write_records(bundle, "item", ["a"], [1], [b"a"])
    only_server(redis_store).rpush(f"tessera:{{{bundle}}}:order:item", "a")  # of an older release
    assert len(list(only_server(redis_store).scan_iter(f"tessera:{{{bundle}}}:*"))) == 4 + 1 + 4
    redis_store.drop(bundle)
    assert list(only_server(redis_store).scan_iter(f"tessera:{{{bundle}}}:*")) == []


def test_a_writer_of_an_older_release_is_noticed_by_its_lists(
    redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle = new_bundle(redis_store)
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    server, place = only_server(redis_store), f"tessera:{{{bundle}}}:"
    cursors = [""]
    for number in range(2):
        # What commit 310ca4f wrote: the record, its id at its first time, and the batch's changes.
        server.sadd(place + "kinds", "item", "changed")
        server.hset(place + "record:item", f"i{number}", bytes(5) + b"\x02" + b"x")
        server.rpush(place + "order:item" if number else place + "order:changed", f"i{number}")
        first, second = (redis_store.changes(bundle, "item", cursors[-1]) for _ in range(2))
        assert first.lost
        assert number == 0 or second.lost
        assert not redis_store.changes(bundle, "item", first.cursor).lost
        assert len(scanned(redis_store, bundle)) == number + 1
        cursors.append(first.cursor)


def test_a_layout_of_another_version_is_refused(
    redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle = new_bundle(redis_store)
    key = f"tessera:{{{bundle}}}:table"
    only_server(redis_store).set(key, "rows=200 dim=3 storage=float8 page=64")
    with pytest.raises(StoreError, match="storage=float8"):
        redis_store.read_rows(bundle, ints(0))
    only_server(redis_store).delete(key)


def test_an_address_of_no_known_scheme_is_refused_without_its_password() -> None:
    with pytest.raises(StoreError, match="redis://") as caught:
        RedisStore("http://user:secret@host")
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_a_store_error_without_the_password(tmp_path: Path) -> None:
    store = RedisStore(f"unix://:secret@{tmp_path}/none.sock")
    with pytest.raises(StoreError, match=r"none\.sock failed") as caught:
        store.ping()
    assert "secret" not in str(caught.value)
    store.close()


def test_an_embedded_store_finds_its_data_when_opened_again(tmp_path: Path) -> None:
    for seq in range(3):
        store = open_embedded(tmp_path / "with space")
        store.create_table("b", rows=ROWS, dim=DIM)
        np.testing.assert_array_equal(store.read_seqs("b", ints(64)), [seq - 1])
        store.write_rows("b", ints(64), ints(seq), filled(seq))
        store.write_records("b", "item", [str(seq)], [0], [b"x"])
        store.close()
        store.close()
    assert not (tmp_path / "with space" / "redis.sock").exists()
    store = open_embedded(tmp_path / "with space")
    assert scanned(store, "b").keys() == {"0", "1", "2"}
    store.close()


OTHER_PROCESS = """
import os, signal, sys, numpy as np
from pathlib import Path
from serving.store.redis.embedded import open_embedded
directory, row, end = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
store = open_embedded(directory)
store.create_table("b", rows=200, dim=3)
store.write_rows("b", np.array([row]), np.array([1]), np.ones((1, 3), np.float32))
print("written", flush=True)
sys.stdin.readline()
if end == "close":
    store.close()
elif end == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_embedded_server_is_shared_by_processes_and_stops_with_the_last(tmp_path: Path) -> None:
    def run(*ends: str, start: int) -> list[int]:
        """Let processes open the directory at the same moment, write a row each and end; their exit codes."""
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), str(start + position), end],
                        cwd=ROOT,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
                for position, end in enumerate(ends)
            ]
            for said in (b"ready\n", b"written\n"):
                for process in processes:
                    assert process.stdout is not None
                    assert process.stdout.readline() == said
                for process in processes:
                    assert process.stdin is not None
                    process.stdin.write(b"\n")
                    process.stdin.flush()
            return [process.wait(60) for process in processes]

    assert run("close", "exit", "close", "kill", start=0) == [0, 0, 0, -9]
    assert (tmp_path / "redis.log").read_text().count("Server initialized") == 1
    store = open_embedded(tmp_path)
    np.testing.assert_array_equal(store.read_seqs("b", np.arange(5)), [1, 1, 1, 1, NEVER])
    assert run("close", "kill", start=4) == [0, -9]
    np.testing.assert_array_equal(store.read_seqs("b", ints(4, 5)), [1, 1])
    store.close()
    assert not (tmp_path / "redis.sock").exists()


def test_an_embedded_directory_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="too long for a Unix socket"):
        open_embedded(tmp_path / ("x" * 100))


def _address(store: RedisStore) -> str:
    return os.environ["TESSERA_TEST_REDIS"] if store._leave is None else store._redis.address


def test_a_bundle_that_expires_is_gone_with_all_it_had_and_one_that_is_kept_stays(
    store: OnlineStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    gone, kept = new_bundle(store), new_bundle(store)
    for bundle in (gone, kept):
        store.create_table(bundle, rows=ROWS, dim=DIM)
        store.load_rows(bundle, np.ones((ROWS, DIM), dtype=np.float32), seq=0)
        store.write_records(bundle, "item", ["a"], [1], [b"x"])
        store.expire(bundle, after_s=100)
        assert (store.read_rows(bundle, ints(0, 199)) == 1).all()
    assert store.keep(kept)
    assert store.keep(kept)
    store.expire(gone, after_s=0.05)
    time.sleep(0.2)
    with pytest.raises(StoreError, match="not loaded"):
        store.read_rows(gone, ints(0))
    assert store.read_records(gone, "item", ["a"]) == [None]
    assert scanned(store, gone) == {}
    assert not store.keep(gone)
    assert (store.read_rows(kept, np.arange(ROWS)) == 1).all()
    assert store.read_records(kept, "item", ["a"]) == [b"x"]


def test_a_bundle_that_somebody_still_answers_from_is_put_off_and_one_that_stays_is_left_alone(
    store: OnlineStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    going, staying = new_bundle(store), new_bundle(store)
    for bundle in (going, staying):
        store.create_table(bundle, rows=ROWS, dim=DIM)
        store.write_records(bundle, "item", ["a"], [1], [b"x"])
        store.changes(bundle, "admitted", "")
    store.expire(going, after_s=0.3)
    store.renew(going, least_s=60)
    store.renew(staying, least_s=60)
    store.write_records(going, "late", ["a"], [1], [b"x"])
    time.sleep(0.4)
    assert store.read_records(going, "item", ["a"]) == [b"x"]
    store.expire(going, after_s=0.2)
    store.renew(going, least_s=0.1)
    time.sleep(0.3)
    assert store.read_records(going, "item", ["a"]) == store.read_records(going, "late", ["a"]) == [None]
    assert store.keep(staying)
    if isinstance(store, RedisStore):
        store.expire(staying, after_s=60)
        for client in store._redis.servers.every():
            left = [client.pttl(key) for key in client.scan_iter(f"tessera:*{staying}*")]
            assert all(0 < one <= 60_000 for one in left)


def test_a_bundle_whose_time_has_nearly_come_is_not_kept_but_dropped(
    store: OnlineStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle = new_bundle(store)
    store.create_table(bundle, rows=ROWS, dim=DIM)
    store.expire(bundle, after_s=5)
    assert not store.keep(bundle)
    with pytest.raises(StoreError, match="not loaded"):
        store.table(bundle)
    with pytest.raises(StoreError, match="not loaded"):
        store.expire(bundle, after_s=5)


def test_tls_and_a_user_with_a_password_are_asked_for_and_taken(tmp_path: Path) -> None:
    with contextlib.closing(TlsRedis(tmp_path)) as server:
        with contextlib.closing(RedisStore(server.address)) as store:
            store.create_table("b", rows=ROWS, dim=DIM)
            store.write_rows("b", ints(7), ints(1), np.ones((1, DIM), dtype=np.float32))
            assert store.read_rows("b", ints(7))[0, 0] == 1
        for wrong, why in ((server.wrong_password, "WRONGPASS|invalid username"), (server.unknown_ca, "certificate")):
            with contextlib.closing(RedisStore(wrong)) as store, pytest.raises(StoreError, match=why) as failed:
                store.ping()
            assert "secret" not in str(failed.value)


def test_a_forgotten_record_is_removed_and_no_older_write_brings_it_back(store: OnlineStore, bundle: str) -> None:
    store.write_records(bundle, "history", ["a", "b", "c"], [3, 8, 9], [b"old", b"same", b"new"])
    assert store.forget_records(bundle, "history", ["a", "b", "c", "d"], [8, 8, 8, 8]) == 1
    assert store.read_records(bundle, "history", ["a", "b", "c", "d"]) == [None, b"same", b"new", None]
    for again in (False, True):
        assert store.write_records(bundle, "history", ["a", "d"], [7, 0], [b"late", b"late"], again=again) == 0
    assert store.read_records(bundle, "history", ["a", "d"]) == [None, None]
    # A record of the same number or a newer one is of a new life; another kind is another record.
    assert store.write_records(bundle, "history", ["a", "d"], [8, 9], [b"8", b"9"]) == 2
    assert store.write_records(bundle, "item", ["a"], [1], [b"item"]) == 1
    # A repeat, and a removal that is older, change nothing.
    assert store.forget_records(bundle, "history", ["a", "d"], [8, 2]) == 0
    assert store.read_records(bundle, "history", ["a", "d"]) == [b"8", b"9"]
    scanned = {name for chunk in store.scan_records(bundle, "history") for name, _ in chunk}
    assert scanned == {"a", "b", "c", "d"}


def test_a_dropped_bundle_has_no_removals(store: OnlineStore, bundle: str) -> None:
    store.forget_records(bundle, "history", ["a"], [8])
    store.drop(bundle)
    store.create_table(bundle, rows=ROWS, dim=DIM)
    assert store.write_records(bundle, "history", ["a"], [1], [b"x"]) == 1


def test_a_store_keeps_no_id_of_a_removed_record(
    redis_store: RedisStore, new_bundle: Callable[[OnlineStore], str]
) -> None:
    bundle = new_bundle(redis_store)
    redis_store.create_table(bundle, rows=ROWS, dim=DIM)
    redis_store.write_records(bundle, "history", ["somebody"], [3], [b"x"])
    redis_store.forget_records(bundle, "history", ["somebody"], [4])
    fields = only_server(redis_store).hgetall(f"tessera:{{{bundle}}}:removed:history")
    assert len(fields) == 2
    assert not any(b"somebody" in part for pair in fields.items() for part in pair)
    assert only_server(redis_store).hkeys(f"tessera:{{{bundle}}}:record:history") == []
