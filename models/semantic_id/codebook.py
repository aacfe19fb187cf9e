"""The kinds of codebooks by name: fitted alike, and loaded by what a directory says it holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.error import BundleError, DatasetError
from models.semantic_id import match, residual_kmeans, rqvae
from models.semantic_id.quantizer import DESCRIPTION, Quantizer

Kind = Literal["rqvae", "residual-kmeans", "balanced-kmeans"]
KINDS: tuple[str, ...] = get_args(Kind)


def fit(
    kind: Kind,
    vectors: NDArray[np.float32],
    *,
    levels: int,
    codes: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantizer:
    """Fits a codebook of Q = `levels` and K = `codes` on (N, D) float32 vectors.

    Raises:
        DatasetError: an unknown kind, too few vectors, NaN or infinite values.
    """
    if kind == "rqvae":
        return rqvae.fit(vectors, rqvae.RqVaeConfig(levels=levels, codes=codes, seed=seed), progress=progress)
    if kind in KINDS:
        config = residual_kmeans.ResidualKMeansConfig(levels, codes, balanced=kind == "balanced-kmeans", seed=seed)
        return residual_kmeans.fit(vectors, config, progress=progress)
    raise DatasetError(f"quantizer: {kind!r} is unknown; there are: {', '.join(KINDS)}")


def load(directory: Path) -> Quantizer:
    """Loads a codebook of any kind.

    Raises:
        BundleError: the directory holds none, one of an unknown kind, or one that is not whole.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold a codebook")
    try:
        kind = msgspec.json.decode(path.read_bytes())["kind"]
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise BundleError(f"{directory} does not hold a whole codebook: {error}; fetch or fit it again") from error
    if kind == match.KIND:
        return match.load(directory, load)
    if kind not in KINDS:
        raise BundleError(f"{path}: codebook of kind {kind!r}; this release knows {', '.join(KINDS)}")
    return rqvae.load(directory) if kind == "rqvae" else residual_kmeans.load(directory)
