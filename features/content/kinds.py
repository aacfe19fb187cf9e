"""The registry of encoder kinds: each kind is fitted, or loaded from a directory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


def _static() -> Kind:
    from features.content import static

    return static


@dataclass(frozen=True)
class _OnUse:
    """A kind whose module is imported when it fits or loads."""

    module: Callable[[], Kind]

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
        return self.module().fit(texts, dim=dim, seed=seed, model=model)

    def load(self, directory: Path) -> Encoder:
        return self.module().load(directory)


class _Chains:
    """The kind of encoders side by side with steps behind them; a chain is made from fitted parts."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
        raise DatasetError("encoder 'chain' is not fitted by its name; name the encoder that is to be fitted")

    def load(self, directory: Path) -> Encoder:
        from features.content.chain import load_chain

        return load_chain(directory, load_encoder)


# A new encoder is one new module with `fit` and `load`, and one line here. The modules bring scikit-learn and a
# transformer library along.
CHAIN = "chain"
_WITHOUT_MODEL = {"lsa"}
KINDS: dict[str, Kind] = {
    "lsa": _OnUse(_lsa),
    "sentence-transformers": _OnUse(_sentence_transformers),
    "static": _OnUse(_static),
    CHAIN: _Chains(),
}


def register(name: str, kind: Kind) -> None:
    """Adds a kind of encoder under a name.

    Call it where your module is imported: every process that fits or loads such an encoder must import the module.

    Args:
        name: the value of `encoder` in `[run]`, and of the field `kind` in the `encoder.json` that `save` writes.
        kind: has `fit` and `load`, see `Kind`; a module with these two functions is one.

    Raises:
        DatasetError: another kind has this name.

    Example:
        `examples/own_encoder.py` registers an encoder and trains on its vectors.
    """
    if KINDS.setdefault(name, kind) is not kind:
        raise DatasetError(f"encoder {name!r} is registered already; choose another name")


def names_of(encoder: str) -> tuple[str, ...]:
    """Returns the names of the kinds in a value of `encoder`: kinds side by side are joined by `+`.

    Raises:
        DatasetError: A kind is unknown, or cannot be fitted by its name.
    """
    names = tuple(name.strip() for name in encoder.split("+"))
    for name in names:
        if name not in fitted_names():
            raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(fitted_names())}")
    return names


def fitted_names() -> tuple[str, ...]:
    """Returns the names of the kinds that are fitted by name; a chain is made of fitted encoders."""
    return tuple(name for name in KINDS if name != CHAIN)


def fit_encoder(encoder: str, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
    """Fits an encoder of one kind, or of several kinds side by side.

    Args:
        encoder: Names of the kinds, joined by `+`.
        texts: Texts of the catalogue.
        dim: Width of a fitted vector.
        seed: Seed of everything random.
        model: Model of the kinds that take one.

    Raises:
        DatasetError: A kind is unknown or cannot be fitted.
    """
    names = names_of(encoder)
    if len(names) == 1:
        return kind(names[0]).fit(texts, dim=dim, seed=seed, model=model)
    from features.content.chain import Chain

    taken = {name: None if name in _WITHOUT_MODEL else model for name in names}
    return Chain([kind(name).fit(texts, dim=dim, seed=seed, model=taken[name]) for name in names])


def kind(name: str) -> Kind:
    """Returns the encoder kind of that name. An unknown name raises DatasetError, which lists the known names."""
    if name not in KINDS:
        raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(KINDS)}")
    return KINDS[name]


def load_encoder(directory: Path) -> Encoder:
    """Loads an encoder that `Encoder.save` wrote."""
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold an encoder")
    return kind(msgspec.json.decode(path.read_bytes())["kind"]).load(directory)
