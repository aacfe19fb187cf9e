"""A step: a pure function from vectors to vectors, such as a rotation, a tuned head or a map between two encoders.

A step treats each row by itself: a row has the same bits alone and in any batch, on any machine. The id of a step is a
hash of everything that it computes with. `features.content.chain` puts encoders and steps together.

Shape letters: N vectors, D input dim, E output dim, R rank.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.content.encoder import content_id, unit
from features.content.fixed_point import FixedPoint
from features.errors import BundleError, DatasetError

Floats = NDArray[np.float64]
DESCRIPTION, TENSORS = "step.json", "step.safetensors"


class VectorStep(ABC):
    """VectorStep of one kind, defined by named tensors.

    Attributes:
        kind: Name of the kind.
        names: Names of the tensors.

    Args:
        tensors: float tensors by name; kept as float32.

    Raises:
        DatasetError: A tensor is missing, holds a value that is not finite, or has a shape that does not fit.
    """

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, **tensors: NDArray[np.floating]) -> None:
        if tuple(sorted(tensors)) != tuple(sorted(self.names)):
            raise DatasetError(f"step {self.kind}: expected tensors {', '.join(self.names)}, got {', '.join(tensors)}")
        self.tensors = {name: np.ascontiguousarray(tensors[name], dtype=np.float32) for name in self.names}
        for name, tensor in self.tensors.items():
            if not np.isfinite(tensor).all():
                raise DatasetError(f"step {self.kind}: tensor {name} holds a value that is not finite; fit it again")

    @property
    @abstractmethod
    def width(self) -> int:
        """D, the width of a vector that the step reads."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """E, the width of a vector that the step returns."""

    @cached_property
    def id(self) -> str:
        """Kind and hash, `KIND-HASH`."""
        parts = [f"{name} {tensor.shape}".encode() + tensor.tobytes() for name, tensor in self.tensors.items()]
        return content_id(self.kind, *parts)

    def __call__(self, vectors: NDArray[np.floating]) -> Floats:
        """Maps vectors (N, D) to (N, E) float64, each row by itself.

        Raises:
            DatasetError: The vectors have another width.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise DatasetError(
                f"step {self.id} reads vectors of width {self.width}, got shape {vectors.shape}; "
                "it was fitted on the vectors of another encoder"
            )
        return self._apply(np.asarray(vectors, dtype=np.float64))

    @abstractmethod
    def _apply(self, vectors: Floats) -> Floats: ...

    def save(self, directory: Path) -> None:
        """Writes everything that `load_step` needs into an existing empty directory."""
        save_file(self.tensors, directory / TENSORS)
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode({"kind": self.kind, "id": self.id}))


class Centre(VectorStep):
    """Subtracts `mean` (D,)."""

    kind, names = "centre", ("mean",)

    @property
    def width(self) -> int:
        return len(self.tensors["mean"])

    dim = width

    def _apply(self, vectors: Floats) -> Floats:
        return vectors - self.tensors["mean"]


class _ByMatrix(VectorStep):
    """Step whose main part is a product with `matrix` (D, E)."""

    @property
    def width(self) -> int:
        return int(self.tensors["matrix"].shape[0])

    @property
    def dim(self) -> int:
        return int(self.tensors["matrix"].shape[1])

    @cached_property
    def _matrix(self) -> FixedPoint:
        return FixedPoint(self.tensors["matrix"])


class Linear(_ByMatrix):
    """Multiplies by `matrix` (D, E): a tuned head, or any other linear function."""

    kind, names = "linear", ("matrix",)

    def _apply(self, vectors: Floats) -> Floats:
        return self._matrix.product(vectors)


class Rotate(Linear):
    """Multiplies by `matrix` (D, E) of orthonormal columns, such as principal axes; the first columns matter most."""

    kind = "rotate"


class Cut(VectorStep):
    """Keeps the first E = `dim` values of D = `width`."""

    kind, names = "cut", ("shape",)

    @classmethod
    def to(cls, dim: int, *, width: int) -> "Cut":
        """Returns the step from `width` to `dim` values.

        Raises:
            DatasetError: `dim` is not between 1 and `width`.
        """
        if not 1 <= dim <= width:
            raise DatasetError(f"step cut: cannot keep {dim} of {width} values; choose 1 to {width}")
        return cls(shape=np.array([width, dim], dtype=np.float32))

    @property
    def width(self) -> int:
        return int(self.tensors["shape"][0])

    @property
    def dim(self) -> int:
        return int(self.tensors["shape"][1])

    def _apply(self, vectors: Floats) -> Floats:
        return vectors[:, : self.dim]


class Unit(VectorStep):
    """Scales rows to unit length, as a chain does behind its last step. A zero row stays a zero row."""

    kind, names = "unit", ("shape",)

    @classmethod
    def of_width(cls, width: int) -> "Unit":
        """Returns the step for vectors of a width."""
        return cls(shape=np.array([width], dtype=np.float32))

    @property
    def width(self) -> int:
        return int(self.tensors["shape"][0])

    dim = width

    def _apply(self, vectors: Floats) -> Floats:
        return unit(vectors).astype(np.float64)


