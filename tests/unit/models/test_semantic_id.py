"""Semantic IDs: a codebook is decided by its seed, kept by its id, refuses what it cannot code, never collapses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook import rqvae, rqvae_fit
from models.semantic_id.codebook.quantizer import MAX_CODES, default_codes, prefix_tokens
from models.semantic_id.report.health import codebook_health, relative_error

DIM, CLUSTERS = 12, 24
CONFIG = rqvae.RqVaeConfig(levels=3, codes=8, latent=8, hidden=(32,), steps=600, batch=128, seed=3)
TINY = rqvae.RqVaeConfig(levels=2, codes=4, latent=4, hidden=(8,), steps=30, batch=32)


def clustered(count: int, seed: int) -> NDArray[np.float32]:
    """Unit vectors around the same centres for every seed: what an encoder gives for a catalogue of kinds."""
    centres = np.random.default_rng(0).normal(size=(CLUSTERS, DIM))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, CLUSTERS, count)] + 0.15 * rng.normal(size=(count, DIM))
    unit: NDArray[np.float32] = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


FITTED, HELD_OUT = clustered(600, 1), clustered(200, 2)


@pytest.fixture(scope="module")
def codebook() -> rqvae.RqVae:
    return rqvae_fit.fit(FITTED, CONFIG)


@pytest.fixture
def saved(codebook: rqvae.RqVae, tmp_path: Path) -> Path:
    directory = tmp_path / "codebook"
    directory.mkdir()
    codebook.save(directory)
    return directory


def test_the_codebook_is_decided_by_its_seed_whatever_else_drew_random_numbers() -> None:
    first = rqvae_fit.fit(FITTED, TINY)
    torch.rand(7)
    second = rqvae_fit.fit(FITTED, TINY)
    other = rqvae_fit.fit(FITTED, rqvae.RqVaeConfig(**(TINY.__dict__ | {"seed": 1})))
    assert first.id == second.id
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
    assert first.id != other.id


def test_the_number_of_threads_decides_nothing_and_is_left_as_it_was() -> None:
    alone, before = rqvae_fit.fit(FITTED, TINY), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert rqvae_fit.fit(FITTED, TINY).id == alone.id
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_fitting_leaves_the_global_random_numbers_alone(codebook: rqvae.RqVae) -> None:
    before = torch.random.get_rng_state()
    rqvae_fit.fit(FITTED[:50], TINY)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_coding_leaves_the_global_random_numbers_alone(codebook: rqvae.RqVae, saved: Path) -> None:
    before = torch.random.get_rng_state()
    codebook.decode(codebook.encode(HELD_OUT[:3]))
    rqvae.load(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_is_coded_as_one_by_one(codebook: rqvae.RqVae) -> None:
    codes = codebook.encode(HELD_OUT)
    assert codes.shape == (len(HELD_OUT), 3)
    assert codes.dtype == np.uint16
    assert codes.max() < 8
    alone = np.concatenate([codebook.encode(vector[None]) for vector in HELD_OUT])
    np.testing.assert_array_equal(codes, alone)
    np.testing.assert_array_equal(codes, codebook.encode(HELD_OUT[::-1])[::-1])
    assert codebook.encode(HELD_OUT[:0]).shape == (0, 3)


def test_levels_refine_one_another(codebook: rqvae.RqVae) -> None:
    np.testing.assert_allclose(codebook.decode(codebook.encode(HELD_OUT)), HELD_OUT, atol=0.5)
    assert len(np.unique(codebook.encode(FITTED), axis=0)) > len(np.unique(codebook.encode(FITTED)[:, :1], axis=0))


def test_clusters_are_told_apart_by_most_codes_and_held_out_items_by_a_small_error(codebook: rqvae.RqVae) -> None:
    health = codebook_health(codebook, codebook.encode(FITTED), {"fitted": FITTED, "held_out": HELD_OUT})
    assert health.collapsed == ()
    assert min(health.usage) >= 0.75
    assert health.perplexity[0] > 0.6
    assert health.unique * health.items > CLUSTERS
    assert health.error["held_out"] < 0.5
    assert health.error["fitted"] <= health.error["held_out"] * 1.1


def test_a_loaded_codebook_is_the_saved_one_bit_for_bit(codebook: rqvae.RqVae, saved: Path, tmp_path: Path) -> None:
    loaded = rqvae.load(saved)
    assert loaded.id == codebook.id
    np.testing.assert_array_equal(loaded.encode(HELD_OUT), codebook.encode(HELD_OUT))
    np.testing.assert_array_equal(loaded.decode(loaded.encode(FITTED)), codebook.decode(codebook.encode(FITTED)))
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    for name in ("codebook.json", "codebook.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def altered(directory: Path) -> None:
    data = bytearray((directory / "codebook.safetensors").read_bytes())
    data[-3] ^= 1
    (directory / "codebook.safetensors").write_bytes(data)


def truncated(directory: Path) -> None:
    data = (directory / "codebook.safetensors").read_bytes()
    (directory / "codebook.safetensors").write_bytes(data[:-100])


def without_tensors(directory: Path) -> None:
    (directory / "codebook.safetensors").unlink()


def without_description(directory: Path) -> None:
    (directory / "codebook.json").unlink()


def of_another_shape(directory: Path) -> None:
    description = json.loads((directory / "codebook.json").read_bytes())
    description["dim"] = 5
    (directory / "codebook.json").write_text(json.dumps(description))


def not_json(directory: Path) -> None:
    (directory / "codebook.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [altered, truncated, without_tensors, without_description, of_another_shape, not_json]
)
def test_a_codebook_that_is_not_what_it_was_is_refused(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(BundleError, match="codebook"):
        rqvae.load(saved)


def test_a_directory_without_a_codebook_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "nothing", ignore_errors=True)
    with pytest.raises(BundleError, match=r"codebook\.json is missing"):
        rqvae.load(tmp_path / "nothing")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused_by_row(codebook: rqvae.RqVae, value: float) -> None:
    vectors = HELD_OUT[:9].copy()
    vectors[4, 2] = value
    with pytest.raises(DatasetError, match="row 4 holds NaN or infinite"):
        codebook.encode(vectors)
    with pytest.raises(DatasetError, match="row 4 holds NaN or infinite"):
        rqvae_fit.fit(vectors, TINY)


def test_vectors_of_another_width_are_refused(codebook: rqvae.RqVae) -> None:
    with pytest.raises(DatasetError, match=rf"expected \(N, {DIM}\) .* got \(9, {DIM - 1}\)"):
        codebook.encode(HELD_OUT[:9, :-1])
    with pytest.raises(DatasetError, match=rf"expected \(N, {DIM}\) .* got \({DIM},\)"):
        codebook.encode(HELD_OUT[0])


def test_fewer_vectors_than_codes_are_refused() -> None:
    with pytest.raises(DatasetError, match="codes: 4 a level need as many items, got 3"):
        rqvae_fit.fit(FITTED[:3], TINY)


class Squares:
    """A quantizer by hand: code pairs (a, b) on four codes stand for the point (a, b)."""

    id, levels, codes = "squares-0", 2, 4

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        return np.clip(np.round(vectors), 0, 3).astype(np.uint16)

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        return codes.astype(np.float32)

    def save(self, directory: Path) -> None:
        raise NotImplementedError


def test_the_health_of_a_codebook_by_hand() -> None:
    codes = np.array([[0, 2], [0, 2], [1, 2], [1, 2]], dtype=np.uint16)
    vectors = np.array([[0.0, 0.5], [0.0, 3.0]], dtype=np.float32)
    health = codebook_health(Squares(), codes, {"some": vectors, "none": vectors[:0]})
    assert (health.items, health.levels, health.codes) == (4, 2, 4)
    assert health.usage == (0.5, 0.25)
    # Two codes half the time each are two codes' worth of evenness; one code is one.
    np.testing.assert_allclose(health.perplexity, (2 / 4, 1 / 4))
    assert health.unique == 2 / 4
    assert health.largest_group == 2
    assert health.collapsed == (2,)
    # (0, 0.5) rounds to (0, 0); the mean is (0, 1.75), each 1.25 away.
    assert health.error == {"some": pytest.approx(0.25 / (2 * 1.25**2))}


def test_a_catalogue_smaller_than_the_codebook_is_no_collapse() -> None:
    codes = np.array([[0, 1]], dtype=np.uint16)
    assert codebook_health(Squares(), codes, {}).collapsed == ()


def test_predicting_the_mean_is_an_error_of_one_and_exactness_of_none() -> None:
    assert relative_error(Squares(), np.array([[0, 3], [2, 1]], dtype=np.float32)) == 0
    apart = np.array([[-9, 1.5], [9, 1.5]], dtype=np.float32)
    assert relative_error(Squares(), apart) == pytest.approx((81 + 36 + 0.5) / 162)


CODES = st.integers(1, 4).flatmap(
    lambda levels: st.lists(
        st.lists(st.integers(0, MAX_CODES - 1), min_size=levels, max_size=levels), min_size=1, max_size=8
    )
)


@given(CODES)
def test_prefixes_of_different_depth_never_meet_and_equal_prefixes_are_equal_codes(codes: list[list[int]]) -> None:
    tokens = prefix_tokens(np.array(codes, dtype=np.uint16))
    by_token: dict[str, set[tuple[int, ...]]] = {}
    for row, prefixes in zip(codes, tokens, strict=True):
        assert len(prefixes) == len(row)
        for depth, token in enumerate(prefixes):
            by_token.setdefault(token, set()).add(tuple(row[: depth + 1]))
    assert all(len(prefixes) == 1 for prefixes in by_token.values())


@given(st.integers(0, 10**9))
def test_codes_of_a_catalogue_are_the_power_of_two_nearest_its_root_within_bounds(items: int) -> None:
    codes = default_codes(items)
    assert codes in (8, 16, 32, 64, 128, 256)
    if 8 < codes < 256:
        assert codes / 2**0.5 <= items**0.5 * (1 + 1e-9)
        assert items**0.5 <= codes * 2**0.5 * (1 + 1e-9)


@pytest.mark.parametrize(("items", "codes"), [(0, 8), (1, 8), (64, 8), (1_000, 32), (3_883, 64), (10**7, 256)])
def test_codes_of_some_catalogues(items: int, codes: int) -> None:
    assert default_codes(items) == codes
