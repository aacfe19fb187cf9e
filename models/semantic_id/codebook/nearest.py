"""Finds nearest codes at the speed of a matrix product, with the same result in any batch.

The last bits of a float32 product depend on the shape of the batch and on the number of threads. They would decide
between two codes that are nearly equally near. So the product only proposes codes. If it cannot separate two codes,
their distances are computed one by one in float64 and depend on nothing but the vector.

Shape letters: N vectors, D dim, K codes, Q levels.
"""

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK = 4_096
# Rows whose distances are computed at once, (rows, K, D) float64.
_EXACT_BLOCK = 32


def nearest(vectors: NDArray[np.float32], codebook: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the index (N,) of the code of (K, D) nearest to each of (N, D), the lowest in a tie."""
    books = torch.from_numpy(np.ascontiguousarray(codebook))
    squares = (books**2).sum(dim=1)
    longest = float(squares.max()) ** 0.5
    # Error bound of a sum of D float32 products: D · eps · |x| · |c|; twice for two codes, and doubled for safety.
    unit = 4 * (codebook.shape[1] + 2) * float(np.finfo(np.float32).eps)
    found = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), _BLOCK):
        block = torch.from_numpy(np.ascontiguousarray(vectors[start : start + _BLOCK]))
        distance = torch.addmm(squares, block, books.T, alpha=-2.0)
        best, code = distance.min(dim=1)
        # The nearest code, and every code that the product cannot separate from it.
        bound = unit * longest * (block.norm(dim=1) + longest)
        close = (distance <= (best + bound).unsqueeze(1)).sum(dim=1) > 1
        chosen = code.numpy()
        for row in np.array_split(np.flatnonzero(close.numpy()), max(1, int(close.sum()) // _EXACT_BLOCK)):
            wide = block[row].numpy().astype(np.float64)[:, None, :] - codebook.astype(np.float64)
            chosen[row] = (wide**2).sum(axis=2).argmin(axis=1)
        found[start : start + _BLOCK] = chosen
    return found


def residual_codes(vectors: NDArray[np.float32], codebooks: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Returns codes (N, Q) of vectors (N, D) by codebooks (Q, K, D): each level codes the residual of those before."""
    codes = np.zeros((len(vectors), len(codebooks)), dtype=np.uint16)
    residual = vectors
    for level, book in enumerate(codebooks):
        codes[:, level] = nearest(residual, book)
        residual = residual - book[codes[:, level]]
    return codes
