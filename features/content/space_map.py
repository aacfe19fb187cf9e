"""A map: leads the vectors of one space into another, so that an index or a codebook outlives its encoder.

A map has legs. Each leg is one step, and its result is scaled to unit length. Two maps compose by joining their legs,
so a composed map gives the bits of its parts. A map without a leg is the identity.

Shape letters: N vectors, D source dim, E target dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.content.chain import apply_steps, check_steps
from features.content.encoder import content_id, load_part
from features.content.step import VectorStep, load_step, save_steps
from features.errors import DatasetError

MapKind = Literal["none", "shift", "procrustes", "ridge", "mlp", "composed"]
Aim = Literal["codes", "gain", "both"]
AIMS: tuple[Aim, ...] = ("codes", "gain", "both")
"""Aims of a map: keep Semantic IDs, keep the gain of the new encoder, or both."""
DESCRIPTION = "map.json"
ENCODER = "encoder"
"""Directory, beside the map of an upgrade, of the new encoder with the map behind it."""


@dataclass(frozen=True)
class SpaceMap:
    """Map between two spaces.

    Attributes:
        source: Id of the space whose vectors the map reads.
        target: Id of the space whose vectors the map returns.
        kind: Way of the fit; `none` is the identity, `composed` joins maps of several kinds.
        pairs: Number of pairs that the map was fitted on; of a composed map, the fewest.
        legs: Steps; the result of each is scaled to unit length.
        fidelity: Measures on pairs that the fit did not see, by name.
        aim: Aim that the map was chosen for, or None. A map for codes restores the faults of the old space too.
    """

    source: str
    target: str
    kind: MapKind
    pairs: int
    legs: tuple[VectorStep, ...] = ()
    fidelity: Mapping[str, float] = field(default_factory=dict)
    aim: Aim | None = None

    @cached_property
    def id(self) -> str:
        """Hash of the two spaces and of the legs, `map-HASH`."""
        return content_id("map", self.source.encode(), self.target.encode(), *(leg.id.encode() for leg in self.legs))

    def of(self, vectors: NDArray[np.float32], *, space: str) -> NDArray[np.float32]:
        """Maps unit vectors (N, D) of the source to unit vectors (N, E) of the target. A zero row stays a zero row.

        Args:
            vectors: (N, D) float32.
            space: Id of the space that the vectors belong to.

        Raises:
            DatasetError: The vectors belong to another space, or have another width.
        """
        if space != self.source:
            raise DatasetError(
                f"map {self.id} reads vectors of {self.source}, got vectors of {space}; fit a map from it"
            )
        for leg in self.legs:
            vectors = apply_steps((leg,), vectors)
        return vectors

    def then(self, other: "SpaceMap") -> "SpaceMap":
        """Returns the map from this map's source to the other map's target.

        Raises:
            DatasetError: The other map reads another space than this map returns.
        """
        if other.source != self.target:
            raise DatasetError(
                f"map {other.id} reads vectors of {other.source}, but map {self.id} returns {self.target}"
            )
        if not self.legs or not other.legs:
            kept = other if not self.legs else self
            return SpaceMap(self.source, other.target, kept.kind, kept.pairs, kept.legs)
        return SpaceMap(self.source, other.target, "composed", min(self.pairs, other.pairs), self.legs + other.legs)

    def save(self, directory: Path) -> None:
        """Writes everything that `load_map` needs into an existing empty directory."""
        description = {
            "id": self.id,
            "source": self.source,
            "target": self.target,
            "kind": self.kind,
            "pairs": self.pairs,
            "fidelity": dict(self.fidelity),
            "aim": self.aim,
            "legs": save_steps(self.legs, directory),
        }
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(description))


def identity_map(space: str) -> SpaceMap:
    """Returns the map of a space to itself."""
    return SpaceMap(space, space, "none", 0)


def load_map(directory: Path) -> SpaceMap:
    """Loads a map that `SpaceMap.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """

    def read(found: dict[str, Any]) -> SpaceMap:
        legs = tuple(load_step(directory / name) for name in found["legs"])
        if legs:
            check_steps(legs, legs[0].width, of=found["source"])
        named = {name: found[name] for name in ("source", "target", "kind", "pairs", "fidelity", "aim")}
        return replace(msgspec.convert(named | {"legs": ()}, SpaceMap), legs=legs)

    return load_part(directory, DESCRIPTION, read, what="map", remedy="fit it again")
