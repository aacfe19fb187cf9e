"""Residual k-means: k-means of the vectors, then of their residuals, level by level.

This is the fast path for large catalogues: no network, and about the error of residual quantizers trained jointly
(GRID, Ju et al., 2025; OneRec, Deng et al., 2025, balances the clusters). Clustering is faiss' on a processor. A GPU
clusters in torch; clusters are balanced on the processor.

Shape letters: N vectors, D dim, Q levels, K codes a level.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import scipy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.device import CPU, Device
from features.errors import BundleError, DatasetError
from models.semantic_id.codebook.clustering import centroids, centroids_on
from models.semantic_id.codebook.nearest import nearest, residual_codes
from models.semantic_id.codebook.quantizer import DESCRIPTION, TENSORS, refuse_not_finite, refuse_width

Kind = Literal["residual-kmeans", "balanced-kmeans"]
_BALANCING = 5
_WARM_ITERATIONS = 2


@dataclass(frozen=True)
class ResidualKMeansConfig:
    """Configuration of a residual k-means codebook.

    Attributes:
        levels, codes: Q and K.
        balanced: True if clusters are drawn towards equal sizes, so that every code carries as much information as
            possible.
        iterations: Iterations of k-means on each level.
    """

    levels: int = 3
    codes: int = 256
    balanced: bool = False
    iterations: int = 10
    seed: int = 0


class ResidualKMeans:
    """Frozen codebook; a `Quantizer`.

    Args:
        books: (Q, K, D) float32.
        config: Configuration the codebook was fitted with.

    Attributes:
        device: Device that proposes codes in `encode`. The codes do not depend on it.
    """

    def __init__(self, books: NDArray[np.float32], config: ResidualKMeansConfig) -> None:
        self.books = np.ascontiguousarray(books, dtype=np.float32)
        self.config = config
        self.device = CPU

    @property
    def kind(self) -> Kind:
        return "balanced-kmeans" if self.config.balanced else "residual-kmeans"

    @property
    def id(self) -> str:
        digest = hashlib.sha256(msgspec.json.encode(asdict(self.config)) + self.books.astype("<f4").tobytes())
        return f"{self.kind}-{digest.hexdigest()[:12]}"

    @property
    def levels(self) -> int:
        return int(self.books.shape[0])

    @property
    def codes(self) -> int:
        return int(self.books.shape[1])

    @property
    def dim(self) -> int:
        return int(self.books.shape[2])

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Maps (N, D) float32 to codes (N, Q) uint16.

        Raises:
            DatasetError: The vectors have a wrong width, or NaN or infinite values.
        """
        found = refuse_width(vectors, self.dim, self.id)
        refuse_not_finite(found)
        return residual_codes(found, self.books, self.device)

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Maps codes (N, Q) to the sums of their centroids, (N, D) float32."""
        index = np.asarray(codes).astype(np.int64)
        found = np.zeros((len(index), self.dim), dtype=np.float32)
        for level, book in enumerate(self.books):
            found += book[index[:, level]]
        return found

    def save(self, directory: Path) -> None:
        """Writes everything `load` needs into an existing empty directory."""
        save_file({"books": self.books}, directory / TENSORS)
        described = {"kind": self.kind, "id": self.id, "dim": self.dim, "config": asdict(self.config)}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(described))


def load(directory: Path) -> ResidualKMeans:
    """Loads a codebook that `save` wrote.

    Raises:
        BundleError: A file is missing or cut short, or the centroids do not give the id they were saved under.
    """
    try:
        description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
        config = msgspec.convert(description["config"], ResidualKMeansConfig)
        found = ResidualKMeans(load_file(directory / TENSORS)["books"], config)
    except (msgspec.DecodeError, msgspec.ValidationError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise BundleError(f"{directory} does not hold a whole codebook: {error}; fetch or fit it again") from error
    if found.id != description["id"]:
        raise BundleError(f"{directory / TENSORS}: is codebook {found.id}, expected {description['id']}")
    return found


def fit(
    vectors: NDArray[np.float32],
    config: ResidualKMeansConfig,
    *,
    start: NDArray[np.float32] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: Device = CPU,
) -> ResidualKMeans:
    """Fits a codebook to (N, D) float32 vectors.

    Args:
        start: (Q, K, D) centroids to start from, such as an older codebook's.
        progress: called with (levels done, levels).
        device: Device that clusters. A GPU gives other bits than a processor, and the same bits twice.

    Raises:
        DatasetError: There are fewer vectors than codes per level, or NaN or infinite values.
    """
    refuse_not_finite(vectors)
    if len(vectors) < config.codes:
        raise DatasetError(f"codes: {config.codes} a level need as many items, got {len(vectors)}; choose fewer codes")
    residual = np.ascontiguousarray(vectors, dtype=np.float32)
    books = np.zeros((config.levels, config.codes, residual.shape[1]), dtype=np.float32)
    for level in range(config.levels):
        begin = None if start is None else start[level]
        books[level] = _level(residual, config, seed=config.seed + level, start=begin, device=device)
        residual = residual - books[level][nearest(residual, books[level], device)]
        progress(level + 1, config.levels)
    found = ResidualKMeans(books, config)
    found.device = device
    return found


def _level(
    vectors: NDArray[np.float32],
    config: ResidualKMeansConfig,
    *,
    seed: int,
    start: NDArray[np.float32] | None,
    device: Device,
) -> NDArray[np.float32]:
    means = centroids if device.is_cpu else partial(centroids_on, device)
    if start is None:
        found = means(vectors, config.codes, iterations=config.iterations, seed=seed)
        return _balanced(vectors, found, _BALANCING) if config.balanced else found
    # Each round moves items to other codes; the first rounds gain the most.
    if config.balanced:
        return _balanced(vectors, start, 1)
    return means(vectors, config.codes, iterations=_WARM_ITERATIONS, seed=seed, start=start)


def _balanced(vectors: NDArray[np.float32], book: NDArray[np.float32], rounds: int) -> NDArray[np.float32]:
    """Moves centroids to the means of clusters of at most ceil(N / K) vectors each, a few times."""
    room = math.ceil(len(vectors) / len(book))
    for _ in range(rounds):
        owner = fill(vectors, book, room)
        count = np.bincount(owner, minlength=len(book))
        members = scipy.sparse.csr_array(
            (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(book), len(owner))
        )
        sums = members @ vectors.astype(np.float64)
        book = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], book).astype(np.float32)
    return book


def fill(vectors: NDArray[np.float32], book: NDArray[np.float32], room: int) -> NDArray[np.int64]:
    """Returns the cluster (N,) of each vector: the nearest that has room; nearer vectors choose first.

    In each round, every vector without a cluster asks the nearest centroid with room, which accepts the nearest
    vectors.
    """
    distance = (book.astype(np.float32) ** 2).sum(axis=1) - 2 * vectors @ book.T
    owner = np.full(len(vectors), -1, dtype=np.int64)
    left = np.full(len(book), room, dtype=np.int64)
    waiting = np.arange(len(vectors))
    while len(waiting):
        asked = distance[waiting].argmin(axis=1)
        order = np.lexsort((distance[waiting, asked], asked))
        waiting, asked = waiting[order], asked[order]
        starts = np.searchsorted(asked, asked)
        taken = np.arange(len(asked)) - starts < left[asked]
        owner[waiting[taken]] = asked[taken]
        left -= np.bincount(asked[taken], minlength=len(book))
        waiting = waiting[~taken]
        distance[:, left == 0] = np.inf
    return owner
