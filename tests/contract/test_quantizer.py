"""The contract of `Quantizer`, held against every kind. A kind joins by one entry in `OPTIONS`."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from features.errors import DatasetError
from models.semantic_id.codebook import kinds
from models.semantic_id.codebook.kinds import KINDS, Kind
from models.semantic_id.codebook.quantizer import Quantizer

DIM, LEVELS, CODES = 12, 3, 8

# Kind → options that make it quick to fit.
OPTIONS: dict[str, dict[str, Any]] = {
    "rqvae": {"steps": 60},
    "residual-kmeans": {},
    "balanced-kmeans": {},
}


def grouped(count: int, seed: int) -> NDArray[np.float32]:
    """Vectors (count, DIM) around two dozen centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(24, DIM))
    return (centres[rng.integers(24, size=count)] + 0.2 * rng.normal(size=(count, DIM))).astype(np.float32)


FITTED, OTHERS = grouped(600, 1), grouped(200, 2)


# Taken before a test registers a kind of its own.
BUILT_IN = set(KINDS)


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def quantizer(request: pytest.FixtureRequest) -> Quantizer:
    kind = cast(Kind, request.param)
    return kinds.fit(kind, FITTED, levels=LEVELS, codes=CODES, seed=3, options=OPTIONS[kind])


def test_every_kind_of_this_repository_joins_the_suite() -> None:
    assert set(OPTIONS) == BUILT_IN


def test_codes_have_the_stated_shape_type_and_range(quantizer: Quantizer) -> None:
    assert (quantizer.levels, quantizer.codes) == (LEVELS, CODES)
    codes = quantizer.encode(OTHERS)
    assert (codes.shape, codes.dtype) == ((len(OTHERS), LEVELS), np.uint16)
    assert codes.max() < CODES
    assert quantizer.encode(OTHERS[:0]).shape == (0, LEVELS)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_codes_of_a_vector_depend_on_the_vector_alone(quantizer: Quantizer, threads: int) -> None:
    codes = quantizer.encode(OTHERS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = np.concatenate([quantizer.encode(OTHERS[place : place + 1]) for place in range(50)])
        turned = quantizer.encode(OTHERS[::-1])[::-1]
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(alone, codes[:50])
    assert np.array_equal(turned, codes)


def test_decoded_codes_are_nearer_to_their_vector_than_the_mean_is(quantizer: Quantizer) -> None:
    found = quantizer.decode(quantizer.encode(OTHERS))
    assert (found.shape, found.dtype) == (OTHERS.shape, np.float32)
    assert ((found - OTHERS) ** 2).sum() < ((OTHERS - FITTED.mean(axis=0)) ** 2).sum()


def test_a_loaded_codebook_has_the_id_and_the_codes_of_the_saved_one(quantizer: Quantizer, tmp_path: Path) -> None:
    quantizer.save(tmp_path)
    loaded = kinds.load(tmp_path)
    assert loaded.id == quantizer.id
    assert np.array_equal(loaded.encode(OTHERS), quantizer.encode(OTHERS))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(quantizer: Quantizer, value: float) -> None:
    vectors = OTHERS[:5].copy()
    vectors[3, 1] = value
    with pytest.raises(DatasetError, match="row 3"):
        quantizer.encode(vectors)