class LowRank(VectorStep):
    """Adds a correction of rank R to the identity: x + (x · `left` (D, R)) · `right` (R, D)."""

    kind, names = "low-rank", ("left", "right")

    @property
    def width(self) -> int:
        return int(self.tensors["left"].shape[0])

    dim = width

    @cached_property
    def _sides(self) -> tuple[FixedPoint, FixedPoint]:
        return FixedPoint(self.tensors["left"]), FixedPoint(self.tensors["right"])

    def _apply(self, vectors: Floats) -> Floats:
        left, right = self._sides
        return vectors + right.product(left.product(vectors))


class Affine(_ByMatrix):
    """Multiplies by `matrix` (D, E) after `source` (D,) is subtracted, and adds `target` (E,): a map between spaces."""

    kind, names = "affine", ("matrix", "source", "target")

    def _apply(self, vectors: Floats) -> Floats:
        return self._matrix.product(vectors - self.tensors["source"]) + self.tensors["target"]


class Shift(VectorStep):
    """Adds `offset` (D,): the map that knows only the two means.

    "Query drift compensation" (2025); see docs/concepts/spaces.md.
    """

    kind, names = "shift", ("offset",)

    @property
    def width(self) -> int:
        return len(self.tensors["offset"])

    dim = width

    def _apply(self, vectors: Floats) -> Floats:
        return vectors + self.tensors["offset"]


class Mlp(VectorStep):
    """Maps by one hidden layer: relu(x · `first` (D, H) + `bias` (H,)) · `second` (H, E) + `target` (E,)."""

    kind, names = "mlp", ("first", "bias", "second", "target")

    @property
    def width(self) -> int:
        return int(self.tensors["first"].shape[0])

    @property
    def dim(self) -> int:
        return int(self.tensors["second"].shape[1])

    @cached_property
    def _layers(self) -> tuple[FixedPoint, FixedPoint]:
        return FixedPoint(self.tensors["first"]), FixedPoint(self.tensors["second"])

    def _apply(self, vectors: Floats) -> Floats:
        first, second = self._layers
        hidden = np.maximum(first.product(vectors) + self.tensors["bias"], 0.0)
        return second.product(hidden) + self.tensors["target"]


class Erase(VectorStep):
    """Removes a subspace: x - ((x - `mean` (D,)) · `left` (D, R)) · `right` (R, D), where a gate allows it.

    The gate is a logistic probe: a row is changed where x · `probe` (D,) + `bias` > 0. A zero probe with a positive
    bias changes every row. Belrose et al., "Perfect linear concept erasure in closed form" (2023); the gate: Yoon et
    al., "SAFREE" (2024).
    """

    kind, names = "erase", ("mean", "left", "right", "probe", "bias")

    @property
    def width(self) -> int:
        return len(self.tensors["mean"])

    dim = width

    @cached_property
    def _sides(self) -> tuple[FixedPoint, FixedPoint, FixedPoint]:
        return (
            FixedPoint(self.tensors["left"]),
            FixedPoint(self.tensors["right"]),
            FixedPoint(self.tensors["probe"][:, None]),
        )

    def _apply(self, vectors: Floats) -> Floats:
        left, right, probe = self._sides
        removed = right.product(left.product(vectors - self.tensors["mean"]))
        open_gate = probe.product(vectors)[:, 0] + self.tensors["bias"][0] > 0
        return np.where(open_gate[:, None], vectors - removed, vectors)


KINDS: dict[str, type[VectorStep]] = {
    step.kind: step for step in (Centre, Linear, Rotate, Cut, Unit, LowRank, Affine, Shift, Mlp, Erase)
}


def load_step(directory: Path) -> VectorStep:
    """Loads a step that `VectorStep.save` wrote.

    Raises:
        BundleError: A file is missing or damaged, or this release does not know the kind.
    """
    try:
        description: Mapping[str, Any] = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
        kind = description["kind"]
        if kind not in KINDS:
            raise BundleError(f"{directory}: step of kind {kind!r}, this release knows {', '.join(KINDS)}; update it")
        step = KINDS[kind](**load_file(directory / TENSORS))
    except (OSError, KeyError, TypeError, msgspec.DecodeError, SafetensorError, DatasetError) as error:
        raise BundleError(f"{directory}: holds no step that can be read ({error}); fit it again") from error
    if step.id != description.get("id"):
        raise BundleError(f"{directory}: holds step {step.id}, expected {description.get('id')}; fit it again")
    return step


def save_steps(steps: Sequence[VectorStep], directory: Path) -> list[str]:
    """Writes steps into directories of their own, `step-0` and so on. Returns the names in order."""
    names = [f"step-{number}" for number in range(len(steps))]
    for name, step in zip(names, steps, strict=True):
        (directory / name).mkdir()
        step.save(directory / name)
    return names
