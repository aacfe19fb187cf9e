"""The registry of encoder kinds: each kind is fitted, or loaded from a directory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from features.content.encoder import DESCRIPTION, Encoder
from features.errors import BundleError, DatasetError


class Kind(Protocol):
    """Kind of encoder: `fit` makes an encoder from a catalogue's texts, `load` reads an encoder that `save` wrote."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder: ...

    def load(self, directory: Path) -> Encoder: ...


def _lsa() -> Kind:
    from features.content import lsa

    return lsa


def _sentence_transformers() -> Kind:
    from features.content import sentence

    return sentence


# A new encoder is one new module with `fit` and `load`, and one line here. A module is loaded on use, since
# `sentence` imports a transformer library.
KINDS: dict[str, Callable[[], Kind]] = {"lsa": _lsa, "sentence-transformers": _sentence_transformers}


def kind(name: str) -> Kind:
    """Returns the encoder kind of that name. An unknown name raises DatasetError, which lists the known names."""
    if name not in KINDS:
        raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(KINDS)}")
    return KINDS[name]()


def load_encoder(directory: Path) -> Encoder:
    """Loads an encoder that `Encoder.save` wrote."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold an encoder")
    return kind(msgspec.json.decode(path.read_bytes())["kind"]).load(directory)
