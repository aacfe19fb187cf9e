"""The encoders there are: how each is fitted, and how a saved one is loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from features.content.encoder import DESCRIPTION, Encoder
from features.errors import BundleError, DatasetError


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
