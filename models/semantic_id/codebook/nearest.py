"""Finds nearest codes at the speed of a matrix product, with the same result in any batch.

The last bits of a float32 product depend on the shape of the batch and on the number of threads. They would decide
between two codes that are nearly equally near. So the product only proposes codes. If it cannot separate two codes, a
product in float64 proposes again. If that cannot either, their distances are computed one by one in float64 and depend
on nothing but the vector.

Shape letters: N vectors, D dim, K codes, Q levels.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import CPU, Device

_BLOCK, _BLOCK_OF_A_CARD = 4_096, 1 << 17
# Rows whose distances are computed at once, (rows, K, D) float64.
_EXACT_BLOCK = 32


def nearest(vectors: NDArray[np.float32], codebook: NDArray[np.float32], device: Device = CPU) -> NDArray[np.int64]:
    """Returns the index (N,) of the code of (K, D) nearest to each of (N, D), the lowest in a tie."""
    return residual_codes(vectors, codebook[None], device)[:, 0].astype(np.int64)


def _proposed(block: Tensor, books: Tensor, squares: Tensor, longest: float) -> tuple[Tensor, Tensor]:
    """Returns the nearest code (N,) by a product, and where (N,) another code is too near for the product to tell."""
    distance = torch.addmm(squares, block, books.T, alpha=-2.0)
    best, code = distance.min(dim=1)
    # Error bound of a sum of D products: D · eps · |x| · |c|; twice for two codes, and doubled for safety.
    unit = 4 * (books.shape[1] + 2) * torch.finfo(block.dtype).eps
    bound = unit * longest * (block.norm(dim=1) + longest)
    return code, (distance <= (best + bound).unsqueeze(1)).sum(dim=1) > 1


def residual_codes(
    vectors: NDArray[np.float32], codebooks: NDArray[np.float32], device: Device = CPU
) -> NDArray[np.uint16]:
    """Returns codes (N, Q) of vectors (N, D) by codebooks (Q, K, D): each level codes the residual of those before.

    The device computes products and differences. What they cannot separate, the processor computes, so codes are equal
    on all devices.
    """
    books = [_Book(device.put(np.ascontiguousarray(book)), book) for book in codebooks]
    codes = np.zeros((len(vectors), len(codebooks)), dtype=np.uint16)
    staging, rows = device.staging(), _BLOCK if device.is_cpu else _BLOCK_OF_A_CARD
    for start in range(0, len(vectors), rows):
        residual = staging.put_array(vectors[start : start + rows])
        for level, book in enumerate(books):
            code = book.nearest(residual)
            codes[start : start + rows, level] = code.cpu().numpy()
            if level + 1 < len(books):
                residual = residual - book.codes[code]
    return codes


class _Book:
    """Codes of one level on a device, (K, D) float32, and on the host."""

    def __init__(self, codes: Tensor, held: NDArray[np.float32]) -> None:
        self.codes = codes
        self._held = held
        self._wide = codes.double()
        self._squares, self._wide_squares = (codes**2).sum(dim=1), (self._wide**2).sum(dim=1)
        self._longest = float(self._wide_squares.max()) ** 0.5

    def nearest(self, block: Tensor) -> Tensor:
        """Returns the index (N,) of the code nearest to each vector (N, D)."""
        code, unsure = _proposed(block, self.codes, self._squares, self._longest)
        left = unsure.nonzero().squeeze(1)
        if not len(left):
            return code
        # float64 separates nearly all codes that float32 cannot, and costs as few products.
        again, unsure = _proposed(block[left].double(), self._wide, self._wide_squares, self._longest)
        code[left] = again
        left = left[unsure]
        for row in left.split(_EXACT_BLOCK):
            wide = block[row].cpu().numpy().astype(np.float64)[:, None, :] - self._held.astype(np.float64)
            code[row] = torch.from_numpy((wide**2).sum(axis=2).argmin(axis=1)).to(code.device)
        return code
