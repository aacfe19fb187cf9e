"""The decomposition in place has the bits of the slow one."""

import numpy as np
import pytest
from scipy import sparse

from features.content.svd import right_vectors, right_vectors_slowly
from features.threads import one_thread


@pytest.mark.parametrize("shape", [(2_000, 90), (400, 40), (90, 90), (91, 90), (40, 400), (3, 2), (2, 2)])
@pytest.mark.parametrize("seed", [0, 7])
def test_right_vectors_have_the_bits_of_the_slow_twin(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.random(shape) * (rng.random(shape) < 0.2)
    matrix = sparse.csr_matrix(dense)
    before = matrix.copy()
    width = max(1, min(16, min(shape) - 1))
    with one_thread():
        found = right_vectors(matrix, width, seed=seed)
        slow = right_vectors_slowly(matrix, width, seed=seed)
    assert found.shape == (width, shape[1])
    np.testing.assert_array_equal(found, slow)
    assert (matrix != before).nnz == 0


def test_right_vectors_are_those_of_the_whole_decomposition() -> None:
    rng = np.random.default_rng(1)
    factors = rng.normal(size=(300, 4)) @ np.diag([9, 5, 3, 1]) @ rng.normal(size=(4, 50))
    found = right_vectors(sparse.csr_matrix(factors), 4, seed=0)
    exact = np.linalg.svd(factors, full_matrices=False)[2][:4]
    np.testing.assert_allclose(np.abs(np.sum(found * exact, axis=1)), 1, atol=1e-6)
