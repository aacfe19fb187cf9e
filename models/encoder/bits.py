"""Fits bit codes: iterative quantisation (ITQ), and the plain signs that it must beat.

Gong & Lazebnik, "Iterative quantization: a Procrustean approach to learning binary codes" (CVPR 2011).

Shape letters: N vectors, D dim, B bits.
"""

import numpy as np
from numpy.typing import NDArray

from features.content.bits import BitCode, Int8Rows, asymmetric, hamming, rerank
from features.content.step import Centre, Floats, Rotate
from features.errors import DatasetError
from features.threads import one_thread
from models.encoder.axes import principal_axes

_ITERATIONS = 50
_MOST_INDEXED = 256


def fit_itq(vectors: NDArray[np.float32], bits: int, *, space: str, seed: int = 0) -> BitCode:
    """Fits a rotation of the first principal axes after which rounding to signs loses least.

    Args:
        vectors: (N, D) float32 vectors of a catalogue; zero rows are not used.
        bits: B, a multiple of 8 from 8 to D.
        space: Id of the space that the vectors belong to.
        seed: Decides the first rotation.

    Raises:
        DatasetError: B is not such a number, or there are fewer vectors than bits.
    """
    if bits % 8 or not 8 <= bits <= vectors.shape[1]:
        raise DatasetError(f"bits: expected a multiple of 8 up to the width {vectors.shape[1]}, got {bits}")
    filled = vectors[vectors.any(axis=1)]
    if len(filled) < bits:
        raise DatasetError(f"bits: {len(filled)} vectors are fewer than {bits} bits; choose fewer bits")
    mean, axes = principal_axes(filled, bits)
    with one_thread():
        centred = (filled - mean) @ axes
        turn = np.linalg.qr(np.random.default_rng([seed, 13]).normal(size=(bits, bits)))[0]
        for _ in range(_ITERATIONS):
            left, _, right = np.linalg.svd(np.where(centred @ turn > 0, 1.0, -1.0).T @ centred)
            turn = (left @ right).T
    return BitCode(space, Centre(mean=mean), Rotate(matrix=axes @ turn))


def index_bits(width: int) -> int:
    """Returns the bits B of a code in an index of vectors of a width: a bit a dimension, 256 at most."""
    return min(width, _MOST_INDEXED) // 8 * 8


def fit_signs(vectors: NDArray[np.float32], *, space: str) -> BitCode:
    """Returns the code of the signs of the vectors' own dimensions: B = D. The control of `fit_itq`."""
    width = vectors.shape[1]
    return BitCode(space, Centre(mean=np.zeros(width)), Rotate(matrix=np.eye(width)))


def shortlist_recall(
    bits: BitCode,
    vectors: NDArray[np.float32],
    *,
    queries: NDArray[np.int64],
    k: int,
    shortlist: int,
    int8: bool = False,
) -> dict[str, float]:
    """Measures the share of the float neighbours that a shortlist by bits keeps after it is put in order.

    Args:
        bits: Code of the vectors' space.
        vectors: (N, D) float32 unit vectors, queried by each other.
        queries: Row numbers of the queries; a query does not find itself.
        k: Neighbours.
        shortlist: Items that the bits find; the best k of them are kept.
        int8: True if the shortlist is put in order by int8 vectors.

    Returns:
        Recall of `codes`, for a query that is rounded too, and of `float_query`.
    """
    codes = bits.code(vectors, space=bits.source)
    projected = bits.query(vectors[queries], space=bits.source)
    rows = Int8Rows.of(vectors) if int8 else vectors
    kept = {"codes": 0, "float_query": 0}
    for number, query in zip(queries, projected, strict=True):
        truth = _best(vectors @ vectors[number], k, number)
        for name, scores in (("codes", -hamming(codes[number], codes)), ("float_query", asymmetric(query, codes))):
            found = rerank(vectors[number], _best(scores.astype(np.float64), shortlist, number), rows, k)
            kept[name] += len(np.intersect1d(found, truth))
    return {name: hits / (k * len(queries)) for name, hits in kept.items()}


def _best(scores: NDArray[np.floating], k: int, left_out: int) -> NDArray[np.int64]:
    found: Floats = np.array(scores, dtype=np.float64)
    found[left_out] = -np.inf
    return np.argpartition(found, len(found) - k)[len(found) - k :].astype(np.int64)
