"""What an item encoder is, and the encoders there are.

An encoder turns texts into unit vectors. It is fitted (or found) once, saved as a directory without pickle, and named
by an id that is the hash of what it computes with: vectors of two ids are never compared.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.error import BundleError, DatasetError

DESCRIPTION = "encoder.json"


class Encoder(Protocol):
    """Texts to vectors: `encode` of a batch gives each text the vector it would get alone."""

    @property
    def id(self) -> str:
        """`NAME-HASH`; equal ids give comparable vectors."""
        ...

    @property
    def dim(self) -> int:
        """D, the width of a vector."""
        ...

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Returns (N, D) float32 rows of unit length; an empty or wholly unknown text is a zero row."""
        ...

    def save(self, directory: Path) -> None:
        """Writes everything `load_encoder` needs into an existing empty directory."""
        ...


class Kind(Protocol):
    """How one kind of encoder comes to be: `fit` on a catalogue's texts, or `load` what `save` wrote."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder: ...

    def load(self, directory: Path) -> Encoder: ...


def _lsa() -> Kind:
    from features.content import lsa

    return lsa


def _sentence_transformers() -> Kind:
    from features.content import sentence

    return sentence


# A new encoder is one new module with `fit` and `load`, and one line here. Loaded on use: one of them brings a
# transformer library along.
KINDS: dict[str, Callable[[], Kind]] = {"lsa": _lsa, "sentence-transformers": _sentence_transformers}


def kind(name: str) -> Kind:
    """Returns the encoder kind of that name, or raises DatasetError with the names there are."""
    if name not in KINDS:
        raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(KINDS)}")
    return KINDS[name]()


def load_encoder(directory: Path) -> Encoder:
    """Loads what some encoder's `save` wrote."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold an encoder")
    return kind(msgspec.json.decode(path.read_bytes())["kind"]).load(directory)


def content_id(name: str, *parts: bytes) -> str:
    """Names an encoder by what it computes with."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return f"{name}-{digest.hexdigest()[:12]}"


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Scales rows to unit length, in float64 so that the result does not depend on the batch; zero rows stay zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    norms = np.sqrt(np.einsum("nd,nd->n", wide, wide))[:, None]
    scaled: NDArray[np.float32] = np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0).astype(np.float32)
    return scaled
