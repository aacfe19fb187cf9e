"""The kinds of codebooks by name. All are fitted by `fit` and loaded by the kind that a directory names.

A new kind is an object with `fit` and `load`, see `QuantizerKind`, and one line: `register("name", kind)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.config import nearest
from features.device import CPU, Device
from features.errors import BundleError, DatasetError
from models.semantic_id.codebook.quantizer import DESCRIPTION, Quantizer

if TYPE_CHECKING:
    from models.semantic_id.codebook.alike import AlikePairs
    from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
    from models.semantic_id.codebook.rqvae import RqVaeConfig

Kind = Literal["rqvae", "residual-kmeans", "balanced-kmeans"]
Config = TypeVar("Config", "RqVaeConfig", "ResidualKMeansConfig")
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class CodebookShape:
    """Size and seed of a codebook that is to be fitted.

    Attributes:
        levels: Q, the number of codes in a Semantic ID.
        codes: K, the number of codes on each level.
        seed: decides everything random.
        device: device that fits; a kind that knows no devices fits on the processor.
    """

    levels: int
    codes: int
    seed: int
    device: Device = CPU


class QuantizerKind(Protocol):
    """One kind of codebook: `fit` makes one from vectors, `load` reads what its `save` wrote."""

    def fit(
        self,
        vectors: NDArray[np.float32],
        shape: CodebookShape,
        *,
        options: Mapping[str, Any],
        start: Quantizer | None,
        progress: Advance,
    ) -> Quantizer:
        """Fits a codebook on (N, D) float32 vectors.

        Args:
            vectors: (N, D) float32 content vectors.
            shape: size and seed.
            options: settings of the kind, as values or as text.
            start: a codebook to continue from, or None. Raise DatasetError if the kind cannot.
            progress: takes (steps done, steps) from time to time.
        """
        ...

    def load(self, directory: Path) -> Quantizer:
        """Loads what `save` wrote; `codebook.json` there names the kind in its field `kind`."""
        ...


class _RqVae:
    def fit(
        self,
        vectors: NDArray[np.float32],
        shape: CodebookShape,
        *,
        options: Mapping[str, Any],
        start: Quantizer | None,
        progress: Advance,
    ) -> Quantizer:
        from models.semantic_id.codebook import rqvae, rqvae_fit

        if start is not None and not isinstance(start, rqvae.RqVae):
            raise DatasetError(f"codebook {start.id}: an rqvae cannot start from it; refit with the same quantizer")
        config = _configured(rqvae.RqVaeConfig, _fixed(shape), options)
        return rqvae_fit.fit(vectors, config, start=start, progress=progress, device=shape.device)

    def load(self, directory: Path) -> Quantizer:
        from models.semantic_id.codebook import rqvae

        return rqvae.load(directory)


@dataclass(frozen=True)
class _ResidualKMeans:
    name: str
    balanced: bool

    def fit(
        self,
        vectors: NDArray[np.float32],
        shape: CodebookShape,
        *,
        options: Mapping[str, Any],
        start: Quantizer | None,
        progress: Advance,
    ) -> Quantizer:
        from models.semantic_id.codebook import residual_kmeans

        if start is not None and not isinstance(start, residual_kmeans.ResidualKMeans):
            raise DatasetError(
                f"codebook {start.id}: a {self.name} cannot start from it; refit with the same quantizer"
            )
        fixed = _fixed(shape) | {"balanced": self.balanced}
        config = _configured(residual_kmeans.ResidualKMeansConfig, fixed, options)
        begin = None if start is None else start.books
        return residual_kmeans.fit(vectors, config, start=begin, progress=progress, device=shape.device)

    def load(self, directory: Path) -> Quantizer:
        from models.semantic_id.codebook import residual_kmeans

        return residual_kmeans.load(directory)


# The modules of a kind are imported on use: they bring torch and scikit-learn along.
KINDS: dict[str, QuantizerKind] = {
    "rqvae": _RqVae(),
    "residual-kmeans": _ResidualKMeans("residual-kmeans", balanced=False),
    "balanced-kmeans": _ResidualKMeans("balanced-kmeans", balanced=True),
}


def register(name: str, kind: QuantizerKind) -> None:
    """Adds a kind of codebook under a name.

    Call it where your module is imported: every process that fits or loads such a codebook must import the module.

    Args:
        name: the value of `quantizer` in `[run]`, and of the field `kind` in the `codebook.json` that `save` writes.
        kind: see `QuantizerKind`; a module with the functions `fit` and `load` is one.

    Raises:
        DatasetError: another kind has this name.

    Example:
        `examples/own_quantizer.py` registers a quantizer and runs the contract suite on it.
    """
    if KINDS.setdefault(name, kind) is not kind:
        raise DatasetError(f"quantizer {name!r} is registered already; choose another name")


def fit(
    kind: str,
    vectors: NDArray[np.float32],
    *,
    levels: int,
    codes: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    start: Quantizer | None = None,
    progress: Advance = lambda done, total: None,
) -> Quantizer:
    """Fits a codebook of Q = `levels` and K = `codes` on (N, D) float32 vectors.

    Args:
        options: Other fields of the kind's configuration, as values or as text, such as `{"sinkhorn": "0.003"}`.
        start: Codebook of the same kind and shape to start from; matching then renames nothing in it.

    Raises:
        DatasetError: The kind or option is unknown, `start` has another kind or shape, there are too few vectors, or a
        value is NaN or infinite.
    """
    shape = CodebookShape(levels, codes, seed)
    return fit_shape(kind, vectors, shape, options=options, start=start, progress=progress)


def fit_shape(
    kind: str,
    vectors: NDArray[np.float32],
    shape: CodebookShape,
    *,
    options: Mapping[str, Any] | None = None,
    start: Quantizer | None = None,
    progress: Advance = lambda done, total: None,
) -> Quantizer:
    """Fits a codebook as `fit` does, on the device of `shape`."""
    if kind not in KINDS:
        raise DatasetError(f"quantizer: {kind!r} is unknown; there are: {', '.join(KINDS)}")
    return KINDS[kind].fit(vectors, shape, options=options or {}, start=_start(start, shape), progress=progress)


def fit_alike(
    kind: str,
    vectors: NDArray[np.float32],
    shape: CodebookShape,
    alike: "AlikePairs",
    *,
    options: Mapping[str, Any] | None = None,
    start: Quantizer | None = None,
    progress: Advance = lambda done, total: None,
) -> Quantizer:
    """Fits a codebook whose codes of alike items shall be near; it codes vectors like any other of its kind.

    Args:
        kind: `rqvae`.
        vectors: (N, D) float32 content vectors.
        shape: Size and seed.
        alike: Pairs of rows of `vectors`, and the weight of their term.
        options, start, progress: As in `fit`.

    Raises:
        DatasetError: As in `fit`, or the kind has no such term.
    """
    from models.semantic_id.codebook import rqvae, rqvae_fit

    if kind != "rqvae":
        raise DatasetError(f"code_likes: a {kind} codebook has no term for alike items; set quantizer = 'rqvae'")
    base = _start(start, shape)
    if base is not None and not isinstance(base, rqvae.RqVae):
        raise DatasetError(f"codebook {base.id}: an rqvae cannot start from it; refit with the same quantizer")
    config = _configured(rqvae.RqVaeConfig, _fixed(shape), options or {})
    return rqvae_fit.fit(vectors, config, start=base, alike=alike, progress=progress, device=shape.device)


def _start(start: Quantizer | None, shape: CodebookShape) -> Quantizer | None:
    """Returns the codebook to start from, by the names that its fit gave."""
    base = None if start is None else _without_names(start)
    if base is not None and (base.levels, base.codes) != (shape.levels, shape.codes):
        raise DatasetError(
            f"codebook {base.id} has {base.levels} x {base.codes} codes, the new one {shape.levels} x {shape.codes}: "
            "to start from it, ask for as many"
        )
    return base


def check(kind: str, options: Mapping[str, Any]) -> None:
    """Checks the names and the values of a kind's settings before anything is fitted; a registered kind checks its own.

    Raises:
        DatasetError: a setting is unknown or of another type.
    """
    fixed: dict[str, Any] = _fixed(CodebookShape(levels=1, codes=1, seed=0))
    if not options:
        return
    if kind == "rqvae":
        from models.semantic_id.codebook.rqvae import RqVaeConfig

        _configured(RqVaeConfig, fixed, options)
    elif isinstance(KINDS[kind], _ResidualKMeans):
        from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig

        _configured(ResidualKMeansConfig, fixed | {"balanced": False}, options)


def _without_names(start: Quantizer) -> Quantizer:
    from models.semantic_id.codebook import match

    return start.base if isinstance(start, match.Relabelled) else start


def _fixed(shape: CodebookShape) -> dict[str, Any]:
    return {"levels": shape.levels, "codes": shape.codes, "seed": shape.seed}


def _configured(kind: type[Config], fixed: dict[str, Any], options: Mapping[str, Any]) -> Config:
    known = [field.name for field in fields(kind) if field.name not in fixed]
    wrong = [name for name in options if name not in known]
    if wrong:
        there = f"there are: {', '.join(known)} (the nearest is {nearest(wrong[0], known)!r})"
        raise DatasetError(f"quantizer: no option {wrong[0]!r}; {there}")
    try:
        return msgspec.convert({**fixed, **options}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise DatasetError(f"quantizer: {error}; see {kind.__name__}") from error


def load(directory: Path, device: Device = CPU) -> Quantizer:
    """Loads a codebook of any kind.

    Args:
        directory: Directory that `save` wrote.
        device: Device on which a codebook with an attribute `device` encodes; other kinds stay on the processor.

    Raises:
        BundleError: The directory holds no codebook, a codebook of an unknown kind, or an incomplete codebook.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold a codebook")
    try:
        kind = msgspec.json.decode(path.read_bytes())["kind"]
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise BundleError(f"{directory} does not hold a whole codebook: {error}; fetch or fit it again") from error
    if kind in KINDS:
        found = KINDS[kind].load(directory)
        if hasattr(found, "device"):
            found.device = device
        return found
    from models.semantic_id.codebook import match

    if kind == match.KIND:
        return match.load(directory, load)
    known = ", ".join(KINDS)
    raise BundleError(f"{path}: codebook of kind {kind!r}; this release knows {known}, and kinds that you register")
