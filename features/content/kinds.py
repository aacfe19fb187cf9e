"""The registry of encoder kinds: each kind is fitted, or loaded from a directory."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from features.config import nearest
from features.content import content
from features.content.encoder import DESCRIPTION, Encoder
from features.content.given import encoder as given
from features.content.transformer.reading import TransformerOptions
from features.device import CPU, Device
from features.errors import BundleError, DatasetError


class Kind(Protocol):
    """Kind of encoder: `fit` makes an encoder from a catalogue's texts, `load` reads an encoder that `save` wrote.

    Further parameters of `fit` that are given by keyword are the options of the kind.
    """

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
    """A kind whose module is imported when it fits or loads, and the dataclass that checks its options."""

    module: Callable[[], Kind]
    options: type[Any] | None = None

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None, **options: Any) -> Encoder:
        return self.module().fit(texts, dim=dim, seed=seed, model=model, **options)

    def load(self, directory: Path) -> Encoder:
        return self.module().load(directory)


class _Chains:
    """The kind of encoders side by side with steps behind them; a chain is made from fitted parts."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
        raise DatasetError("encoder 'chain' is not fitted by its name; name the encoder that is to be fitted")

    def load(self, directory: Path) -> Encoder:
        from features.content.chain import load_chain

        return load_chain(directory, load_encoder)


class _Given:
    """The kind of vectors that a team brings; `[items] vectors` of the descriptor names them."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
        raise DatasetError("encoder 'vectors' is not fitted by its name; name vectors of [items] vectors")

    def load(self, directory: Path) -> Encoder:
        return given.load(directory)


class _Readers:
    """The kind of encoders that read some fields; the option `fields` of another kind makes one."""

    def fit(self, texts: Sequence[str], *, dim: int, seed: int, model: str | None) -> Encoder:
        raise DatasetError("encoder 'fields' is not fitted by its name; give the encoder's option `fields`")

    def load(self, directory: Path) -> Encoder:
        return content.load_reader(directory, load_encoder)


# A new encoder is one new module with `fit` and `load`, and one line here. The modules bring scikit-learn and a
# transformer library along.
CHAIN = "chain"
_FIELDS = "fields"
"""Option of every kind: the fields of an item's content that it reads."""
_NOT_FITTED = (CHAIN, content.KIND, given.KIND)
_WITHOUT_MODEL = {"lsa"}
KINDS: dict[str, Kind] = {
    "lsa": _OnUse(_lsa),
    "sentence-transformers": _OnUse(_sentence_transformers, TransformerOptions),
    "static": _OnUse(_static),
    CHAIN: _Chains(),
    content.KIND: _Readers(),
    given.KIND: _Given(),
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


def names_of(encoder: str, vectors: Collection[str] = ()) -> tuple[str, ...]:
    """Returns the names in a value of `encoder`: kinds and vectors side by side are joined by `+`.

    Args:
        encoder: Names joined by `+`.
        vectors: Names of the descriptor's vectors.

    Raises:
        DatasetError: A kind is unknown, or cannot be fitted by its name.
    """
    names = tuple(name.strip() for name in encoder.split("+"))
    for name in names:
        if name not in (known := (*fitted_names(), *vectors)):
            raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(known)}")
    if len(set(names)) < len(names) and vectors:
        raise DatasetError(f"encoder {encoder!r} names a base twice; name it once")
    return names


def fitted_names() -> tuple[str, ...]:
    """Returns the names of the kinds that are fitted by name; a chain is made of fitted encoders."""
    return tuple(name for name in KINDS if name not in _NOT_FITTED)


Options = Mapping[str, Mapping[str, Any]]
"""Options of each kind, by the name of the kind."""


def check_options(encoder: str, options: Options, vectors: Collection[str] = ()) -> None:
    """Checks the names and values of the kinds' options before anything is fitted.

    Args:
        encoder: Names of the kinds, joined by `+`.
        options: Options by kind.
        vectors: Names of the descriptor's vectors, which have no options.

    Raises:
        DatasetError: A kind is not part of the encoder, an option is unknown, or a value cannot be used; names it.
    """
    names = names_of(encoder, vectors)
    for name, own in options.items():
        if name in vectors:
            raise DatasetError(f"{name}: the vectors of the items have no options; remove them")
        if name not in names:
            raise DatasetError(f"{name!r} is no part of the encoder {encoder!r}; name options of: {', '.join(names)}")
        if not isinstance(own, Mapping):
            raise DatasetError(f"{name}: expected a table of options, got {own!r}")
        found = kind(name)
        checked = found.options if isinstance(found, _OnUse) else None
        known = [_FIELDS, *(_names(checked, skip=0) if checked else _own_names(found))]
        for option in own:
            if option not in known:
                raise DatasetError(
                    f"{name}: no option {option!r}; the nearest is {nearest(option, known)!r} "
                    f"(there are: {', '.join(known)})"
                )
        fields_of_option(name, own)
        if checked is not None:
            try:
                checked(**_without_fields(own))
            except DatasetError as error:
                raise DatasetError(f"{name}.{error}") from error


