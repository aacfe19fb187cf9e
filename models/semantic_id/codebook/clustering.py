"""k-means by faiss: the one module of the models that imports it."""

import faiss
import numpy as np
from numpy.typing import NDArray

from features.threads import fixed_threads

# The number of threads decides the bits, since sums over threads depend on it.
_THREADS = 2
_POINTS_PER_CENTROID = 256


def centroids(
    vectors: NDArray[np.float32], count: int, *, iterations: int, seed: int, start: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Clusters (N, D) float32 around `count` centroids, (count, D) float32; large N are sampled."""
    means = faiss.Kmeans(
        vectors.shape[1],
        count,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=_POINTS_PER_CENTROID,
        min_points_per_centroid=1,
    )
    with fixed_threads(_THREADS):
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(_THREADS)
        try:
            means.train(vectors, init_centroids=start)
        finally:
            faiss.omp_set_num_threads(before)
    found: NDArray[np.float32] = np.array(means.centroids, dtype=np.float32).reshape(count, -1)
    return found
