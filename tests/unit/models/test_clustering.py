"""k-means in torch clusters as well as faiss, to the same bits twice, from the start that it is given."""

import numpy as np
from numpy.typing import NDArray

from features.device import CPU
from models.semantic_id.codebook.clustering import centroids, centroids_on


def error(vectors: NDArray[np.float32], book: NDArray[np.float32]) -> float:
    return float(((vectors[:, None] - book) ** 2).sum(axis=2).min(axis=1).mean())


def test_clusters_of_torch_are_as_near_as_those_of_faiss() -> None:
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((12, 6)) * 3
    vectors = (middles[rng.integers(0, 12, 900)] + rng.standard_normal((900, 6))).astype(np.float32)
    found, again = (centroids_on(CPU, vectors, 12, iterations=10, seed=3) for _ in range(2))
    assert np.array_equal(found, again)
    assert error(vectors, found) <= 1.05 * error(vectors, centroids(vectors, 12, iterations=10, seed=3))
    kept = centroids_on(CPU, vectors, 12, iterations=0, seed=3, start=found)
    assert np.array_equal(kept, found)


def test_a_large_sample_is_drawn_and_not_all_is_clustered() -> None:
    vectors = np.zeros((600, 2), dtype=np.float32)
    vectors[:, 0] = np.arange(600)
    assert len(centroids_on(CPU, vectors, 2, iterations=2, seed=0)) == 2
