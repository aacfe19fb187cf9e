"""Choices of a run: the descriptor's `[run]` table and `--set NAME=VALUE` become one frozen, checked configuration.

The names in the file, after `--set`, in errors, in the record of a stage and in a bundle's manifest are the same.
A dot separates a table from its key: `table.budget` is `budget` in `[run.table]`.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from features.aggregate.plan import MOST_KEYS, Choice
from features.config import nearest
from features.content import kinds as encoders
from features.dataset.descriptor import Dataset
from features.device import DeviceChoice
from features.errors import DatasetError, TesseraError
from features.history import DEFAULT_LENGTH
from models.bundle.bundle import LogPosition
from models.networks import kinds as networks
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from models.registry.gate import Gates
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.tokens import Scheme
from models.table.admission import MOST_SIGHTINGS
from models.table.default_schema import TableOptions
from models.table.item_parts import ItemPart
from models.towers.config import TowerConfig

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_AUTO, _SIDE_BY_SIDE = "auto", "+"
_DEFAULT_ENCODER = "lsa"
_OF_ENCODERS = "encoder_options"
# Given with the command, since they change from run to run.
_NOT_IN_FILE = ("warm_start", "vectors", "positions")
# The network is a part of the training's configuration, the seed and the device are one for the whole run.
_ELSEWHERE = {
    "training.network": "ranker",
    "training.seed": "",
    "training.device": "",
    "training.network.source": "",
    # Several tasks are declared with the events.
    "training.network.tasks": "",
    "training.network.judge": "",
}
_ANY = 2**62
_RANGES = {
    "seed": (0, 2**31),
    "encoder_dim": (1, _ANY),
    "codes": (1, 2**16),
    "levels": (1, 16),
    "code_likes": (0, _ANY),
    "pieces": (1, _ANY),
    "history_length": (1, _ANY),
    "aggregate_keys": (8, _ANY),
    "table.dim": (4, _ANY),
    "table.budget": (1, _ANY),
    "table.admission": (0, MOST_SIGHTINGS),
    "training.batch": (1, _ANY),
    "training.max_epochs": (1, _ANY),
    "training.patience": (1, _ANY),
    "training.threads": (1, _ANY),
    "training.processes": (1, _ANY),
    "towers.width": (4, _ANY),
    "towers.blocks": (1, 64),
    "towers.heads": (1, _ANY),
    "towers.dropout": (0, 1),
    "towers.id_dropout": (0, 1),
    "towers.user_dropout": (0, 1),
    "towers.batch": (1, _ANY),
    "towers.targets": (1, _ANY),
    "towers.negatives": (1, _ANY),
    "towers.budget": (1, _ANY),
    "towers.max_epochs": (1, _ANY),
    "towers.patience": (1, _ANY),
    "towers.averaging": (0, 1),
    "towers.content_weight": (0, _ANY),
}


@dataclass(frozen=True)
class RunOptions:
    """Choices of a run. Everything else follows from the dataset.

    Attributes:
        seed: Seed of everything random, of a random split too.
        encoder: Kind of the encoder that turns content into vectors, or a name of `[items] vectors`; `lsa+clip`, or a
            list, for several side by side. Without text, `lsa` stands for all vectors of the descriptor.
        encoder_model: Model of the encoder: a directory, beside the descriptor or anywhere, or a hub id.
        encoder_dim: Width of a content vector, where the encoder is fitted.
        encoder_options: Other settings of each kind of encoder, `{"lsa": {"fields": ["title"]}}` for example.
        quantizer: Kind of the codebook.
        quantizer_options: Other settings of that kind, `{"sinkhorn": 0.003}` for example.
        codes: Codes per level; None for the number that suits the catalogue's size, or the earlier run's.
        levels: Levels of a Semantic ID; None as for codes.
        code_likes: Weight of a term of the `rqvae` codebook that brings the codes of items together which the same
            users like, by likes of the training part; 0 for codes of content alone. The benchmark does not grant it.
        tokens: Scheme by which a Semantic ID becomes values of the table.
        pieces: Size of the vocabulary of the scheme `pieces`; None for two for each code of a level.
        table: Size and shape of the unified table.
        reads: Parts of an item that the ranker reads, of `id`, `code` (the Semantic ID), `content` (the vector) and
            `metadata` (the declared columns); None chooses them by items that small trainings do not see.
        placement: `auto` leaves the position path of `[events.placement]` out if the ranker without it explains
            held-out rows as well at equal places; `always` keeps it.
        correct: `neighbours` corrects the scores of new items by the user's labelled items that are near to them, with
            a weight fitted on items that a small training does not see; `off` leaves the ranker's scores.
        retrieval: `towers` trains the two towers of retrieval in a stage of their own; `off` leaves retrieval to
            content.
        towers: Shape and training of the towers.
        history_length: L, the items of a user's history.
        aggregates: `default` for the default aggregates and the declared ones, `declared` for those of `[aggregates]`
            alone, `off` for none.
        aggregate_keys: Most keys of one aggregate, such as pairs of user and genre. More are an error in the files; the
            stream forgets the keys whose last event is the oldest.
        training: Settings of the training; its `network` is `[run.ranker]`, and its seed is this one.
        gates: How much worse than the champion a bundle may be that is to challenge it.
        runner: Engine of the batch jobs: `direct`, `dask`, `prism`, `flink`, `spark` or `portable`. It decides no
            byte of their output.
        endpoint: Address of that engine's cluster, `HOST:PORT`; None where the engine starts on this machine.
        runner_options: Further Beam options of the engine, `--direct_num_workers=2` for example.
        warm_start: Directory of an earlier run to go on from: its encoder, the names of its codes, its rows. With a map
            in it, `OUT/maps/NAME`, the map's encoder takes the place of the run's.
        device: Device of training and of fitting the codebook: `cpu`, `cuda`, or `auto` for a GPU that torch and fbgemm
            can use.
        vectors: Names of the descriptor's vectors, which `encoder` may name.
        positions: Positions of the log's topics when the dataset's files were made; the bundle's stream starts there.

    Raises:
        TesseraError: A value is of another type, or out of its range; names the option.
    """

    seed: int = 0
    encoder: str = _DEFAULT_ENCODER
    encoder_model: str | None = None
    encoder_dim: int = 128
    encoder_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    quantizer: str = "rqvae"
    quantizer_options: Mapping[str, Any] = field(default_factory=dict)
    codes: int | None = None
    levels: int | None = None
    code_likes: float = 0.0
    tokens: Scheme = "prefix"
    pieces: int | None = None
    table: TableOptions = field(default_factory=TableOptions)
    reads: tuple[ItemPart, ...] | None = None
    placement: Literal["auto", "always"] = "auto"
    correct: Literal["off", "neighbours"] = "off"
    retrieval: Literal["off", "towers"] = "off"
    towers: TowerConfig = field(default_factory=TowerConfig)
    history_length: int = DEFAULT_LENGTH
    aggregates: Choice = "default"
    aggregate_keys: int = MOST_KEYS
    training: TrainConfig = field(default_factory=TrainConfig)
    gates: Gates = field(default_factory=Gates)
    runner: str = "direct"
    endpoint: str | None = None
    runner_options: tuple[str, ...] = ()
    warm_start: Path | None = None
    device: DeviceChoice = "auto"
    vectors: tuple[str, ...] = ()
    positions: tuple[LogPosition, ...] = ()

    def __post_init__(self) -> None:
        for name, (path, _) in known_choices().items():
            try:
                _checked(name, _at(self, path), vectors=self.vectors)
            except ValueError as error:
                raise TesseraError(f"{name}: {error}") from error
        codebooks.check(self.quantizer, self.quantizer_options)
        self._check_network()
        if self.retrieval == "towers":
            self.towers.check(self.table.dim)
        try:
            encoders.check_options(self.encoder, self.encoder_options, self.vectors)
        except DatasetError as error:
            raise TesseraError(f"encoder_options: {error}") from error

    def _check_network(self) -> None:
        chosen = self.training.network
        networks.check(chosen.kind, chosen.options)
        if self.table.history == "mean" and networks.reads_sequence(chosen.kind):
            raise TesseraError(
                f"table.history: the ranker {chosen.kind} reads a sequence, and 'mean' leaves none; set 'attention', "
                "or leave it out"
            )
        if chosen.kind != networks.DEFAULT:
            for name in ("cross_layers", "cross_rank", "hidden"):
                if getattr(chosen, name) != getattr(NetworkConfig(), name):
                    raise TesseraError(
                        f"ranker.{name}: only {networks.DEFAULT} has it; the settings of {chosen.kind} stand in "
                        "[run.ranker.options]"
                    )

    @property
    def shape(self) -> TableOptions:
        """Options of the table with the pooling of histories that the network needs."""
        if self.table.history != "auto":
            return self.table
        sequence = networks.reads_sequence(self.training.network.kind)
        return replace(self.table, history="attention" if sequence else "mean")

    def choices(self) -> dict[str, Any]:
        """Returns every choice that may stand in `[run]`, by dotted name; instead of `auto` the pooling."""
        shaped = replace(self, table=self.shape)
        return {
            name: _checked(name, _at(shaped, path), vectors=self.vectors) for name, (path, _) in known_choices().items()
        }

    def train_config(self) -> TrainConfig:
        """Returns the settings of the training, with the seed and the device of the run."""
        return replace(self.training, seed=self.seed, device=self.device)


def load_options(dataset: Dataset, overrides: Sequence[str] = ()) -> RunOptions:
    """Reads a descriptor's `[run]` table, and overrides single values of it.

    Args:
        dataset: Descriptor that was loaded.
        overrides: `NAME=VALUE` each, as `--set` takes them; the last of a name counts.

    Raises:
        DatasetError: A key of `[run]` is unknown, or its value cannot be used; names the file and the key.
        TesseraError: An override is unknown or cannot be used; names it.
    """
    chosen: dict[str, Any] = {}
    vectors = _vectors_of(dataset)
    problems = []
    for name, value in _leaves(dataset.run):
        try:
            _choose(chosen, name, value, vectors=vectors)
        except ValueError as error:
            problems.append(f"{dataset.source}: [run] {name}: {error}")
    if problems:
        raise DatasetError("\n".join(problems))
    for pair in overrides:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not name or not equals:
            raise TesseraError(f"--set {pair}: expected NAME=VALUE, table.budget=2MB for example")
        try:
            _choose(chosen, name, text, is_text=True, vectors=vectors)
        except ValueError as error:
            raise TesseraError(f"--set {name}={text}: {error}") from error
    try:
        return with_tasks(_built(chosen, vectors), dataset)
    except TesseraError as error:
        # Each value is valid by itself, but the values do not fit together.
        source = f"--set {' '.join(overrides)}" if overrides else f"{dataset.source}: [run]"
        raise TesseraError(f"{source}: {error}") from error


def for_dataset(options: RunOptions, dataset: Dataset) -> RunOptions:
    """Returns the choices with the dataset's tasks and vectors. Without text, all vectors replace the default encoder.

    Raises:
        DatasetError: An encoder reads text that the items do not have.
    """
    options = with_tasks(options, dataset)
    items = dataset.items
    if items is None or not items.vectors:
        return options
    options = replace(options, vectors=_vectors_of(dataset))
    if items.text:
        return options
    if options.encoder == _DEFAULT_ENCODER:
        return replace(options, encoder=_SIDE_BY_SIDE.join(items.vectors))
    reading = [name for name in encoders.names_of(options.encoder, items.vectors) if name not in items.vectors]
    if reading:
        raise DatasetError(
            f"{dataset.source}: encoder {reading[0]!r} reads text, but [items] names no text; name text = [...], or "
            f"the vectors {', '.join(items.vectors)} alone"
        )
    return options


def with_tasks(options: RunOptions, dataset: Dataset) -> RunOptions:
    """Returns the choices with the dataset's tasks and their weights.

    Raises:
        TesseraError: A choice is about several tasks and the dataset has one label, or the reverse.
    """
    tasks, network = dataset.events.tasks, options.training.network
    if tasks is None:
        if network.uncertainty:
            raise TesseraError(
                "ranker.uncertainty weighs several tasks, and the dataset has one label; declare [events.labels], or "
                "set it to false"
            )
        return options
    if options.correct != "off":
        raise TesseraError(
            f'correct = "{options.correct}" corrects the score of one label, and the dataset has the tasks '
            f'{", ".join(tasks.labels)}; set it to "off"'
        )
    network = replace(network, tasks=tasks.weights, judge=tasks.judge)
    return replace(options, training=replace(options.training, network=network))


def _vectors_of(dataset: Dataset) -> tuple[str, ...]:
    names = tuple(dataset.items.vectors) if dataset.items else ()
    for name in names:
        if name in encoders.KINDS:
            raise DatasetError(f"{dataset.source}: [items] vectors.{name}: the name is that of an encoder; rename it")
    return names


def parse_bytes(text: str) -> int:
    """Reads a size like 1500000, 1.5MB or 2MiB, in bytes.

    Raises:
        ValueError: The text is no size.
    """
    parsed = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if parsed is None or parsed[2].upper() not in _UNITS:
        raise ValueError("expected bytes, like 1500000, 1.5MB or 2MiB")
    return int(float(parsed[1]) * _UNITS[parsed[2].upper()])


@lru_cache(maxsize=1)
def known_choices() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Returns the attribute path of each choice in `RunOptions`, and its type, by dotted name."""
    return dict(_walk(RunOptions, ()))


