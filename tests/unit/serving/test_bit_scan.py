"""Bits find what an exact scan does, within the stated recall, and follow the catalogue byte for byte."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.content.bits import asymmetric
from features.content.encoder import unit
from features.errors import TesseraError
from features.value.filter import Filter
from models.encoder.advise import index_bytes
from models.encoder.bits import fit_itq
from serving.retrieval import index as planner
from serving.retrieval.bit_scan import BitScan, PackedCodes
from serving.retrieval.filter import Attributes
from serving.retrieval.index import VectorIndex
from serving.retrieval.matches import Matches
from serving.retrieval.retriever import Searcher
from serving.retrieval.rows import ROW_KINDS, EightBitRows, RowKind, open_rows
from tessera.settings import Settings

SIZE, DIM = 4_000, 32
SPACE = "index"


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    scales = np.arange(1, DIM + 1) ** -0.5
    centres = rng.standard_normal((40, DIM)) * scales
    return unit(centres[rng.integers(0, 40, SIZE)] + 0.5 * rng.standard_normal((SIZE, DIM)) * scales)


@pytest.fixture(autouse=True)
def _bits_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "_LEAST_BITS", 1_000)


@pytest.fixture(scope="module", params=ROW_KINDS)
def index(request: pytest.FixtureRequest, vectors: np.ndarray) -> VectorIndex:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "_LEAST_BITS", 1_000)
        return VectorIndex(vectors, kind=request.param)


def nearest(vectors: np.ndarray, query: np.ndarray, k: int, held: np.ndarray) -> set[int]:
    scores = np.where(held, vectors @ query, -np.inf)
    return set(np.argsort(-scores)[: min(k, int(held.sum()))].tolist())


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.05, 0.01])
@pytest.mark.parametrize("k", [10, 50, 120])
def test_recall_of_bits_is_at_least_the_floor(index: VectorIndex, vectors: np.ndarray, share: float, k: int) -> None:
    rng = np.random.default_rng(1)
    assert index.bits is not None
    held = rng.random(SIZE) < share
    matches = Matches(np.flatnonzero(held), SIZE)
    hits = total = 0
    for query in unit(vectors[rng.integers(0, SIZE, 50)] + 0.03 * rng.standard_normal((50, DIM))):
        needed = max(k, int(index.bits.needed(share, k)))
        found, scores = index._by_bits(query, k, needed, matches)
        assert (np.diff(scores) <= 0).all()
        assert held[found].all()
        truth = nearest(vectors, query, k, held)
        hits, total = hits + len(truth & set(found.tolist())), total + len(truth)
    assert hits / total >= 0.95


def test_the_planner_answers_with_the_cheapest_method_and_says_why(index: VectorIndex, vectors: np.ndarray) -> None:
    rng, seen = np.random.default_rng(3), set()
    for share in (1.0, 0.9, 0.5, 0.3, 0.001):
        matches = index.matches(rng.random(SIZE) < share) if share < 1 else None
        for _ in range(4):
            _, _, plan = index.search(vectors[0], 10, matches)
            assert plan.why
            assert plan.cost <= plan.other_cost or not plan.other_cost
            assert (plan.method == "bits") == (plan.shortlist is not None)
        seen.add(plan.method)
    # An index of int8 rows has no lists.
    assert seen == ({"exact", "ivf", "ivf+filter"} if index._ivf else {"exact", "bits"})


def test_a_filter_that_comes_again_is_packed_and_old_filters_are_dropped(vectors: np.ndarray) -> None:
    index, rng = VectorIndex(vectors, kind="int8"), np.random.default_rng(4)
    assert index.bits is not None
    halves = [index.matches(rng.random(SIZE) < 0.5) for _ in range(6)]
    before = index.size_bytes
    assert [index.bits.unpacked(halves[0]) for _ in range(3)] == [1.0, 0.5, pytest.approx(1 / 3)]
    for half in halves:
        index.bits.shortlist(vectors[0], 10, half)
    assert index.bits.unpacked(halves[-1]) == 0.0
    assert index.bits.unpacked(halves[0]) > 0.0
    # Packed filters take the bytes of all codes at most.
    assert 0 < index.size_bytes - before <= SIZE * DIM // 8


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 8), count=st.integers(1, 200))
def test_the_scan_is_the_product_of_the_float_query_with_the_signs(seed: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (count, width), np.uint8)
    query = rng.standard_normal(8 * width).astype(np.float32)
    positions, products = PackedCodes(codes).best(query[None], count)
    exact = asymmetric(query, codes)
    found = positions[0] >= 0
    missing = np.setdiff1d(np.arange(count), positions[0])
    assert len(missing) + len(set(positions[0][found].tolist())) == count
    # Each part of four signs is rounded to a step, 1 / 255 of the widest part's range.
    step = 2 * np.abs(query.reshape(-1, 4)).sum(axis=1).max() / 255
    bound = 2 * width * step + 1e-4
    assert np.abs(products[0] - exact[positions[0]])[found].max(initial=0.0) <= bound
    # The code that is the query's opposite is left out.
    assert (exact[missing] <= -np.abs(query).sum() + bound).all()


@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 150), changed=st.integers(1, 40))
def test_written_blocks_are_the_bytes_of_codes_packed_new(seed: int, count: int, changed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (count, 4), np.uint8)
    packed = PackedCodes(codes)
    positions = rng.integers(0, count, changed)
    codes[positions] = rng.integers(0, 256, (changed, 4), np.uint8)
    padded = np.zeros((packed.space, 4), np.uint8)
    padded[:count] = codes
    blocks = np.unique(positions // 32)
    packed.write(blocks, padded.reshape(-1, 32, 4)[blocks].reshape(-1, 4))
    assert np.array_equal(packed.stored(), PackedCodes(codes).stored())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(ROW_KINDS), rounds=st.integers(1, 5))
def test_changes_of_the_stream_leave_the_scan_of_an_index_built_new(seed: int, kind: RowKind, rounds: int) -> None:
    rng = np.random.default_rng(seed)
    start = unit(rng.standard_normal((150, 16)))
    start[rng.random(150) < 0.1] = 0
    code = fit_itq(start, 16, space=SPACE)
    rows, present = open_rows(kind, start), start.any(axis=1)
    scan = BitScan(rows, np.flatnonzero(present), code=code)
    for _ in range(rounds):
        numbers = np.unique(rng.integers(0, len(rows) + 30, rng.integers(1, 90)))
        new = unit(rng.standard_normal((len(numbers), 16)))
        new[rng.random(len(numbers)) < 0.4] = 0
        rows.extend(max(0, int(numbers[-1]) + 1 - len(rows)))
        present = np.concatenate([present, np.zeros(len(rows) - len(present), dtype=bool)])
        rows.put(numbers, new)
        present[numbers] = new.any(axis=1)
        scan.put(numbers, present[numbers])
    there = np.flatnonzero(present)
    fresh = BitScan(rows, there, code=code)
    assert np.array_equal(scan.codes(there), fresh.codes(there))
    query = unit(rng.standard_normal((1, 16)))[0]
    # Equal codes have equal products, so the order may differ among them alone.
    found, expected = (dict(zip(*map(list, one.shortlist(query, len(rows))), strict=True)) for one in (scan, fresh))
    assert found == expected
    assert len(there) - len(found) <= 3


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_items_put_one_by_one_are_found_as_items_put_at_once(vectors: np.ndarray, kind: RowKind) -> None:
    code = fit_itq(vectors[:1_000], DIM, space=SPACE)
    at_once, one_by_one = (VectorIndex(vectors[:2_000], kind=kind, code=code) for _ in range(2))
    at_once.put(np.arange(1_900, 2_100), vectors[1_900:2_100])
    for number in range(1_900, 2_100):
        one_by_one.put(np.array([number]), vectors[number : number + 1])
    assert at_once.bits is not None
    assert one_by_one.bits is not None
    assert np.array_equal(at_once.bits.codes(np.arange(2_100)), one_by_one.bits.codes(np.arange(2_100)))
    for query in vectors[3_000:3_020]:
        found = [one._by_bits(query, 10, 2_100, None) for one in (at_once, one_by_one)]
        assert found[0][0].tolist() == found[1][0].tolist()
        assert np.allclose(found[0][1], found[1][1], atol=1e-6)


def test_bits_under_a_filter_are_the_filter_under_bits(index: VectorIndex, vectors: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    assert index.bits is not None
    held = rng.random(SIZE) < 0.2
    matches = index.matches(held)
    for query in vectors[rng.integers(0, SIZE, 10)]:
        after, products = index.bits.shortlist(query, SIZE)
        assert np.array_equal(index.bits.shortlist(query, 100, matches)[1], products[held[after]][:100])
        numbers, scores = index._by_bits(query, SIZE, SIZE, None)
        found = index._by_bits(query, 20, SIZE, matches)
        assert found[0].tolist() == numbers[held[numbers]][:20].tolist()
        assert np.allclose(found[1], scores[held[numbers]][:20], atol=1e-6)


def test_int8_products_are_within_half_a_scale_of_the_float_ones(vectors: np.ndarray) -> None:
    rows, every = EightBitRows.of(vectors), np.arange(SIZE)
    query = unit(np.random.default_rng(6).standard_normal((1, DIM)))[0]
    error = np.abs(rows.products(every, query) - vectors @ query)
    assert (error <= rows.scales(every) / 2 * np.abs(query).sum() + 1e-6).all()
    assert error.max() > 1e-4
    assert rows.nbytes == SIZE * (DIM + 4)
    assert np.array_equal(rows.take(every), rows.copy(np.ones(SIZE, dtype=bool)).take(every))
    assert np.array_equal(EightBitRows.of(rows.take(every)).take(every), rows.take(every))


def test_int8_rows_and_bits_take_less_than_a_quarter_of_the_bytes() -> None:
    rows = unit(np.random.default_rng(7).standard_normal((2_000, 128)))
    small, whole = VectorIndex(rows, kind="int8"), VectorIndex(rows)
    # Packed codes are padded to blocks of 32.
    assert small.size_bytes / 2_000 == pytest.approx(index_bytes(128, "int8"), abs=1)
    assert whole.size_bytes / 2_000 == pytest.approx(index_bytes(128, "float32"), abs=1)
    assert small.size_bytes < whole.size_bytes / 4


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_searcher_of_either_kind_follows_changes_under_filters(
    vectors: np.ndarray, kind: RowKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cost in ("_CODED", "_PACKED", "_BEGUN", "_LISTED"):
        monkeypatch.setattr(planner, cost, 0.0)
    place = np.arange(SIZE)
    searcher = Searcher(vectors, Attributes(pl.DataFrame({"place": place}), ["place"]), kind=kind)
    wanted = Filter.model_validate({"column": "place", "lt": 2_000})
    now, rng = vectors.copy(), np.random.default_rng(8)
    methods, hits = set(), 0
    for _ in range(6):
        changed = rng.choice(SIZE, 100, replace=False)
        now[changed] = now[rng.choice(SIZE, 100)]
        now[changed[:20]] = 0
        searcher.put(changed, now[changed], [{"place": int(number)} for number in changed])
        held = (place < 2_000) & now.any(axis=1)
        for query in unit(now[:20] + 0.1 * rng.standard_normal((20, DIM))):
            found, scores, plan = searcher.search(query, 10, wanted)
            assert held[found].all()
            methods.add(plan.method)
            # Copies of a vector tie, so scores are compared.
            worst = np.sort(now[held] @ query)[-10]
            hits += int((scores >= worst - 0.005).sum())
    assert hits >= 0.97 * 6 * 20 * 10
    assert methods == {"bits"}


def test_a_catalogue_that_shrinks_to_nothing_comes_back(vectors: np.ndarray) -> None:
    index = VectorIndex(vectors[:1_200], kind="int8")
    index.put(np.arange(1_200), np.zeros((1_200, DIM), dtype=np.float32))
    assert index.size == 0
    assert not len(index.search(vectors[0], 5)[0])
    index.put(np.arange(50), vectors[:50])
    assert index.search(vectors[7], 3)[0][0] == 7


def test_an_index_of_int8_rows_is_built_new_from_its_rows(vectors: np.ndarray) -> None:
    index = VectorIndex(vectors, kind="int8")
    fresh = index.rebuilt()
    every = np.arange(SIZE)
    assert np.array_equal(fresh.vectors(every), index.vectors(every))
    assert fresh.bits is not None
    assert index.bits is not None
    assert np.array_equal(fresh.bits.codes(every), index.bits.codes(every))


def test_the_setting_names_what_it_expects(tmp_path: Path) -> None:
    assert Settings(home=tmp_path, index="int8").index_rows() == "int8"
    with pytest.raises(TesseraError, match="TESSERA_INDEX=int4: expected one of float32, int8"):
        Settings(home=tmp_path, index="int4").index_rows()


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_changed_item_is_found_under_a_filter_that_was_packed_before(vectors: np.ndarray, kind: RowKind) -> None:
    index = VectorIndex(vectors[:1_200], kind=kind)
    assert index.bits is not None
    matches = index.matches(np.arange(1_200) < 600)
    index.bits.shortlist(vectors[2_000], 5, matches)
    index.put(np.array([3]), -vectors[3:4])
    assert index.bits.shortlist(-vectors[3], 1, matches)[0].tolist() == [3]


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_the_opposite_of_a_query_is_listed_at_most_once(kind: RowKind) -> None:
    rows = unit(np.random.default_rng(9).standard_normal((1_500, 8)))
    index = VectorIndex(rows, kind=kind)
    assert index.bits is not None
    for query in rows[:20]:
        listed, _ = index.bits.shortlist(query, 1_500)
        # Items with the opposite code are left out.
        assert 1_300 < len(listed) == len(set(listed.tolist())) < 1_500


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_copy_of_rows_is_zero_where_nothing_is_present(vectors: np.ndarray, kind: RowKind) -> None:
    present = np.arange(SIZE) % 3 > 0
    copied = open_rows(kind, vectors).copy(present)
    assert np.array_equal(copied.filled(), present)
    assert np.array_equal(copied.take(np.arange(SIZE)).any(axis=1), present)
