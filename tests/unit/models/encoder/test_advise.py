"""Advice on data whose right answer is known: vectors of few true dimensions need no more."""

import numpy as np
import pytest

from features.content.encoder import unit
from features.errors import DatasetError
from models.encoder.advise import advise
from models.encoder.limit import critical_items

TRUE, D, K = 8, 48, 5


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(1_200, TRUE)) @ np.linalg.qr(rng.normal(size=(D, TRUE)))[0].T
    return unit(flat)


def test_the_true_dimensions_are_found_and_the_full_width_keeps_everything(vectors: np.ndarray) -> None:
    advice = advise(vectors, items=1_200, k=K, recall=0.95)
    assert advice.dims == TRUE
    curve = {(one.form, one.size): one for one in advice.sizes}
    assert curve["dims", D].recall == 1.0
    assert curve["bits", 8].recall < curve["bits", D].recall
    assert curve["dims", 8].critical == critical_items(8)
    assert [row["float32"] for row in advice.bytes] == [4 * D * 10**power for power in (6, 7, 8, 9)]
    assert all(row["dims"] == row["items"] * 4 * TRUE for row in advice.bytes)
    assert [row["index_int8"] for row in advice.bytes] == [(D + 4 + 2 * 6 + 8) * 10**power for power in (6, 7, 8, 9)]


def test_more_items_are_never_easier(vectors: np.ndarray) -> None:
    few, many = (advise(vectors, items=items, k=K, recall=0.95) for items in (1_200, 10**9))
    for one, other in zip(few.sizes, many.sizes, strict=True):
        assert other.expected <= one.expected
    assert (many.bits or D + 1) >= (few.bits or D + 1)


def test_wrong_arguments_are_refused(vectors: np.ndarray) -> None:
    with pytest.raises(DatasetError, match="recall in"):
        advise(vectors, items=10, k=K, recall=1.5)
    with pytest.raises(DatasetError, match="100 vectors are too few for k = 5; expected 400"):
        advise(vectors[:100], items=10, k=K, recall=0.9)
