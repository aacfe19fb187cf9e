"""The item encoder: a protocol, and the helpers that every encoder shares.

An encoder turns texts into unit vectors. A text may carry an item's fields, see `features.content.content`. An encoder
is fitted or opened once and saved as a directory without pickle. Its id is a hash of everything the encoder computes
with. Vectors of two encoder ids must never be compared.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from features.errors import BundleError, DatasetError

DESCRIPTION = "encoder.json"


class Encoder(Protocol):
    """Maps texts to vectors. `encode` gives each text of a batch the vector that it would get alone."""

    @property
    def id(self) -> str:
        """Name and hash, `NAME-HASH`. Equal ids give comparable vectors."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns (N, D) float32 rows of unit length. A text that is empty or holds no known term is a zero row."""
        ...

    def save(self, directory: Path) -> None:
        """Writes everything `load_encoder` needs into an existing empty directory."""
        ...


class Named(Protocol):
    """Part of a bundle that an id names."""

    @property
    def id(self) -> str:
        """Hash of the content."""
        ...


Part = TypeVar("Part", bound=Named)


def load_part(directory: Path, file: str, read: Callable[[dict[str, Any]], Part], *, what: str, remedy: str) -> Part:
    """Loads a part that was saved with a description, and checks its id.

    Args:
        directory: Directory of the part.
        file: Name of the description, JSON with the field `id`.
        read: Makes the part of the decoded description.
        what: Name of the part, for errors.
        remedy: Advice for errors.

    Raises:
        BundleError: A file is missing or damaged, or the part has another id than the description says.
    """
    try:
        description = msgspec.json.decode((directory / file).read_bytes())
        part, expected = read(description), description["id"]
    except (OSError, KeyError, TypeError, ValueError, msgspec.MsgspecError, SafetensorError, DatasetError) as error:
        raise BundleError(f"{directory}: holds no {what} that can be read ({error}); {remedy}") from error
    if part.id != expected:
        raise BundleError(f"{directory}: holds {what} {part.id}, expected {expected}; {remedy}")
    return part


def content_id(name: str, *parts: bytes) -> str:
    """Returns the id of an encoder: its name and a hash of everything it computes with."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return f"{name}-{digest.hexdigest()[:12]}"


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales rows to unit length, in float64 so that the result does not depend on the batch. Zero rows stay zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    scaled: NDArray[np.float32] = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0).astype(np.float32)
    return scaled
