"""Laws of residual k-means: a code depends on its vector alone, a codebook is what its file says, groups fill up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook import estimator, reference, residual_kmeans, rqvae, rqvae_fit
from models.semantic_id.codebook import kinds as codebook
from models.semantic_id.codebook.kinds import KINDS, Kind
from models.semantic_id.codebook.nearest import nearest, residual_codes
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig, fill
from models.semantic_id.report.health import relative_error

DIM = 12


def grouped(count: int, seed: int) -> NDArray[np.float32]:
    """Vectors around two dozen centres of unequal size."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(24, DIM))
    share = 1 / np.arange(1, 25)
    chosen = rng.choice(24, count, p=share / share.sum())
    return (centres[chosen] + 0.2 * rng.normal(size=(count, DIM))).astype(np.float32)


FITTED, OTHERS = grouped(600, 1), grouped(300, 2)
CONFIG = ResidualKMeansConfig(levels=3, codes=8, seed=3)
PLAIN = residual_kmeans.fit(FITTED, CONFIG)


def exact(vectors: NDArray[np.float32], books: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.array([reference.residual_codes(vector, books) for vector in vectors], dtype=np.uint16)


def test_the_fast_codes_are_those_of_the_slow_twin() -> None:
    assert np.array_equal(PLAIN.encode(OTHERS), exact(OTHERS, PLAIN.books))


@given(st.lists(st.integers(0, len(OTHERS) - 1), min_size=1, max_size=50), st.sampled_from([1, 2]))
@settings(deadline=None)
def test_a_vectors_code_does_not_depend_on_its_batch_or_on_threads(index: list[int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = PLAIN.encode(OTHERS[index])
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found, PLAIN.encode(OTHERS)[index])


def test_near_ties_are_told_apart_as_in_float64() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=(1, 64)).astype(np.float32)
    # Codes so close to one another that a float32 product cannot tell which is nearer.
    book = base + 3e-5 * rng.normal(size=(32, 64)).astype(np.float32)
    vectors = 4 * rng.normal(size=(200, 64)).astype(np.float32)
    wide = ((vectors[:, None].astype(np.float64) - book.astype(np.float64)) ** 2).sum(axis=2).argmin(axis=1)
    assert np.array_equal(nearest(vectors, book), wide)
    naive = ((book**2).sum(axis=1) - 2 * vectors @ book.T).argmin(axis=1)
    assert not np.array_equal(naive, wide)


def test_a_tie_takes_the_lowest_code() -> None:
    book = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    assert nearest(np.array([[0, 1], [0.5, 0.5]], dtype=np.float32), book).tolist() == [1, 0]


def test_no_vectors_have_no_codes() -> None:
    assert PLAIN.encode(np.zeros((0, DIM), dtype=np.float32)).shape == (0, 3)
    assert residual_codes(np.zeros((0, 4), dtype=np.float32), np.zeros((2, 3, 4), dtype=np.float32)).shape == (0, 2)


def test_every_level_halves_what_is_left_at_least_a_little() -> None:
    codes = PLAIN.encode(OTHERS)
    cut = [residual_kmeans.ResidualKMeans(PLAIN.books[:depth], CONFIG) for depth in (1, 2, 3)]
    left = [float(((OTHERS - made.decode(codes[:, : made.levels])) ** 2).sum()) for made in cut]
    assert left[0] > left[1] > left[2] > 0


def test_balanced_clusters_are_of_more_equal_size() -> None:
    def largest(balanced: bool) -> int:
        made = residual_kmeans.fit(FITTED, ResidualKMeansConfig(1, 8, balanced=balanced))
        return int(np.bincount(made.encode(FITTED)[:, 0]).max())

    assert largest(True) < 0.8 * largest(False)


@given(st.integers(1, 60), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None)
def test_filling_gives_each_a_place_and_none_more_than_its_room(count: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 3)).astype(np.float32)
    book = rng.normal(size=(clusters, 3)).astype(np.float32)
    room = -(-count // clusters)
    owner = fill(vectors, book, room)
    assert (owner >= 0).all()
    assert np.bincount(owner, minlength=clusters).max() <= room
    roomy = fill(vectors, book, count)
    assert np.array_equal(roomy, ((vectors[:, None] - book) ** 2).sum(axis=2).argmin(axis=1))


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None)
def test_filling_is_that_of_the_slow_twin(count: int, clusters: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 3)).astype(np.float32)
    book = rng.normal(size=(clusters, 3)).astype(np.float32)
    room = -(-count // clusters)
    assert fill(vectors, book, room).tolist() == reference.fill(vectors, book, room)


SMALL = rqvae.RqVaeConfig(levels=3, codes=8, latent=4, hidden=(16,), steps=300, batch=128, seed=1)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
@pytest.mark.parametrize("sinkhorn", [0.0, 0.05])
def test_an_rqvae_of_each_kind_codes_as_its_slow_twin_and_better_than_the_mean(
    gradient: rqvae.Gradient, sinkhorn: float
) -> None:
    model = rqvae_fit.fit(FITTED, replace(SMALL, gradient=gradient, sinkhorn=sinkhorn))
    codes = model.encode(OTHERS)
    assert codes.tolist() == [reference.rqvae_codes(model, vector) for vector in OTHERS]
    assert relative_error(model, OTHERS) < 0.5


def test_the_rotation_turns_the_gradient_as_it_turns_the_latent() -> None:
    rng = np.random.default_rng(0)
    latent = torch.from_numpy(rng.normal(size=(6, 4))).requires_grad_()
    quantized = torch.from_numpy(rng.normal(size=(6, 4)))
    found = estimator.rotated(latent, quantized)
    assert torch.allclose(found, quantized)
    # A gradient along the code comes back along the latent, times the ratio of their lengths (eq. 4.2).
    found.backward(quantized / quantized.norm(dim=1, keepdim=True))
    ratio = quantized.norm(dim=1, keepdim=True) / latent.norm(dim=1, keepdim=True)
    assert latent.grad is not None
    assert torch.allclose(latent.grad, (ratio * latent / latent.norm(dim=1, keepdim=True)).detach())


def test_balanced_codes_are_near_and_equally_used() -> None:
    distances = torch.from_numpy(np.random.default_rng(0).random((64, 8)))
    distances[:, 0] -= 0.6  # code 0 is nearest to most
    nearest_ = torch.bincount(distances.argmin(dim=1), minlength=8)
    codes = estimator.balanced_codes(distances, 0.01)
    counts = torch.bincount(codes, minlength=8)
    assert nearest_.max() > 40
    assert counts.max() <= 12
    assert distances.gather(1, codes[:, None]).mean() < distances.mean()


def test_training_stops_when_the_validation_error_no_longer_falls() -> None:
    seen: list[int] = []
    config = replace(SMALL, steps=4_000, learning_rate=0.05, patience=2)
    rqvae_fit.fit(FITTED, config, progress=lambda done, _: seen.append(done))
    # Progress ends at the total also where training stopped before it.
    assert seen[-1] == 4_000
    assert seen[-2] < 4_000


@pytest.mark.parametrize("kind", KINDS)
def test_a_codebook_goes_on_from_one_of_its_kind_and_from_no_other(kind: Kind) -> None:
    options = {"steps": "200", "latent": "4"} if kind == "rqvae" else {}
    first = codebook.fit(kind, FITTED, levels=2, codes=8, seed=1, options=options)
    warm = codebook.fit(kind, FITTED, levels=2, codes=8, seed=2, options=options, start=first)
    cold = codebook.fit(kind, FITTED, levels=2, codes=8, seed=2, options=options)
    before = first.encode(OTHERS)[:, 0]
    assert (warm.encode(OTHERS)[:, 0] == before).mean() > max(0.7, (cold.encode(OTHERS)[:, 0] == before).mean())
    with pytest.raises(DatasetError, match="has 2 x 8 codes, the new one 3 x 8"):
        codebook.fit(kind, FITTED, levels=3, codes=8, seed=2, start=first)
    other: Kind = "residual-kmeans" if kind == "rqvae" else "rqvae"
    with pytest.raises(DatasetError, match="cannot start from it"):
        codebook.fit(other, FITTED, levels=2, codes=8, seed=2, start=first)


def test_options_of_a_kind_are_read_from_text_and_unknown_ones_refused() -> None:
    made = codebook.fit("rqvae", FITTED, levels=1, codes=8, seed=0, options={"steps": "50", "gradient": "rotation"})
    assert isinstance(made, rqvae.RqVae)
    assert (made.config.steps, made.config.gradient) == (50, "rotation")
    with pytest.raises(DatasetError, match="no option 'sinkhorn'; there are: iterations"):
        codebook.fit("residual-kmeans", FITTED, levels=1, codes=8, seed=0, options={"sinkhorn": "1"})
    with pytest.raises(DatasetError, match="steps"):
        codebook.fit("rqvae", FITTED, levels=1, codes=8, seed=0, options={"steps": "many"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_fits_saves_and_loads_to_the_same_codes(kind: Kind, tmp_path: Path) -> None:
    made = codebook.fit(kind, FITTED, levels=2, codes=8, seed=1)
    again = codebook.fit(kind, FITTED, levels=2, codes=8, seed=1)
    assert made.id == again.id
    assert made.id.startswith(kind)
    made.save(tmp_path)
    loaded = codebook.load(tmp_path)
    assert loaded.id == made.id
    assert loaded.encode(OTHERS).tobytes() == made.encode(OTHERS).tobytes()
    assert loaded.decode(loaded.encode(OTHERS)).tobytes() == made.decode(made.encode(OTHERS)).tobytes()


def test_eight_levels_of_2048_codes_fit_and_code() -> None:
    vectors = np.random.default_rng(0).normal(size=(2_100, 8)).astype(np.float32)
    made = residual_kmeans.fit(vectors, ResidualKMeansConfig(levels=8, codes=2048, iterations=1))
    codes = made.encode(vectors)
    assert codes.shape == (2_100, 8)
    assert codes.max() > 255
    assert np.array_equal(codes[:20], exact(vectors[:20], made.books))


def test_what_cannot_be_coded_is_refused() -> None:
    broken = OTHERS.copy()
    broken[7, 3] = np.nan
    with pytest.raises(DatasetError, match="row 7 holds NaN"):
        PLAIN.encode(broken)
    with pytest.raises(DatasetError, match=r"expected \(N, 12\).*got \(300, 5\)"):
        PLAIN.encode(OTHERS[:, :5])
    with pytest.raises(DatasetError, match="8 a level need as many items, got 7"):
        residual_kmeans.fit(FITTED[:7], CONFIG)
    with pytest.raises(DatasetError, match="'hnsw' is unknown; there are: rqvae"):
        codebook.fit("hnsw", FITTED, levels=1, codes=2, seed=0)  # type: ignore[arg-type]


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        codebook.load(tmp_path)
    PLAIN.save(tmp_path)
    tensors, described = tmp_path / "codebook.safetensors", tmp_path / "codebook.json"
    whole, text = tensors.read_bytes(), described.read_text()
    tensors.write_bytes(whole[:-9])
    with pytest.raises(BundleError, match="does not hold a whole codebook"):
        codebook.load(tmp_path)
    changed = bytearray(whole)
    changed[-1] ^= 1
    tensors.write_bytes(changed)
    with pytest.raises(BundleError, match="is codebook residual-kmeans-"):
        codebook.load(tmp_path)
    described.write_text(json.dumps(json.loads(text) | {"kind": "lsh"}))
    with pytest.raises(BundleError, match="of kind 'lsh'; this release knows rqvae"):
        codebook.load(tmp_path)
    described.write_text(text[:-20])
    with pytest.raises(BundleError, match="does not hold a whole codebook"):
        codebook.load(tmp_path)
