"""Concepts: named shares of an item's vector, such as the genres of a film, each a calibrated probability.

A head of concepts is fitted on a declared column, on a glossary, or on a few examples. Its shares are predictions. A
declared value counts more: see `docs/guides/encoders.md`.

Shape letters: N vectors, D dim, C concepts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.special import expit

from features.content.encoder import content_id, load_part, unit
from features.content.fixed_point import FixedPoint
from features.errors import DatasetError

Floats = NDArray[np.float32]
_DESCRIPTION, _TENSORS = "concepts.json", "concepts.safetensors"
_SHAPES = ("weight", "bias", "direction", "floor", "threshold")


class Probe(NamedTuple):
    """Logistic probe of one concept: the concept is present where x · `weight` (D,) + `bias` > 0."""

    weight: Floats
    bias: float


@dataclass(frozen=True)
class Concept:
    """Origin of one concept.

    Attributes:
        name: Name of the concept.
        column: Column that declares the concept; "" if no column does.
        examples: Number of items and texts that the concept was fitted on.
        auc: Area under the ROC curve on items that the fit did not read; None if it was not measured.
    """

    name: str
    column: str = ""
    examples: int = 0
    auc: float | None = None


@dataclass(frozen=True)
class ConceptHead:
    """Shares of concepts in the vectors of one space.

    Attributes:
        source: Id of the encoder whose vectors the head reads.
        concepts: C concepts.
        tensors: weight (C, D) and bias (C,) of the logistic shares; direction (C, D) unit vectors from the other items
            to the carriers; floor (C,) the usual cosine of the other items to the direction; threshold (C,) share
            from which a filter counts an item as a carrier.

    Raises:
        DatasetError: A concept is named twice, or a tensor does not fit.
    """

    source: str
    concepts: tuple[Concept, ...]
    tensors: Mapping[str, Floats]

    def __post_init__(self) -> None:
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise DatasetError(f"concept {repeated[0]!r} is named twice; rename one of them")
        if set(self.tensors) != set(_SHAPES):
            raise DatasetError(f"concepts: expected tensors {', '.join(_SHAPES)}, got {', '.join(self.tensors)}")
        for name, tensor in self.tensors.items():
            shape = (len(self.concepts), self.width) if name in ("weight", "direction") else (len(self.concepts),)
            if tensor.shape != shape or not np.isfinite(tensor).all():
                raise DatasetError(f"concepts: tensor {name} must be finite and of shape {shape}; fit the head again")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the concepts, in the order of the shares."""
        return tuple(concept.name for concept in self.concepts)

    @property
    def width(self) -> int:
        """D, the width of a vector that the head reads."""
        return int(self.tensors["weight"].shape[-1])

    @cached_property
    def id(self) -> str:
        """Hash of everything that the head computes with."""
        parts = [self.tensors[name].tobytes() for name in _SHAPES]
        return content_id("concepts", self.source.encode(), "\n".join(self.names).encode(), *parts)

    @cached_property
    def _weight(self) -> FixedPoint:
        return FixedPoint(self.tensors["weight"].T)

    def weigh(self, vectors: Floats) -> Floats:
        """Returns the share of each concept in vectors (N, D): (N, C) float32 in [0, 1].

        A row has the same bits in any batch. A zero row, an item without content, has no share of anything.

        Raises:
            DatasetError: The vectors have another width.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.width:
            raise DatasetError(
                f"concepts read vectors of width {self.width}, got shape {vectors.shape}; "
                "they were fitted on the vectors of another encoder"
            )
        shares: Floats = expit(self._weight.product(vectors) + self.tensors["bias"]).astype(np.float32)
        shares[~np.any(vectors, axis=1)] = 0.0
        return shares

    def carries(self, vectors: Floats) -> NDArray[np.bool_]:
        """Returns the predicted carriers of each concept among vectors (N, D), (N, C), by the filter's thresholds."""
        predicted: NDArray[np.bool_] = self.weigh(vectors) >= np.maximum(self.tensors["threshold"], np.float32(1e-6))
        return predicted

    def shared(self, first: Floats, second: Floats, count: int = 3) -> list[tuple[str, float]]:
        """Returns the concepts that two vectors (D,) share most, each with the probability that both carry it."""
        one, other = self.weigh(np.stack([first, second]))
        both = one.astype(np.float64) * other
        return [(self.names[row], float(both[row])) for row in np.argsort(-both, kind="stable")[:count]]

    def probe(self, name: str) -> Probe:
        """Returns the logistic probe of a concept, for the gate of a step that erases."""
        row = self.row(name)
        return Probe(self.tensors["weight"][row], float(self.tensors["bias"][row]))

    def row(self, name: str) -> int:
        """Returns the column of a concept's shares.

        Raises:
            DatasetError: The head has no such concept.
        """
        if name not in self.names:
            raise DatasetError(f"concept {name!r} is unknown; choose of {', '.join(self.names) or 'none'}")
        return self.names.index(name)

    def save(self, directory: Path) -> None:
        """Writes everything that `load_concepts` needs into an existing empty directory."""
        save_file({name: np.ascontiguousarray(self.tensors[name]) for name in _SHAPES}, directory / _TENSORS)
        description = {"id": self.id, "source": self.source, "concepts": self.concepts}
        (directory / _DESCRIPTION).write_bytes(msgspec.json.encode(description))


