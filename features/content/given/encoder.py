"""The encoder of vectors that a team brings: it reads the vector of an item from its content.

It stands beside other encoders in a chain like any base. Its space is named by the team, so its id is a hash of the
space's name and the width. It has no text encoder: a text without a vector is refused.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.content import Content
from features.content.encoder import DESCRIPTION, Encoder, content_id, unit
from features.errors import BundleError, DatasetError
from features.value.vector import GivenSpace, VectorFault, read_vectors, text_width, vector_text, vector_texts

KIND = "vectors"
_UNIT = 1e-6


class GivenVectors:
    """Encoder of an item's own vector, scaled to unit length.

    A vector of unit length keeps its bits, so vectors that another run computed are the same in this run.

    Args:
        name: Name of the vectors in `[items] vectors`, and of the field of a content.
        space: Id of the space that the team gives.
        dim: D, width of a vector.
    """

    def __init__(self, name: str, space: str, dim: int) -> None:
        self.name, self.space, self._dim = name, space, dim

    @cached_property
    def id(self) -> str:
        return content_id(self.space, KIND.encode(), self._dim.to_bytes(8, "big"))

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def fields(self) -> tuple[str, ...]:
        """Name of the field that the encoder reads."""
        return (self.name,)

    @property
    def given(self) -> "tuple[GivenVectors, ...]":
        """The encoder itself; see `given_in`."""
        return (self,)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        own = [self._vector_of(text) for text in texts]
        try:
            vectors = read_vectors(own, self._dim)
        except VectorFault as fault:
            raise DatasetError(f"vectors.{self.name}: item {fault.row} of the batch {fault}") from fault
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        scaled = unit(vectors)
        kept = np.abs(lengths - 1.0) <= _UNIT
        scaled[kept] = vectors[kept]
        return scaled

    def checked(self, vectors: NDArray[np.floating]) -> NDArray[np.float32]:
        """Returns vectors (N, D) as float32.

        Raises:
            DatasetError: A vector cannot be used; names its row.
        """
        values = np.asarray(vectors)
        if values.ndim != 2:
            raise DatasetError(f"vectors.{self.name}: an array of shape {values.shape}, (N, {self._dim}) expected")
        given = GivenSpace(column=self.name, space=self.space, dim=self._dim)
        try:
            return read_vectors(vector_texts(pl.Series(self.name, values), given), self._dim)
        except VectorFault as fault:
            raise DatasetError(f"vectors.{self.name}, row {fault.row}: {fault}") from fault

    def _vector_of(self, text: str) -> str:
        own = text.fields if isinstance(text, Content) else {}
        if self.name not in own:
            raise DatasetError(
                f"space {self.space!r} of vectors.{self.name} has no text encoder, so {text[:40]!r} has no vector "
                "there; give the item's own vector"
            )
        return own[self.name]

    def save(self, directory: Path) -> None:
        described = {"kind": KIND, "id": self.id, "name": self.name, "space": self.space, "dim": self._dim}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(described))


def load(directory: Path) -> GivenVectors:
    """Loads an encoder that `GivenVectors.save` wrote."""
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    found = GivenVectors(description["name"], description["space"], description["dim"])
    if found.id != description["id"]:
        raise BundleError(f"{directory}: holds encoder {found.id}, expected {description['id']}; fetch it again")
    return found


def of_contents(name: str, space: str, contents: Sequence[str]) -> GivenVectors:
    """Returns the encoder of vectors of a catalogue; the first vector decides the width.

    Raises:
        DatasetError: No item has such a vector.
    """
    for text in contents:
        if isinstance(text, Content) and text.fields.get(name):
            return GivenVectors(name, space, text_width(text.fields[name]))
    raise DatasetError(f"[items.vectors] {name}: none of the {len(contents):,} items has a vector; name another column")


def given_in(encoder: Encoder | None) -> tuple[GivenVectors, ...]:
    """Returns the encoders of given vectors among the bases of an encoder; none if texts alone are encoded."""
    found: tuple[GivenVectors, ...] = getattr(encoder, "given", ())
    return found


def refuse_other_spaces(encoder: Encoder, spaces: Mapping[str, str], *, source: str) -> None:
    """Raises DatasetError if an encoder reads given vectors that a descriptor lacks, or has in another space.

    Args:
        encoder: The encoder.
        spaces: Space of each of the descriptor's vectors, by name.
        source: Name of the encoder's place, for the error.
    """
    for one in given_in(encoder):
        actual = spaces.get(one.name)
        if actual != one.space:
            has = "has no such vectors" if actual is None else f"has them in space {actual!r}"
            raise DatasetError(
                f"{source}: its encoder reads vectors.{one.name} of space {one.space!r}, but the descriptor {has}; "
                "vectors of two spaces must not be mixed: declare the space, or train without it"
            )


def with_vectors(texts: Sequence[str], vectors: Mapping[str, NDArray[np.floating]]) -> list[str]:
    """Returns N contents of texts and of vectors (N, D) by name. Without texts, the contents have vectors alone.

    Raises:
        DatasetError: The numbers of texts and vectors differ.
    """
    made: list[str] = []
    count = max(map(len, vectors.values()), default=len(texts))
    if {len(texts) or count, *map(len, vectors.values())} != {count}:
        raise DatasetError(f"{len(texts)} texts and {count} vectors were given; give as many of each")
    for row, text in enumerate(texts or [""] * count):
        own: dict[str, Any] = dict(text.fields) if isinstance(text, Content) else {}
        made.append(Content(text, own | {name: vector_text(found[row]) for name, found in vectors.items()}))
    return made
