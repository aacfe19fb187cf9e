"""Reference quantizers: one vector and one code at a time, in float64; the fast quantizers are tested against them.

Shape letters: D dim, Q levels, K codes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from models.semantic_id.codebook.rqvae import RqVae


def residual_codes(vector: NDArray[np.floating], books: NDArray[np.floating]) -> list[int]:
    """Returns the codes of one vector (D,) by codebooks (Q, K, D): the nearest to each residual; lowest in a tie."""
    residual, codes = vector, []
    for book in books:
        distances = [float(((residual.astype(np.float64) - code) ** 2).sum()) for code in book.astype(np.float64)]
        codes.append(distances.index(min(distances)))
        residual = residual - book[codes[-1]]
    return codes


def rqvae_codes(model: RqVae, vector: NDArray[np.float32]) -> list[int]:
    """Returns the codes of one vector (D,): through the encoder layer by layer, then level by level."""
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    found = (vector.astype(np.float64) - state["mean"]) / state["scale"]
    layers = [name.removesuffix(".weight") for name in state if name.startswith("encoder.") and name.endswith("weight")]
    for number, name in enumerate(layers):
        found = np.array([row @ found for row in state[f"{name}.weight"]]) + state[f"{name}.bias"]
        if number < len(layers) - 1:
            found = np.maximum(found, 0)
    return residual_codes(found, state["codebooks"])


def fill(vectors: NDArray[np.float32], book: NDArray[np.float32], room: int) -> list[int]:
    """Returns the cluster of each vector.

    In each round, every vector without a cluster asks the nearest centroid with room, which accepts the nearest of
    them. Exact arithmetic gives the clusters of `residual_kmeans.fill`.
    """
    owner: list[int] = [-1] * len(vectors)
    left = [room] * len(book)
    while -1 in owner:
        asking: dict[int, list[tuple[float, int]]] = {}
        for row, place in enumerate(owner):
            if place < 0:
                open_ = [number for number, seats in enumerate(left) if seats]
                distances = [_distance(vectors[row], book[number]) for number in open_]
                nearest = open_[distances.index(min(distances))]
                asking.setdefault(nearest, []).append((_distance(vectors[row], book[nearest]), row))
        for number, rows in asking.items():
            taken = _nearest_first(rows, vectors, book[number])[: left[number]]
            left[number] -= len(taken)
            for row in taken:
                owner[row] = number
    return owner


def _nearest_first(
    rows: Sequence[tuple[float, int]], vectors: NDArray[np.float32], code: NDArray[np.float32]
) -> list[int]:
    # Without the vector's own length, as in the matrix product: |c|² - 2 x · c.
    def key(row: int) -> float:
        return float((code.astype(np.float64) ** 2).sum() - 2 * vectors[row].astype(np.float64) @ code)

    return sorted((row for _, row in rows), key=key)


def _distance(vector: NDArray[np.float32], code: NDArray[np.float32]) -> float:
    return float(((vector.astype(np.float64) - code.astype(np.float64)) ** 2).sum())
