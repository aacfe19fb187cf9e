"""The kinds of codebooks by name: fitted alike, and loaded by what a directory says it holds."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook import match, residual_kmeans, rqvae
from models.semantic_id.codebook.quantizer import DESCRIPTION, Quantizer

Kind = Literal["rqvae", "residual-kmeans", "balanced-kmeans"]
KINDS: tuple[str, ...] = get_args(Kind)
Config = TypeVar("Config", rqvae.RqVaeConfig, residual_kmeans.ResidualKMeansConfig)


def fit(
    kind: Kind,
    vectors: NDArray[np.float32],
    *,
    levels: int,
    codes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    start: Quantizer | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Quantizer:
    """Fits a codebook of Q = `levels` and K = `codes` on (N, D) float32 vectors.

    Args:
        options: other fields of the kind's configuration, as values or as text, such as `{"sinkhorn": "0.003"}`.
        start: a codebook of the same kind and shape to go on from; matching renames nothing in it.

    Raises:
        DatasetError: an unknown kind or option, another kind or shape to start from, too few vectors, NaN or infinite
            values.
    """
    shape = {"levels": levels, "codes": codes, "seed": seed}
    start = start.base if isinstance(start, match.Relabelled) else start
    if start is not None and (start.levels, start.codes) != (levels, codes):
        raise DatasetError(
            f"codebook {start.id} has {start.levels} x {start.codes} codes, the new one {levels} x {codes}: "
            "to start from it, ask for as many"
        )
    if kind == "rqvae":
        if start is not None and not isinstance(start, rqvae.RqVae):
            raise DatasetError(f"codebook {start.id}: an rqvae cannot start from it; refit with the same --quantizer")
        return rqvae.fit(vectors, _configured(rqvae.RqVaeConfig, shape, options), start=start, progress=progress)
    if kind in KINDS:
        if start is not None and not isinstance(start, residual_kmeans.ResidualKMeans):
            raise DatasetError(f"codebook {start.id}: a {kind} cannot start from it; refit with the same --quantizer")
        shape["balanced"] = kind == "balanced-kmeans"
        config = _configured(residual_kmeans.ResidualKMeansConfig, shape, options)
        return residual_kmeans.fit(vectors, config, start=None if start is None else start.books, progress=progress)
    raise DatasetError(f"quantizer: {kind!r} is unknown; there are: {', '.join(KINDS)}")


def _configured(kind: type[Config], shape: dict[str, Any], options: Mapping[str, Any] | None) -> Config:
    known = [field.name for field in fields(kind) if field.name not in shape]
    wrong = [name for name in options or () if name not in known]
    if wrong:
        raise DatasetError(f"quantizer: no option {wrong[0]!r}; there are: {', '.join(known)}")
    try:
        return msgspec.convert({**shape, **(options or {})}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise DatasetError(f"quantizer: {error}; see {kind.__name__}") from error


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
