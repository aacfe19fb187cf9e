"""Space of a sweep: the choices of `[run]` that vary, and the values that each of them takes.

`[sweep]` of the descriptor and `--over` name them: a list of values, or a range `LOW..HIGH`. Each value passes the same
checks as in `[run]`, before anything is trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from features.dataset.descriptor import Dataset
from features.errors import DatasetError, TesseraError
from models.networks import kinds as networks
from tessera.pipeline.made_of import leaves
from tessera.pipeline.options import RunOptions, load_options

_BETWEEN = ".."
# From this ratio of the ends on, a range is drawn by its logarithm.
_LOGARITHMIC_FROM = 10
_KIND, _OPTIONS = "ranker.kind", "ranker.options."
# Choices of the default network alone.
_OF_DEFAULT = ("ranker.cross_layers", "ranker.cross_rank", "ranker.hidden")
# A choice here decides nothing that the validation part of one split can judge, or makes trials incomparable.
_FIXED = ("seed", "gates", "runner", "endpoint", "runner_options", "device", "placement", "correct")
_FIXED_TRAINING = ("training.threads", "training.processes", "training.precision", "training.row_precision")


@dataclass(frozen=True)
class Choices:
    """Values to choose from, as texts that `--set` takes."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        whole: True for whole numbers.
        log: True if the logarithm is drawn evenly.
    """

    low: float
    high: float
    whole: bool
    log: bool


Knob = Choices | Range
Space = Mapping[str, Knob]
"""Values to try, by dotted name of a choice of `[run]`."""


@dataclass(frozen=True)
class Base:
    """Starting point of a sweep: the dataset and the `--set` of all trials."""

    dataset: Dataset
    given: tuple[str, ...] = ()

    @property
    def options(self) -> RunOptions:
        """Choices of a run without a value of the sweep: the default of the sweep."""
        return load_options(self.dataset, self.given)

    def options_with(self, chosen: Mapping[str, str]) -> RunOptions:
        """Returns the choices of a run with values of the sweep.

        Options of the network are those of its kind: those of the base do not stay with another kind.

        Raises:
            TesseraError: The values cannot be used together.
        """
        given = [f"{name}={text}" for name, text in chosen.items()]
        kind = chosen.get(_KIND)
        if kind is None or kind == self.options.training.network.kind:
            return load_options(self.dataset, [*self.given, *given])
        run = {name: value for name, value in leaves(self.dataset.run) if not _of_network(name)}
        kept = [pair for pair in self.given if not _of_network(pair.partition("=")[0].strip())]
        return load_options(self.dataset.model_copy(update={"run": run}), [*kept, *given])

    def written(self, chosen: Mapping[str, str]) -> dict[str, Any]:
        """Returns the content of a `[run]` table that gives `options_with`, by dotted name."""
        options = self.options_with(chosen)
        found = dict(leaves(self.dataset.run))
        names = [*(pair.partition("=")[0].strip() for pair in self.given), *chosen]
        found |= {name: value_of(options, name) for name in names}
        if options.training.network.kind != self.options.training.network.kind:
            found = {name: value for name, value in found.items() if name in chosen or not _of_network(name)}
        return found


def read_space(base: Base, over: Sequence[str] = ()) -> dict[str, Knob]:
    """Reads `[sweep]` of the descriptor, and `--over` in place of single names; empty if neither names a choice.

    Args:
        base: Starting point of the sweep.
        over: `NAME=VALUE,VALUE` or `NAME=LOW..HIGH` each.

    Raises:
        DatasetError: A key of `[sweep]` cannot be used; names the file and the key.
        TesseraError: An `--over` cannot be used; names it.
    """
    written: dict[str, tuple[str, Any]] = {}
    for name, value in leaves(base.dataset.sweep):
        written[name] = f"{base.dataset.source}: [sweep] {name}", value
    for pair in over:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not name or not equals or not text:
            raise TesseraError(
                f"--over {pair}: expected NAME=VALUE,VALUE or NAME=LOW..HIGH, table.dim=8,16 for example"
            )
        written[name] = f"--over {pair}", _values(text)
    pinned = {pair.partition("=")[0].strip() for pair in base.given}
    kinds = _kinds(base, written)
    return {name: _knob(base, name, value, where, kinds, pinned) for name, (where, value) in written.items()}


def check_space(base: Base, space: Space) -> None:
    """Checks every value of a space that was not read from a descriptor.

    Raises:
        TesseraError: A value cannot be used.
    """
    kinds = _kinds(base, {})
    if isinstance(of_kind := space.get(_KIND), Choices):
        kinds = list(of_kind.values)
    for name, knob in space.items():
        for text in knob.values if isinstance(knob, Choices) else (text_of(knob.low), text_of(knob.high)):
            _checked(base, name, text, name, kinds)


def applies(name: str, kind: str) -> bool:
    """Returns True if a choice decides something for a kind of network."""
    if name in _OF_DEFAULT:
        return kind == networks.DEFAULT
    if not name.startswith(_OPTIONS):
        return True
    try:
        networks.check(kind, {name.removeprefix(_OPTIONS): None})
    except DatasetError:
        return False
    return True


def text_of(value: Any) -> str:
    """Returns a value as a text that `--set` takes."""
    if value is None:
        return "auto"
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def _of_network(name: str) -> bool:
    """Returns True for a choice that belongs to one kind of network."""
    return name in _OF_DEFAULT or name.startswith(_OPTIONS)


def _values(text: str) -> Any:
    """Returns the values of an `--over`: a range as it is, else a list; commas inside brackets separate nothing."""
    if _BETWEEN in text:
        return text
    found, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [one.strip() for one in found]


def _kinds(base: Base, written: Mapping[str, tuple[str, Any]]) -> list[str]:
    """Returns the kinds of networks that trials have."""
    _, value = written.get(_KIND, ("", None))
    return [str(one) for one in value] if isinstance(value, list) else [base.options.training.network.kind]


def _knob(base: Base, name: str, value: Any, where: str, kinds: Sequence[str], pinned: set[str]) -> Knob:
    if name in pinned:
        raise TesseraError(f"{where}: --set gives {name} one value; leave out one of the two")
    if name.partition(".")[0] in _FIXED or name in _FIXED_TRAINING:
        raise DatasetError(
            f"{where}: a sweep cannot try {name}, whose values one validation part does not compare; set it in [run]"
        )
    if isinstance(value, str) and _BETWEEN in value:
        return _range(base, name, value, where, kinds)
    if not isinstance(value, list) or not value:
        raise DatasetError(f"{where}: expected a list of values, or a range like '1e-4..1e-2', got {value!r}")
    texts = tuple(dict.fromkeys(text_of(one) for one in value))
    for text in texts:
        _checked(base, name, text, where, kinds)
    return Choices(texts)


def _range(base: Base, name: str, text: str, where: str, kinds: Sequence[str]) -> Range:
    ends = [one.strip() for one in text.split(_BETWEEN)]
    if len(ends) != 2:
        raise DatasetError(f"{where}: expected LOW..HIGH, got {text!r}")
    low, high = (_checked(base, name, end, where, kinds) for end in ends)
    for end in (low, high):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise DatasetError(f"{where}: a range is of numbers, and {name} is none; list its values")
    if not low < high:
        raise DatasetError(f"{where}: expected LOW below HIGH, got {text!r}")
    whole = isinstance(low, int) and isinstance(high, int)
    if whole:
        try:
            _checked(base, name, str(low + 1), where, kinds)
        except TesseraError as error:
            raise DatasetError(f"{error}; list the values instead of a range") from error
    return Range(low, high, whole, log=low > 0 and high >= _LOGARITHMIC_FROM * low)


def _checked(base: Base, name: str, text: str, where: str, kinds: Sequence[str]) -> Any:
    """Returns a value in its type, checked with the network that reads it."""
    kind = next((one for one in kinds if applies(name, one)), kinds[0])
    chosen = {name: text} if name == _KIND or kind == base.options.training.network.kind else {_KIND: kind, name: text}
    try:
        options = base.options_with(chosen)
    except TesseraError as error:
        reason = str(error)
        # The message names the values as `--set` would have them; the user wrote them elsewhere.
        if reason.startswith("--set "):
            reason = reason.partition(": ")[2]
        raise DatasetError(f"{where}: {text}: {reason}") from error
    return value_of(options, name)


def value_of(options: RunOptions, name: str) -> Any:
    """Returns the value of a choice, or of a key of a choice that is a table."""
    choices = options.choices()
    if name in choices:
        return choices[name]
    for table, value in choices.items():
        if name.startswith(f"{table}.") and isinstance(value, Mapping):
            return value.get(name.removeprefix(f"{table}."))
    return None


def pinned_out(space: Space, given: Sequence[str]) -> dict[str, Knob]:
    """Returns a space without the choices that `--set` gives one value."""
    names = {pair.partition("=")[0].strip() for pair in given}
    return {name: knob for name, knob in space.items() if name not in names}


def as_json(space: Space) -> dict[str, Any]:
    """Returns a space as JSON: lists of texts, and ranges as `LOW..HIGH`."""
    return {
        name: list(knob.values)
        if isinstance(knob, Choices)
        else f"{text_of(knob.low)}{_BETWEEN}{text_of(knob.high)}{' (log)' if knob.log else ''}"
        for name, knob in space.items()
    }


def default_space(base: Base, table_bytes: int, bound: int | None) -> dict[str, Knob]:
    """Returns the space of a sweep that names none: table, rates, dropout, and the network with its options.

    Args:
        base: Starting point of the sweep.
        table_bytes: Bytes of the base's table.
        bound: Largest bytes of a trial's table, or None.
    """

    def fits(kind: str) -> bool:
        # A network of sequences does not fit where [run] pools the history.
        try:
            base.options_with({_KIND: kind})
        except TesseraError:
            return False
        return True

    options, events = base.options, base.dataset.events
    own = options.training.network.kind
    budgets = {table_bytes // 4, table_bytes // 2, table_bytes, 2 * table_bytes}
    if bound is not None:
        budgets = {one for one in budgets if one <= bound} | {bound}
    ids = [name for name, declared in (("user_id", events.user), ("item_id", events.item)) if declared]
    widths = Choices(("[64, 32]", "[128, 64]", "[256, 128]"))
    space: dict[str, Knob] = {
        "table.budget": Choices(tuple(map(str, sorted(budgets)))),
        "table.dim": Choices(("8", "16", "32")),
        **{f"table.chunks.{name}": Choices(("1", "2", "4")) for name in ids},
        "training.table_rate": Range(0.03, 0.3, whole=False, log=True),
        "training.network_rate": Range(3e-4, 3e-3, whole=False, log=True),
        _KIND: Choices(tuple(kind for kind in dict.fromkeys((own, networks.DEFAULT, *networks.KINDS)) if fits(kind))),
        "ranker.cross_layers": Range(1, 3, whole=True, log=False),
        "ranker.hidden": widths,
        f"{_OPTIONS}hidden": widths,
        f"{_OPTIONS}top": widths,
        f"{_OPTIONS}blocks": Range(1, 2, whole=True, log=False),
    }
    if options.table.admission:
        space["training.dropout.item"] = Range(0.1, 0.5, whole=False, log=False)
    return pinned_out(space, base.given)


def with_reads(options: RunOptions, parts: Sequence[Any] | None) -> RunOptions:
    """Returns choices that read the parts of an item which the sweep chose, unless they name parts themselves."""
    return options if parts is None or options.reads is not None else replace(options, reads=tuple(parts))
