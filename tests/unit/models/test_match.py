"""A retrained codebook keeps the names of its codes where the items do, and stays a function of the vector."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook import kinds as codebook
from models.semantic_id.codebook import residual_kmeans, rqvae, rqvae_fit
from models.semantic_id.codebook.match import match
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
from models.semantic_id.report.compare import compare, pairs_kept

RNG = np.random.default_rng(0)
CENTRES = RNG.normal(size=(16, 8))
VECTORS = (CENTRES[RNG.integers(0, 16, 500)] + 0.3 * RNG.normal(size=(500, 8))).astype(np.float32)
CONFIG = ResidualKMeansConfig(levels=3, codes=8)
OLD = residual_kmeans.fit(VECTORS[:400], CONFIG)
NEW = residual_kmeans.fit(VECTORS, replace(CONFIG, seed=7))


def renamed(codes: NDArray[np.uint16], seed: int) -> NDArray[np.uint16]:
    """The same clusters under other names: a permutation of the codes for each node, as a retraining gives them."""
    rng = np.random.default_rng(seed)
    names: dict[tuple[int, ...], NDArray[np.int64]] = {}
    found = codes.copy()
    for row, code in enumerate(codes.tolist()):
        for depth in range(len(code)):
            node = tuple(code[:depth])
            found[row, depth] = names.setdefault(node, rng.permutation(8))[code[depth]]
    return found


def test_codes_that_only_changed_their_names_get_all_of_them_back() -> None:
    codes = NEW.encode(VECTORS)
    old = renamed(codes, 1)
    matched = match(NEW, codes, old)
    assert np.array_equal(matched.encode(VECTORS), old)
    assert compare(old, codes).unchanged[0] < 0.5
    assert compare(old, codes).rand == pytest.approx((1.0, 1.0, 1.0))


def test_matching_keeps_more_items_than_the_names_of_chance_and_no_fewer_pairs() -> None:
    old, codes = OLD.encode(VECTORS), NEW.encode(VECTORS)
    before, after = compare(old, codes), compare(old, match(NEW, codes, old).encode(VECTORS))
    assert after.unchanged[0] > before.unchanged[0] + 0.2
    assert all(one >= other for one, other in zip(after.unchanged, before.unchanged, strict=True))
    assert after.rand == pytest.approx(before.rand)
    assert after.pairs_kept == before.pairs_kept


def test_no_two_codes_get_one_name_and_names_can_be_undone() -> None:
    matched = match(NEW, NEW.encode(VECTORS[:200]), OLD.encode(VECTORS[:200]))
    # Every code there is, those under nodes that matching never saw included.
    every = np.array(np.meshgrid(*[range(8)] * 3)).reshape(3, -1).T.astype(np.uint16)
    names = matched.rename(every)
    assert len(np.unique(names, axis=0)) == 8**3
    assert np.array_equal(matched.decode(names), NEW.decode(every))


def test_a_vectors_name_does_not_depend_on_its_batch() -> None:
    matched = match(NEW, NEW.encode(VECTORS), OLD.encode(VECTORS))
    whole = matched.encode(VECTORS)
    assert all(np.array_equal(matched.encode(VECTORS[row : row + 1])[0], whole[row]) for row in range(0, 500, 29))


def test_a_matched_codebook_is_saved_and_loaded(tmp_path: Path) -> None:
    matched = match(NEW, NEW.encode(VECTORS), OLD.encode(VECTORS))
    matched.save(tmp_path)
    loaded = codebook.load(tmp_path)
    assert loaded.id == matched.id != NEW.id
    assert loaded.encode(VECTORS).tobytes() == matched.encode(VECTORS).tobytes()
    names = tmp_path / "names.safetensors"
    data = bytearray(names.read_bytes())
    data[-1] ^= 1
    names.write_bytes(data)
    with pytest.raises(BundleError, match="is codebook residual-kmeans-"):
        codebook.load(tmp_path)
    names.write_bytes(data[:40])
    with pytest.raises(BundleError, match="does not hold a whole codebook"):
        codebook.load(tmp_path)


def test_codes_of_other_shapes_are_not_matched() -> None:
    codes = NEW.encode(VECTORS)
    for old in (codes[:10], codes[:, :2], codes + np.uint16(8)):
        with pytest.raises(DatasetError, match="3 x 8"):
            match(NEW, codes, old)


@pytest.mark.parametrize("kind", ["residual-kmeans", "rqvae"])
def test_a_warm_start_keeps_more_pairs_than_a_cold_one(kind: str) -> None:
    def fit(seed: int, vectors: NDArray[np.float32], start: object = None) -> NDArray[np.uint16]:
        if kind == "rqvae":
            config = rqvae.RqVaeConfig(levels=2, codes=8, latent=4, hidden=(16,), steps=200, batch=64, seed=seed)
            first = rqvae_fit.fit(VECTORS[:400], config)
            return (rqvae_fit.fit(vectors, config, start=first) if start else rqvae_fit.fit(vectors, config)).encode(
                VECTORS
            )
        shape = ResidualKMeansConfig(levels=2, codes=8, seed=seed)
        begin = residual_kmeans.fit(VECTORS[:400], shape).books if start else None
        return residual_kmeans.fit(vectors, shape, start=begin).encode(VECTORS)

    old = fit(3, VECTORS[:400])
    warm, cold = fit(3, VECTORS, start=True), fit(9, VECTORS)
    assert compare(old, warm).pairs_kept > compare(old, cold).pairs_kept


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_pairs_are_counted_as_by_hand(clusters: list[tuple[int, int]]) -> None:
    before, after = np.array(clusters).T
    pairs = [(i, j) for i in range(len(before)) for j in range(i) if before[i] == before[j]]
    still = [pair for pair in pairs if after[pair[0]] == after[pair[1]]]
    assert pairs_kept(before, after) == (len(still) / len(pairs) if pairs else 1.0)


def test_a_comparison_counts_prefixes_and_not_codes_that_happen_to_agree() -> None:
    before = np.array([[0, 1], [0, 1], [2, 1]], dtype=np.uint16)
    after = np.array([[0, 1], [0, 2], [3, 1]], dtype=np.uint16)
    found = compare(before, after)
    assert found.unchanged == pytest.approx((2 / 3, 1 / 3))
    assert found.pairs_kept == 1.0
    with pytest.raises(DatasetError, match="same items"):
        compare(before, after[:2])
