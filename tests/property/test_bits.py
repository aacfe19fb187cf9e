"""Laws of bits and rotations: Hamming equals the float sign product, a batch equals one by one, products are kept."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.content.bits import Int8Rows, asymmetric, hamming, load_bits, rerank, signs
from features.content.chain import apply_steps
from features.content.encoder import unit
from features.errors import BundleError, DatasetError
from models.encoder.axes import rotation, smaller
from models.encoder.bits import fit_itq, fit_signs, shortlist_recall
from models.encoder.limit import critical_items, pairs_solved

D, B = 32, 24


def _rows(count: int, seed: int, *, width: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return unit(rng.normal(size=(count, width)) * np.linspace(1.5, 0.2, width) + 0.3)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 8), count=st.integers(0, 20))
def test_hamming_is_the_float_product_of_signs(seed: int, width: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    codes, query = rng.integers(0, 256, (count, width), np.uint8), rng.integers(0, 256, width, np.uint8)
    bits = 8 * width
    product = signs(codes).astype(np.float64) @ signs(query[None])[0].astype(np.float64)
    assert np.array_equal(bits - 2 * hamming(query, codes), product)


@given(seed=st.integers(0, 2**32 - 1), width=st.integers(1, 8))
def test_asymmetric_is_the_product_of_the_float_query_with_the_signs(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (15, width), np.uint8)
    query = rng.normal(size=8 * width).astype(np.float32)
    assert np.allclose(asymmetric(query, codes), signs(codes).astype(np.float64) @ query, atol=1e-4)


def test_a_code_has_the_same_bytes_alone_and_in_a_batch() -> None:
    rows = _rows(200, 0)
    bits = fit_itq(rows, B, space="a")
    whole = bits.code(rows, space="a")
    assert whole.shape == (200, B // 8)
    assert np.array_equal(np.concatenate([bits.code(rows[n : n + 1], space="a") for n in range(200)]), whole)
    projected = bits.turn(bits.centre(rows))
    assert np.array_equal(signs(whole) > 0, projected > 0)


def test_itq_keeps_more_neighbours_than_signs_and_a_float_query_more_than_a_code() -> None:
    rng = np.random.default_rng(1)
    # Clusters, whose axes are not those of the space.
    rows = unit(rng.normal(size=(30, D))[rng.integers(0, 30, 600)] + 0.5 * rng.normal(size=(600, D)) + 1.0)
    queries = np.arange(60)
    found = shortlist_recall(fit_itq(rows, D, space="a"), rows, queries=queries, k=10, shortlist=12)
    control = shortlist_recall(fit_signs(rows, space="a"), rows, queries=queries, k=10, shortlist=12)
    assert found["codes"] > control["codes"] + 0.1
    assert found["float_query"] > found["codes"]
    rounded = shortlist_recall(fit_itq(rows, D, space="a"), rows, queries=queries, k=10, shortlist=12, int8=True)
    assert abs(rounded["float_query"] - found["float_query"]) < 0.02


def test_int8_rows_are_within_half_a_step_and_rerank_puts_the_nearest_first() -> None:
    rows = _rows(50, 3)
    rows[4] = 0
    small = Int8Rows.of(rows)
    error = np.abs(small.rows(np.arange(50)) - rows)
    assert (error <= small.scales[:, None] * 0.5 + 1e-7).all()
    assert small.values.nbytes + small.scales.nbytes == 50 * (D + 4)
    listed = np.array([7, 9, 3, 21])
    for kept in (rows, small):
        assert rerank(rows[3], listed, kept, 2)[0] == 3
    assert np.array_equal(rerank(rows[3], listed, rows, 4), listed[np.argsort(-(rows[listed] @ rows[3]))])


def test_saved_bits_are_the_bits_and_damage_is_refused(tmp_path: Path) -> None:
    rows = _rows(100, 5)
    bits = fit_itq(rows, B, space="a")
    bits.save(tmp_path)
    assert load_bits(tmp_path).id == bits.id
    assert np.array_equal(load_bits(tmp_path).code(rows, space="a"), bits.code(rows, space="a"))
    described = (tmp_path / "bits.json").read_text()
    (tmp_path / "bits.json").write_text(described.replace('"source":"a"', '"source":"b"'))
    with pytest.raises(BundleError, match="expected bits-"):
        load_bits(tmp_path)


def test_bits_refuse_another_space_and_sizes_that_do_not_fit() -> None:
    rows = _rows(100, 5)
    bits = fit_itq(rows, B, space="a")
    with pytest.raises(DatasetError, match="code vectors of a, got vectors of b"):
        bits.code(rows, space="b")
    with pytest.raises(DatasetError, match="width 32"):
        bits.query(rows[:, :8], space="a")
    for wrong in (0, 12, 40):
        with pytest.raises(DatasetError, match=f"up to the width 32, got {wrong}"):
            fit_itq(rows, wrong, space="a")
    with pytest.raises(DatasetError, match="10 vectors are fewer than 24 bits"):
        fit_itq(rows[:10], B, space="a")


def test_a_rotation_keeps_products_and_its_prefix_beats_the_plain_prefix() -> None:
    rows = unit(_rows(300, 7) * 0.8 ** np.arange(D))
    rows = unit(rows @ np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0])
    centre, turn = rotation(rows)
    centred = centre(rows)
    assert np.allclose(turn(centred) @ turn(centred).T, centred @ centred.T, atol=1e-5)
    wanted = unit(centred)

    def kept(small: np.ndarray) -> float:
        return float(np.abs(small @ small.T - wanted @ wanted.T).mean())

    assert kept(apply_steps(smaller(rows, 8), rows)) < 0.6 * kept(unit(centred[:, :8]))
    with pytest.raises(DatasetError, match="cannot keep 33 of 32"):
        smaller(rows, 33)
    with pytest.raises(DatasetError, match="1 vectors with content"):
        rotation(rows[:1])


def test_free_embeddings_solve_what_a_width_allows_and_not_more() -> None:
    assert pairs_solved(20, 8, steps=300) == 1.0
    assert pairs_solved(20, 4, steps=50) < 1.0
    assert [critical_items(width) for width in (2, 4, 1024)] == [0, 7, 4_031_488]