def load_concepts(directory: Path) -> ConceptHead:
    """Loads a head that `ConceptHead.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """

    def read(found: dict[str, Any]) -> ConceptHead:
        concepts = msgspec.convert(found["concepts"], tuple[Concept, ...])
        return ConceptHead(found["source"], concepts, load_file(directory / _TENSORS))

    return load_part(directory, _DESCRIPTION, read, what="concepts", remedy="fit the concepts again")


def join(heads: Sequence[ConceptHead]) -> ConceptHead:
    """Returns one head of the concepts of several heads.

    Raises:
        DatasetError: No head is given, two heads read different encoders, or both have a concept of one name.
    """
    if not heads:
        raise DatasetError("concepts: no head is given; fit one first")
    if len({head.source for head in heads}) > 1:
        sources = ", ".join(dict.fromkeys(head.source for head in heads))
        raise DatasetError(f"concepts read the vectors of different encoders ({sources}); fit them again on one")
    tensors = {name: np.concatenate([head.tensors[name] for head in heads]) for name in _SHAPES}
    return ConceptHead(heads[0].source, tuple(one for head in heads for one in head.concepts), tensors)


def steer(head: ConceptHead, query: Floats, avoided: Sequence[str], strength: float = 1.0) -> Floats:
    """Returns a query that steers away from concepts.

    The query's share along a concept's direction is lowered to the share that an item without the concept usually has.
    A query that has less keeps its share. Items with the concept are found less, not excluded: see `without`.

    Args:
        head: Concepts of the query's space.
        query: (D,) unit vector.
        avoided: Names of concepts.
        strength: 1 lowers to the usual share, 0 changes nothing, more pushes further.

    Returns:
        (D,) unit vector.

    Raises:
        DatasetError: A concept is unknown, or the query has another width.
    """
    if query.shape != (head.width,):
        raise DatasetError(f"concepts read vectors of width {head.width}, got shape {query.shape}")
    steered = query.astype(np.float64)
    for name in avoided:
        row = head.row(name)
        direction = head.tensors["direction"][row].astype(np.float64)
        excess = max(float(steered @ direction) - float(head.tensors["floor"][row]), 0.0)
        steered = steered - strength * excess * direction
    result: Floats = unit(steered[None])[0]
    return result


def described(head: ConceptHead) -> list[dict[str, Any]]:
    """Returns a row for each concept: name, origin, number of examples, AUC, and threshold of the filter."""
    return [
        {
            "concept": concept.name,
            "column": concept.column,
            "examples": concept.examples,
            "auc": concept.auc,
            "threshold": float(head.tensors["threshold"][row]),
        }
        for row, concept in enumerate(head.concepts)
    ]
