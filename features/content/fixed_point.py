"""Matrix products whose bits depend on neither the batch, nor the threads, nor the machine.

A float sum depends on its order, and the order depends on the batch and on the library. Here both factors are rounded
to whole numbers that are small enough for every partial sum to be exact in float64, so that the order decides nothing.
The rounding of a row depends on that row alone.

Shape letters: N rows, D input dim, E output dim.
"""

import numpy as np
from numpy.typing import NDArray

# A sum of D products of a row's whole numbers and the matrix's stays below 2^53.
_ROW_BITS, _EXACT_BITS = 20, 52
_BLOCK = 4_096


class FixedPoint:
    """Matrix (D, E) of whole numbers and their scale.

    The rounding error of a product is at most (max|row| + max|matrix|) · D · 2^-20, 1e-6 in practice.

    Args:
        matrix: (D, E) finite float.
    """

    def __init__(self, matrix: NDArray[np.floating]) -> None:
        wide = np.asarray(matrix, dtype=np.float64)
        largest = float(np.abs(wide).max(initial=0.0))
        bits = _EXACT_BITS - _ROW_BITS - int(np.ceil(np.log2(max(wide.shape[0], 2))))
        # A power of two: dividing by it and multiplying with it is exact.
        self._scale = float(np.ldexp(1.0, int(np.frexp(largest)[1]) - bits))
        self._whole = np.ascontiguousarray(np.rint(wide / self._scale))

    def product(self, rows: NDArray[np.floating]) -> NDArray[np.float64]:
        """Returns rows (N, D) times the matrix, (N, E) float64."""
        found = np.empty((len(rows), self._whole.shape[1]))
        for start in range(0, len(rows), _BLOCK):
            block = np.asarray(rows[start : start + _BLOCK], dtype=np.float64)
            exponents = np.frexp(np.abs(block).max(axis=1, initial=0.0))[1][:, None] - _ROW_BITS
            whole = np.rint(np.ldexp(block, -exponents))
            found[start : start + _BLOCK] = np.ldexp((whole @ self._whole) * self._scale, exponents)
        return found