def _walk(kind: type, path: tuple[str, ...]) -> Iterator[tuple[str, tuple[tuple[str, ...], Any]]]:
    hints = get_type_hints(kind)
    above = _ELSEWHERE.get(".".join(path), ".".join(path))
    for choice in fields(kind):
        own = (*path, choice.name)
        if own[0] in _NOT_IN_FILE or _ELSEWHERE.get(".".join(own)) == "":
            continue
        if is_dataclass(hints[choice.name]):
            yield from _walk(hints[choice.name], own)
        else:
            yield f"{above}.{choice.name}".lstrip("."), (own, hints[choice.name])


def _leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields names and values of a nested table, down to a choice or an unknown key."""
    for key, value in table.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and name not in known_choices() and _keys_of(name):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _keys_of(table: str) -> list[str]:
    return [name for name in known_choices() if name.startswith(f"{table}.")]


def _choose(
    chosen: dict[str, Any], name: str, value: Any, *, is_text: bool = False, vectors: Sequence[str] = ()
) -> None:
    """Adds one checked value, or one key of a choice that is a table itself.

    Raises:
        ValueError: The name is unknown, or the value cannot be used.
    """
    if name in known_choices():
        chosen[name] = _checked(name, value, is_text=is_text, vectors=vectors)
        return
    for table in ("table.chunks", "quantizer_options", "ranker.options", "gates.encoder", "gates.skew"):
        if name.startswith(f"{table}."):
            own = {name.removeprefix(f"{table}."): _toml(value) if is_text else value}
            chosen[table] = {**chosen.get(table, {}), **_checked(table, own)}
            return
    if name.startswith(f"{_OF_ENCODERS}."):
        kind, dot, option = name.removeprefix(f"{_OF_ENCODERS}.").partition(".")
        own = {kind: {option: _toml(value) if is_text else value}} if dot else {kind: value}
        before = chosen.get(_OF_ENCODERS, {})
        chosen[_OF_ENCODERS] = before | {kind: {**before.get(kind, {}), **_checked(_OF_ENCODERS, own)[kind]}}
        return
    if below := _keys_of(name):
        raise ValueError(f"is a table; name one of its keys: {', '.join(below)}")
    near = _nearest(name)
    raise ValueError(f"unknown key; the nearest valid name is '{near}' (valid: {', '.join(_beside(near))})")


def _nearest(name: str) -> str:
    """Returns the valid name with the same last part, else the valid name that is closest in spelling."""
    last = name.rpartition(".")[2]
    same = [known for known in known_choices() if known.rpartition(".")[2] == last]
    return same[0] if same else nearest(name, known_choices())


def _beside(name: str) -> list[str]:
    """Returns the names in the table of a name; for a name without a table also `table.*` and the other tables."""
    above = name.rpartition(".")[0]
    if above:
        return _keys_of(above)
    tables = dict.fromkeys(f"{known.partition('.')[0]}.*" for known in known_choices() if "." in known)
    return [known for known in known_choices() if "." not in known] + list(tables)


def _checked(name: str, value: Any, *, is_text: bool = False, vectors: Sequence[str] = ()) -> Any:
    """Returns a choice's value in its type.

    Args:
        is_text: The value is text from the command line, which may stand for a number, a list or a table.
        vectors: Names of the descriptor's vectors.

    Raises:
        ValueError: It is of another type, or out of its range.
    """
    kind = known_choices()[name][1]
    kinds = [other for other in get_args(kind) if other is not type(None)] if type(None) in get_args(kind) else [kind]
    if kinds != [kind] and value in (None, _AUTO):
        return None
    own = kinds[0]
    if name == "encoder" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = _SIDE_BY_SIDE.join(value)
    if name.endswith(".budget") and isinstance(value, str):
        return _in_range(name, parse_bytes(value))
    if is_text and get_origin(own) is tuple:
        value = _toml(value) if value.startswith("[") else [part.strip() for part in value.split(",") if part.strip()]
    elif is_text and get_origin(own) not in (None, Literal):
        value = _toml(value)
    try:
        converted = msgspec.convert(value, own, strict=not is_text)
    except msgspec.ValidationError as error:
        raise ValueError(f"expected {_expected(own)}{' or auto' if own != kind else ''}, got {value!r}") from error
    _check_kinds(name, converted, vectors)
    return _in_range(name, converted)


def _check_kinds(name: str, value: Any, vectors: Sequence[str]) -> None:
    if name == "encoder":
        chosen, there = [one.strip() for one in value.split(_SIDE_BY_SIDE)], (*encoders.fitted_names(), *vectors)
    elif name == "quantizer":
        chosen, there = [value], tuple(codebooks.KINDS)
    else:
        return
    for one in chosen:
        if one not in there:
            raise ValueError(f"expected one of {', '.join(there)}, got {one!r}")


def _in_range(name: str, value: Any) -> Any:
    low, high = _RANGES.get(name, (None, _ANY))
    if low is not None and not low <= value <= high:
        raise ValueError(f"expected {f'at least {low}' if high == _ANY else f'{low} to {high}'}, got {value}")
    if name == "table.dim" and value % 4:
        raise ValueError(f"expected a multiple of 4, got {value}")
    return value


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list of {'numbers' if get_args(kind)[0] is int else 'names'}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a table of names and values")


def _toml(text: str) -> Any:
    """Returns the value of a text in TOML; the text itself if it is no TOML value."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _at(options: Any, path: Sequence[str]) -> Any:
    for name in path:
        options = getattr(options, name)
    return options


def _built(chosen: Mapping[str, Any], vectors: Sequence[str]) -> RunOptions:
    changes: dict[str, Any] = {"vectors": tuple(vectors)}
    for name, value in chosen.items():
        *above, last = known_choices()[name][0]
        table = changes
        for part in above:
            table = table.setdefault(part, {})
        table[last] = value
    options: RunOptions = _replaced(RunOptions(), changes)
    return options


def _replaced(value: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a dataclass with changed fields; a field that is a dataclass takes a dict of changes."""
    own = {
        name: _replaced(getattr(value, name), change) if is_dataclass(getattr(value, name)) else change
        for name, change in changes.items()
    }
    return replace(value, **own)
