"""Randomised SVD of a large sparse matrix, in place.

scikit-learn's function gives the same bits, keeps the left vectors that no caller here wants, and holds four arrays of
N rows at its peak. This module holds two. A catalogue's fit is bounded by them.
Halko, Martinsson & Tropp, "Finding structure with randomness" (2011), algorithms 4.4 and 5.1.

Shape letters: N texts, T terms, D singular directions.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse
from sklearn.utils.extmath import randomized_svd

_OVERSAMPLES, _ITERATIONS = 10, 5


def right_vectors(matrix: sparse.csr_matrix, width: int, *, seed: int) -> NDArray[np.float64]:
    """Returns the D = `width` first right singular vectors (D, T) of a matrix (N, T) float64; signs are arbitrary."""
    rows, terms = matrix.shape
    if rows < terms:
        # A wide matrix is small: the vocabulary is bounded.
        return right_vectors_slowly(matrix, width, seed=seed)
    basis = np.random.RandomState(seed).normal(size=(terms, width + _OVERSAMPLES))
    for _ in range(_ITERATIONS):
        basis = _triangular(matrix @ basis)
        basis = _triangular(matrix.T @ basis)
    # LAPACK wants columns to lie together, and would make that copy beside the array.
    wide = np.asfortranarray(matrix @ basis)
    basis = linalg.qr(wide, mode="economic", overwrite_a=True, check_finite=False)[0]
    found: NDArray[np.float64] = linalg.svd(basis.T @ matrix, full_matrices=False)[2][:width]
    return found


def right_vectors_slowly(matrix: sparse.csr_matrix, width: int, *, seed: int) -> NDArray[np.float64]:
    """Returns the same as `right_vectors`, by scikit-learn."""
    found: NDArray[np.float64] = randomized_svd(
        matrix, width, n_oversamples=_OVERSAMPLES, n_iter=_ITERATIONS, flip_sign=False, random_state=seed
    )[2]
    return found


def _triangular(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the permuted lower triangle of an LU decomposition, in the place of the array."""
    found: NDArray[np.float64] = linalg.lu(array, permute_l=True, overwrite_a=True, check_finite=False)[0]
    return found
