"""A chain: encoders side by side, and steps behind them. A chain is an encoder itself.

    texts ─▶ base ⊕ base … ─▶ step ─▶ step … ─▶ unit vector

A space is what one chain computes; its id is the chain's id. A view is a named chain of steps on the vectors of a base
space: a text is encoded once, and each view is computed from the base vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.content.content import fields_of
from features.content.encoder import DESCRIPTION, Encoder, content_id, load_part, unit
from features.content.given.encoder import GivenVectors, given_in
from features.content.step import VectorStep, load_step, save_steps
from features.device import CPU, Device
from features.errors import BundleError, DatasetError

BASE = "base"
"""Name of the view that has no step: the vectors that codebook and ranker read."""

SIMILAR = "similar"
"""Name of the view that is tuned on items liked by the same users; it answers `nearest to an item`."""


class Chain:
    """Encoder of bases and steps.

    The vectors of the bases are joined, each base with the same weight, the steps follow, and the result is scaled to
    unit length. A text that is a zero row to every base is a zero row of the chain.

    Args:
        bases: One encoder or more.
        steps: Steps; the first reads the sum of the bases' widths, each other step what the step before returns.

    Raises:
        DatasetError: No base is given, or a step does not fit what stands before it.
    """

    def __init__(self, bases: Sequence[Encoder], steps: Sequence[VectorStep] = ()) -> None:
        if not bases:
            raise DatasetError("a chain of encoders needs one base at least")
        self.bases, self.steps = tuple(bases), tuple(steps)
        self._device = CPU
        check_steps(self.steps, sum(base.dim for base in bases), of=", ".join(base.id for base in bases))

    @cached_property
    def id(self) -> str:
        return content_id(
            "chain", *(base.id.encode() for base in self.bases), *(step.id.encode() for step in self.steps)
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the bases read; empty if all read whole texts."""
        return tuple(dict.fromkeys(name for base in self.bases for name in fields_of(base)))

    @property
    def given(self) -> tuple[GivenVectors, ...]:
        """Bases that read vectors of the items; empty if all read texts."""
        return tuple(one for base in self.bases for one in given_in(base))

    @property
    def dim(self) -> int:
        return self.steps[-1].dim if self.steps else sum(base.dim for base in self.bases)

    @property
    def device(self) -> Device:
        """Device of the bases that can compute on one; set it once."""
        return self._device

    @device.setter
    def device(self, device: Device) -> None:
        self._device = device
        for base in self.bases:
            if hasattr(base, "device"):
                base.device = device

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        joined = np.concatenate([base.encode(texts) for base in self.bases], axis=1)
        return apply_steps(self.steps, unit(joined))

    def save(self, directory: Path) -> None:
        names = [f"base-{number}" for number in range(len(self.bases))]
        for name, base in zip(names, self.bases, strict=True):
            (directory / name).mkdir()
            base.save(directory / name)
        steps = save_steps(self.steps, directory)
        description = {"kind": "chain", "id": self.id, "bases": names, "steps": steps}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(description))


def load_chain(directory: Path, load_base: Callable[[Path], Encoder]) -> Chain:
    """Loads a chain that `Chain.save` wrote; `load_base` loads an encoder from its directory."""
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    bases = [load_base(directory / name) for name in description["bases"]]
    chain = Chain(bases, [load_step(directory / name) for name in description["steps"]])
    if chain.id != description["id"]:
        raise BundleError(f"{directory}: holds encoder {chain.id}, expected {description['id']}; fetch or fit it again")
    return chain


def apply_steps(steps: Sequence[VectorStep], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Maps unit vectors (N, D) through steps to unit vectors (N, E). A zero row stays a zero row."""
    if not steps:
        return vectors
    found: NDArray[np.floating] = vectors
    for step in steps:
        found = step(found)
    mapped = unit(found)
    mapped[~np.any(vectors, axis=1)] = 0.0
    return mapped


def check_steps(steps: Sequence[VectorStep], width: int, *, of: str) -> None:
    """Raises DatasetError if a step does not read what stands before it; the first reads vectors of `width`."""
    for step in steps:
        if step.width != width:
            raise DatasetError(f"step {step.id} reads vectors of width {step.width}, but {of} gives {width}")
        width, of = step.dim, f"step {step.id}"


@dataclass(frozen=True)
class View:
    """A named chain of steps on the vectors of a base space.

    Attributes:
        name: Name of the view; `base` is the view without a step.
        source: Id of the encoder whose vectors the steps read.
        steps: The steps, possibly none.
    """

    name: str
    source: str
    steps: tuple[VectorStep, ...] = ()

    @cached_property
    def id(self) -> str:
        """Id of the view's space. Vectors of two spaces must never be compared."""
        return content_id("view", self.source.encode(), *(step.id.encode() for step in self.steps))

    def of(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the view of base vectors (N, D): unit vectors (N, E) float32."""
        return apply_steps(self.steps, vectors)

    def save(self, directory: Path) -> None:
        """Writes everything that `load_view` needs into an existing empty directory."""
        steps = save_steps(self.steps, directory)
        description = {"name": self.name, "id": self.id, "source": self.source, "steps": steps}
        (directory / "view.json").write_bytes(msgspec.json.encode(description))


def load_view(directory: Path) -> View:
    """Loads a view that `View.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """
    return load_part(
        directory,
        "view.json",
        lambda found: View(
            found["name"], found["source"], tuple(load_step(directory / name) for name in found["steps"])
        ),
        what="view",
        remedy="fit it again",
    )