def fields_of_option(name: str, own: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the fields that the options of a kind name; none if it reads whole texts.

    Raises:
        DatasetError: The value is no list of different names.
    """
    named = own.get(_FIELDS, ())
    names = [part.strip() for part in named.split(",")] if isinstance(named, str) else list(named)
    if (_FIELDS in own and not names) or len(set(names)) < len(names) or not all(isinstance(one, str) for one in names):
        raise DatasetError(f"{name}.{_FIELDS}: expected a list of different columns of [items] text, got {named!r}")
    return tuple(names)


def named_fields(options: Options) -> tuple[str, ...]:
    """Returns the fields that any kind reads."""
    return tuple(dict.fromkeys(field for name, own in options.items() for field in fields_of_option(name, own)))


def _own_names(found: Kind) -> list[str]:
    """Returns the keyword parameters of a registered kind's `fit`."""
    module = found.module() if isinstance(found, _OnUse) else found
    return [name for name in _names(module.fit, skip=1) if name not in ("dim", "seed", "model")]


def _names(called: Callable[..., Any], *, skip: int) -> list[str]:
    return list(inspect.signature(called).parameters)[skip:]


def _without_fields(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name != _FIELDS}


def fit_encoder(
    encoder: str,
    texts: Sequence[str],
    *,
    dim: int,
    seed: int,
    model: str | None,
    options: Options | None = None,
    spaces: Mapping[str, str] | None = None,
) -> Encoder:
    """Fits an encoder of one kind, or of several kinds and vectors side by side.

    Args:
        encoder: Names of the kinds, joined by `+`.
        texts: Texts of the catalogue.
        dim: Width of a fitted vector.
        seed: Seed of everything random.
        model: Model of the kinds that take one.
        options: Options by kind.
        spaces: Space of each of the descriptor's vectors, by name.

    Raises:
        DatasetError: A kind is unknown or cannot be fitted, or an option cannot be used.
    """
    spaces = spaces or {}
    names = names_of(encoder, spaces)
    check_options(encoder, options or {}, spaces)
    single = len(names) == 1
    if model is not None and set(names) <= {*spaces}:
        raise DatasetError(f"encoder model {model!r}: the items bring their vectors, so no model is read; remove it")
    bases: list[Encoder] = []
    for name in names:
        if name in spaces:
            bases.append(given.of_contents(name, spaces[name], texts))
            continue
        own = (options or {}).get(name, {})
        fields = fields_of_option(name, own)
        read = content.joined_fields(texts, fields) if fields else texts
        taken = model if single or name not in _WITHOUT_MODEL else None
        base = kind(name).fit(read, dim=dim, seed=seed, model=taken, **_without_fields(own))
        bases.append(content.FieldReader(base, fields) if fields else base)
    if single:
        return bases[0]
    from features.content.chain import Chain

    return Chain(bases)


def kind(name: str) -> Kind:
    """Returns the encoder kind of that name. An unknown name raises DatasetError, which lists the known names."""
    if name not in KINDS:
        raise DatasetError(f"encoder {name!r} is unknown; choose one of: {', '.join(KINDS)}")
    return KINDS[name]


def reads_vectors(directory: Path) -> bool:
    """Returns whether a saved encoder reads vectors of the items. Loads no encoder."""
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    if description["kind"] == CHAIN:
        return any(reads_vectors(directory / name) for name in description["bases"])
    return bool(description["kind"] == given.KIND)


def load_encoder(directory: Path, device: Device = CPU) -> Encoder:
    """Loads an encoder that `Encoder.save` wrote.

    Args:
        directory: Directory of the encoder.
        device: Device on which an encoder with an attribute `device` computes; other kinds stay on the processor.
    """
    path = directory / DESCRIPTION
    if not path.is_file():
        raise BundleError(f"{path} is missing: {directory} does not hold an encoder")
    found = kind(msgspec.json.decode(path.read_bytes())["kind"]).load(directory)
    if not device.is_cpu and hasattr(found, "device"):
        found.device = device
    return found
