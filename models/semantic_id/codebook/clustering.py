"""k-means: by faiss on a processor, and by Lloyd's algorithm in torch on a GPU. The one module that imports faiss."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.device import Device
from features.threads import fixed_threads

# The number of threads decides the bits, since sums over threads depend on it.
_THREADS = 2
_POINTS_PER_CENTROID = 256


def centroids(
    vectors: NDArray[np.float32], count: int, *, iterations: int, seed: int, start: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Clusters (N, D) float32 around `count` centroids, (count, D) float32; large N are sampled."""
    import faiss

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


@torch.no_grad()
def centroids_on(
    device: Device,
    vectors: NDArray[np.float32],
    count: int,
    *,
    iterations: int,
    seed: int,
    start: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Clusters (N, D) float32 as `centroids` does, on a GPU; large N are sampled to as many vectors."""
    most = _POINTS_PER_CENTROID * count
    if len(vectors) > most:
        vectors = vectors[np.random.default_rng(seed).choice(len(vectors), most, replace=False)]
    begin = None if start is None else device.put(start)
    book = lloyd(device.put(vectors), count, seed, rounds=iterations, start=begin)
    found: NDArray[np.float32] = book.cpu().numpy()
    return found


def lloyd(residual: Tensor, count: int, seed: int, *, rounds: int, start: Tensor | None = None) -> Tensor:
    """Returns centroids (count, H) of residuals (N, H) on their device, by Lloyd's algorithm.

    Sums are products with a matrix of ones and zeros: sums by atomic additions would differ from run to run. An empty
    cluster keeps its centroid.

    Args:
        residual: (N, H).
        count: Number of centroids.
        seed: Seed of the start.
        rounds: Rounds of the algorithm.
        start: (count, H) centroids to start from; by default k-means++ draws them.
    """
    book = _drawn(residual, count, seed) if start is None else start
    for _ in range(rounds):
        nearest = ((book**2).sum(dim=1) - 2 * residual @ book.T).argmin(dim=1)
        owner = functional.one_hot(nearest, count).to(residual.dtype)
        sizes = owner.sum(dim=0).unsqueeze(1)
        book = torch.where(sizes > 0, owner.T @ residual / sizes.clamp(min=1), book)
    return book


def _drawn(residual: Tensor, count: int, seed: int) -> Tensor:
    """Draws centroids (count, H) of residuals (N, H) by k-means++ (Arthur & Vassilvitskii, SODA 2007)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).to(residual.device)
    own = (residual**2).sum(dim=1)
    nearest = torch.full_like(own, torch.inf)
    picked = residual[(draws[0] * len(residual)).long()]
    found = [picked]
    for number in range(1, count):
        nearest = torch.minimum(nearest, (own - 2 * residual @ picked + (picked**2).sum()).clamp(min=0))
        chances = nearest.double().cumsum(0)
        picked = residual[torch.searchsorted(chances, draws[number] * chances[-1]).clamp(max=len(residual) - 1)]
        found.append(picked)
    return torch.stack(found)
