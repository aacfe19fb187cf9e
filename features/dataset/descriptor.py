"""The dataset descriptor: one TOML file becomes one frozen, checked configuration.

This object alone describes a dataset to all other code, so no code knows any dataset by name. This module checks only
the descriptor. The contents of files are checked when they are read (`features.dataset.tables`).
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

from features.config import Config, refuse_repeats
from features.dataset.aggregate import Aggregate, DeclaredEvents, check_aggregates, duration_us
from features.dataset.clock import Time
from features.dataset.files import read_lookup
from features.dataset.label import TASK, Label, TaskLabel, Tasks, with_judged
from features.dataset.plain_text import read_text
from features.dataset.source import TableSource
from features.dataset.split import Split
from features.errors import DatasetError
from features.shown.declared import READ_US, SURFACE, check_shown, shown_defaults
from features.shown.placement import POSITION, Placement, check_placement
from features.shown.policy import Policy, check_policies
from features.shown.rule import JoinRule
from features.storage.location import refuse_address
from features.value.expression import Derived, Expression, Input
from features.value.field import RequestField, declared_fields
from features.value.vector import GivenSpace, declared_spaces

_DIRECTORY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Items(TableSource):
    """The catalogue: one row per item.

    Attributes:
        id: Column of the item's id.
        text: Columns that the encoder reads.
        vectors: Vectors that the team brings, by name: `clip = "clip_vector"` is a column, `clip = "clip.npy"` a file.
            A name is an encoder of `[run]`.
        filterable: Columns on which retrieval may filter.
        aspects: Columns of each aspect, by its name: `people = ["director", "actors"]`. An aspect is a space in which
            items are near that share values of the columns.
        concepts: Column whose values are concepts that the content of an item predicts.
        glossary: csv of further concepts, with the columns `term` and `text`, relative to the descriptor.
    """

    entity: ClassVar[str] = "item"
    reserved: ClassVar[tuple[str, ...]] = (
        "item_id",
        "text",
        "content_fields",
        "listed",
        "content_vector",
        "ranker_vector",
        "semantic_codes",
        "semantic_id",
        "train_positives",
        "message_row",
    )

    id: str
    text: tuple[str, ...] = ()
    vectors: dict[str, GivenSpace] = Field(default_factory=dict)
    filterable: tuple[str, ...] = ()
    aspects: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    concepts: str | None = Field(None, min_length=1)
    glossary: str | None = Field(None, min_length=1)

    @field_validator("vectors", mode="before")
    @classmethod
    def _long_form(cls, value: Any) -> Any:
        return declared_spaces(value)

    @model_validator(mode="after")
    def _check_vectors(self) -> Self:
        others = {self.id, *self.text, *self.categorical, *self.numeric, *self.read, *self.attributes}
        taken: dict[str, str] = {}
        for name, given in self.vectors.items():
            if not _DIRECTORY_NAME.fullmatch(name) or name in self.text:
                raise ValueError(
                    f"vectors.{name}: a name is letters, digits, '.', '_' and '-', and no column of text; rename it"
                )
            if given.column in others:
                raise ValueError(f"vectors.{name}: column '{given.column}' is declared for another use too; remove one")
            if given.column in taken:
                raise ValueError(f"vectors.{name}: column '{given.column}' is of vectors.{taken[given.column]} too")
            taken[given.column] = name
        return self

    @model_validator(mode="after")
    def _check_filterable(self) -> Self:
        refuse_repeats("text", self.text)
        refuse_repeats("filterable", self.filterable)
        for name in self.filterable:
            if name in self.reserved:
                raise ValueError(f"column '{name}' cannot be filterable: the name is taken; rename it in the files")
        return self

    @model_validator(mode="after")
    def _check_meaning(self) -> Self:
        for aspect, columns in self.aspects.items():
            refuse_repeats(f"aspects.{aspect}", columns)
            if not _DIRECTORY_NAME.fullmatch(aspect):
                raise ValueError(f"aspect '{aspect}': a name is letters, digits, '.', '_' and '-'; rename it")
            if not columns:
                raise ValueError(f"aspect '{aspect}' names no column; name columns, or remove the aspect")
        if (self.aspects or self.concepts or self.glossary) and not self.text:
            raise ValueError("aspects, concepts and glossary read the content of items; name text = [...] too")
        for name, field in self.named_for_meaning.items():
            if name in self.reserved:
                raise ValueError(f"{field}: column '{name}' cannot be used: the name is taken; rename it in the files")
        return self

    def readable(self) -> dict[str, Input]:
        """Returns the type of each column that an expression may read, by name."""
        found: dict[str, Input] = dict.fromkeys(self.text, "text")
        return found | super().readable()

    @property
    def vector_columns(self) -> tuple[str, ...]:
        """Columns of vectors in files, and of the names of their spaces."""
        found = [given.column for given in self.vectors.values() if given.file is None]
        return tuple(dict.fromkeys([*found, *(one.space_column for one in self.vectors.values() if one.space_column)]))

    @property
    def spaces(self) -> dict[str, str]:
        """Space of each of the vectors, by name."""
        return {name: given.space for name, given in self.vectors.items()}

    def with_widths(self, widths: Mapping[str, int]) -> Self:
        """Returns the items with the widths of vectors, by name, where the descriptor gives none."""
        known = {
            name: given
            if given.dim is not None or name not in widths
            else given.model_copy(update={"dim": widths[name]})
            for name, given in self.vectors.items()
        }
        return self.model_copy(update={"vectors": known})

    @property
    def named_for_meaning(self) -> dict[str, str]:
        """Columns of aspects and concepts, each with the first field that names it."""
        named = {name: f"[items.aspects] {aspect}" for aspect, names in self.aspects.items() for name in names}
        return named if self.concepts is None else {self.concepts: "[items] concepts"} | named

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns of filters, aspects and concepts that are no features; items keep their values as the files do."""
        featured = {*self.categorical_features, *self.numeric_features}
        return tuple(
            name for name in dict.fromkeys((*self.filterable, *self.named_for_meaning)) if name not in featured
        )


class Users(TableSource):
    """User profiles: one row per user.

    Attributes:
        id: Column of the user's id.
    """

    entity: ClassVar[str] = "user"
    reserved: ClassVar[tuple[str, ...]] = ("user_id", "listed")

    id: str


class Events(TableSource):
    """The interactions: one row per event. `categorical` and `numeric` are features of the event's context.

    Attributes:
        origin: Written `from`. `files` reads rows; `impressions` joins logs of what was shown with their outcomes.
        outcomes_path: Files of the outcomes, where `path` holds the impressions.
        outcomes: Kinds of outcomes. Each is a column of labels, 1 or 0.
        window: Time after an impression in which its outcomes count, such as `30m`.
        user: Column of the user's id.
        item: Column of the item's id.
        time: Column of the time, or a table of the column and its unit.
        order: Column that orders the events where there is no clock.
        forgotten: List of forgotten users, JSON lines relative to the descriptor: `tessera topics export forgotten`.
        placement: Columns that say where an item was shown, such as its position. A path of their own reads them.
        label: Rules of positive and negative events. With `labels` it is the label of the judged task.
        labels: Label and weight of each task by its name, in place of `label`: `click = { column = "clicked" }`.
        judge: Task that gates and rollouts judge, and whose positives are the history. Default: the first.
        score: Serving formula over the tasks' probabilities, such as `click * purchase ** 0.5`. Default: `judge`.
        request: Fields of each request, columns of the events, by name: `device = { type = "category" }`.
        candidate: Fields of each candidate of a request, columns of the events, by name.
    """

    entity: ClassVar[str] = "event"
    reserved: ClassVar[tuple[str, ...]] = (
        "event",
        "user_id",
        "item_id",
        "time",
        "label",
        "user",
        "item",
        "split",
        "history",
    )

    origin: Literal["files", "impressions"] = "files"
    outcomes_path: str | None = Field(None, min_length=1)
    outcomes: tuple[str, ...] = Field(("click",), min_length=1)
    window: str = "30m"
    user: str | None = None
    item: str | None = None
    time: Time | None = None
    order: str | None = None
    forgotten: str | None = Field(None, min_length=1)
    placement: Placement | None = None
    label: Label
    labels: dict[str, TaskLabel] = Field(default_factory=dict)
    judge: str | None = None
    score: str | None = None
    request: dict[str, RequestField] = Field(default_factory=dict)
    candidate: dict[str, RequestField] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _shown(cls, data: Any) -> Any:
        return declared_fields(with_judged(shown_defaults(data))) if isinstance(data, Mapping) else data

    @model_serializer(mode="wrap")
    def _without_derived(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Writes either one label or several, so that a descriptor with one label is written as before."""
        found: dict[str, Any] = written(self)
        derived = ("label",) if self.labels else ("labels", "judge", "score")
        return {name: value for name, value in found.items() if name not in derived}

    @field_validator("time", mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_clock(self) -> Self:
        if self.origin == "impressions":
            if self.is_table:
                raise ValueError(
                    'from = "impressions" joins two logs of files; export them, and set format = "parquet"'
                )
            check_shown(self)
            self.join_rule()
        clock = self.time.column if self.time else self.order
        self._check_tasks()
        declared = (*self.categorical, *self.numeric, *self.read, self.user, self.item, clock, *self.label_columns)
        check_placement(self, taken=declared, of_impressions=(POSITION, SURFACE))
        if self.forgotten is not None and self.user is None:
            raise ValueError('forgotten names users, so the events need user = "..."; add it, or remove forgotten')
        if self.candidate and self.label.implicit:
            name = next(iter(self.candidate))
            raise ValueError(
                f"candidate.{name}: a drawn negative was never a candidate, so its value cannot be known; remove the "
                "field, or learn from rows with negatives"
            )
        if self.time is not None and self.order is not None:
            raise ValueError("time and order both say when an event was; keep time if it is a clock, else order")
        if self.label.implicit and self.item is None:
            raise ValueError('label.implicit draws negative items, so the events need item = "..."')
        return self

    def _check_tasks(self) -> None:
        if self.tasks is None:
            return
        self.tasks.formula()
        if self.placement is not None:
            raise ValueError("placement: the position path has one label; remove [events.placement], or write label")
        for name in (*self.categorical, *self.numeric):
            if name.startswith(TASK):
                raise ValueError(f"column {name!r}: names that start with {TASK!r} are of tasks; rename the column")

    @property
    def tasks(self) -> Tasks | None:
        """Tasks of the events. None if one label is learnt."""
        if not self.labels:
            return None
        assert self.judge is not None
        assert self.score is not None
        return Tasks(self.labels, self.judge, self.score)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """Columns that the labels read."""
        labels = self.labels.values() or (self.label,)
        return tuple(dict.fromkeys(one.column for one in labels if one.column is not None))

    @property
    def fields(self) -> dict[str, RequestField]:
        """Fields of requests, then those of candidates, by name."""
        return self.request | self.candidate

    @property
    def varying(self) -> frozenset[str]:
        """Names of the features that differ between the candidates of a request."""
        reads = {f"event.{name}" for name in self.candidate}
        derived = (one.name for one in self.derived if reads & set(one.reads))
        return frozenset((*self.candidate, *derived, *(one.name for one in self.crossed)))

    @property
    def read_at(self) -> tuple[str, ...]:
        """Column of the time that expressions over the clock read, where rows come from impressions."""
        return (READ_US,) if self.origin == "impressions" and self.reads_clock else ()

    @property
    def reads_clock(self) -> bool:
        """True if an expression reads the time of the events."""
        clock = f"event.{self.time.column}" if self.time is not None else None
        return any(clock in one.reads for one in (*self.derived, *self.crossed))

    def join_rule(self) -> JoinRule:
        """Returns the rule that joins impressions with outcomes.

        Raises:
            ValueError: The window is no duration.
        """
        try:
            return JoinRule(self.outcomes, duration_us(self.window) // 1_000)
        except ValueError as error:
            raise ValueError(f"window: {error}") from error

    @property
    def lag(self) -> int:
        """Time after a row's own time until its label is known, in the unit of the events' time. 0 for files."""
        return 1_000 * self.join_rule().horizon_ms if self.origin == "impressions" else 0

    @property
    def placed(self) -> tuple[str, ...]:
        """Columns of the placement, the position first."""
        return () if self.placement is None else self.placement.columns

    @property
    def first_position(self) -> int:
        """Number of the first position: 0 for impressions, else as declared, by default 1."""
        first = self.placement.first if self.placement is not None else None
        return first if first is not None else int(self.origin == "files")

    def topics(self) -> dict[str, TableSource]:
        """Returns the exported files of both topics, by `impressions` and `outcomes`."""
        paths = {"impressions": self.path, "outcomes": self.outcomes_path or ""}
        return {
            topic: TableSource.model_validate({"path": path, "format": self.format}) for topic, path in paths.items()
        }

    def readable(self) -> dict[str, Input]:
        """Returns the type of each column that an expression may read, by name. The clock is a time."""
        clock: dict[str, Input] = {} if self.time is None else {self.time.column: "time"}
        return clock | super().readable()


CHOICES = frozenset({"run", "sweep"})
"""Keys of a descriptor that say nothing about the data: choices of runs."""


class Dataset(Config):
    """Dataset as its descriptor says.

    Attributes:
        name: Name of the model in the registry.
        items: The catalogue; optional.
        users: The user profiles; optional.
        events: The interactions.
        split: Division into train, validation and test.
        aggregates: Aggregates by name; see `features.dataset.aggregate`.
        features: Features that expressions make, by name; see `features.value.expression`.
        policies: Policies of what a user is shown, by name; see `features.shown.policy`.
        run: Choices of a run, read by `tessera run`: see `[run]` below.
        sweep: Values to try for choices of a run, read by `tessera sweep`.
        source: Path of the descriptor itself; no key of the file.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    items: Items | None = None
    users: Users | None = None
    events: Events
    split: Split
    aggregates: dict[str, Aggregate] = Field(default_factory=dict)
    features: dict[str, Derived] = Field(default_factory=dict)
    policies: dict[str, Policy] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, Any] = Field(default_factory=dict)
    source: Path

    @model_serializer(mode="wrap")
    def _without_empty(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A bundle of a dataset without policies keeps the id that earlier releases gave it.
        written: dict[str, Any] = write(self)
        return written if self.policies else {name: one for name, one in written.items() if name != "policies"}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.items is not None and self.events.item is None:
            raise ValueError('[items] needs item = "..." in [events], the column that names the event\'s item')
        if self.users is not None and self.events.user is None:
            raise ValueError('[users] needs user = "..." in [events], the column that names the event\'s user')
        if self.split.by == "time" and self.events.time is None:
            raise ValueError('[split] by = "time" needs time in [events]; without a clock use leave-one-out or order')
        if self.split.by == "leave-one-out" and self.events.user is None:
            raise ValueError('[split] by = "leave-one-out" needs user in [events]; use time, random or order')
        if self.aggregates and self.events.origin == "impressions":
            raise ValueError(
                "[aggregates] would count an outcome when its item was shown, before the outcome happened; remove "
                '[aggregates], or read [events] from = "files"'
            )
        self._derive()
        events = self.events
        declared = DeclaredEvents(
            events.time is not None, events.label.implicit, events.row_numbers, events.row_categories
        )
        check_aggregates(self.aggregates, self.entity_columns, declared)
        check_policies(
            self.policies,
            self.items,
            has_content=self.has_content,
            has_users=events.user is not None and events.item is not None,
        )
        return self

    def _derive(self) -> None:
        """Compiles the expressions of `[features]` and gives each table its own."""
        tables = {"item": self.items, "user": self.users, "event": self.events}
        columns = {entity: source.readable() for entity, source in tables.items() if source is not None}
        try:
            compiled = [Expression(name, declared, columns) for name, declared in self.features.items()]
            self._refuse_unknown_when_serving(compiled)
            for entity, source in tables.items():
                if source is not None:
                    crossing = (name for one in compiled if one.crosses for name in one.inputs.get(entity, ()))
                    source.derive((one for one in compiled if one.of == entity), crossing)
        except ValueError as error:
            raise ValueError(f"[features] {error}") from error

    def _refuse_unknown_when_serving(self, expressions: Iterable[Expression]) -> None:
        """Refuses a feature of a column that exists only after a request was answered."""
        events = self.events
        late = dict.fromkeys(events.label_columns, "the label") | {events.order: "the order of the events"}
        for one in expressions:
            for name in one.inputs.get("event", ()):
                if name in late:
                    raise ValueError(
                        f"{one.name}: event.{name} is {late[name]}, which a server cannot know when it ranks; "
                        "remove the column from the expression"
                    )

    @property
    def entity_columns(self) -> dict[str, tuple[str, ...]]:
        """Categorical columns of the entities that the events name: `user` and `item`, each where declared."""
        tables = (("user", self.events.user, self.users), ("item", self.events.item, self.items))
        return {kind: table.categorical_features if table else () for kind, named, table in tables if named}

    @property
    def keeps_consumed(self) -> bool:
        """True if a policy leaves out consumed items, so that bundle and stream keep all of them."""
        return any(policy.leave_out_consumed for policy in self.policies.values())

    @property
    def directory(self) -> Path:
        """Directory to which the paths in the descriptor are relative."""
        return self.source.parent

    @property
    def has_content(self) -> bool:
        """True if items have text or vectors, so that they can be encoded and given Semantic IDs."""
        return self.items is not None and bool(self.items.text or self.items.vectors)

    @property
    def has_text(self) -> bool:
        """True if items have text."""
        return self.items is not None and bool(self.items.text)


def load_dataset(path: str | Path) -> Dataset:
    """Reads and checks a descriptor. One error reports everything that is wrong with it.

    Args:
        path: TOML file. The paths in it are relative to its directory.

    Returns:
        The description of the dataset. Its tables are not read yet.

    Raises:
        DatasetError: The file is missing, not UTF-8 or not TOML, or a key is unknown, missing or has an unusable value.

    Example:
        >>> dataset = load_dataset("data/dataset.toml")
        >>> dataset.name, dataset.has_content
        ('synthetic', True)
    """
    refuse_address(Path(path), "copy the descriptor to this disk; the path of a table in it may be an address")
    path = Path(path).absolute()
    try:
        document = tomllib.loads(read_text(path))
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); give the path of a dataset's TOML") from error
    except tomllib.TOMLDecodeError as error:
        raise DatasetError(f"{path}: is not TOML: {error}; fix the file there") from error
    if "source" in document:
        raise DatasetError(f"{path}: unknown key 'source'; remove it, the descriptor's own path takes its place")
    try:
        return Dataset.model_validate({**document, "features": _declared_features(document, path), "source": path})
    except ValidationError as error:
        raise DatasetError("\n".join(f"{path}: {_explain(e)}" for e in error.errors())) from error


def _declared_features(document: dict[str, Any], path: Path) -> Any:
    """Returns `[features]` in its long form: an expression as `sql`, a file of results as `values`.

    A bundle then holds the results of a lookup table too.
    """
    declared = document.get("features", {})
    if not isinstance(declared, dict):
        return declared
    found: dict[str, Any] = {}
    for name, one in declared.items():
        found[name] = {"sql": one} if isinstance(one, str) else one
        if isinstance(one, dict) and isinstance(one.get("file"), str) and "values" not in one:
            values = read_lookup(one["file"], path.parent, table=f"features.{name}")
            found[name] = {key: value for key, value in one.items() if key != "file"} | {"values": values}
    return found


def _explain(error: ErrorDetails) -> str:
    """Returns one pydantic error as "[events] label.positive: what is wrong"."""
    table, *keys = [str(part) for part in error["loc"]] or [""]
    tables = {"items", "users", "events", "split", "aggregates", "features", "policies", *CHOICES}
    is_table = bool(keys) or table in tables
    where = " ".join(part for part in (f"[{table}]" if is_table else table, ".".join(keys)) if part)
    if error["type"] == "missing":
        message = "is missing; add it"
    elif error["type"] in {"value_error", "unknown_key"}:
        message = error["msg"].removeprefix("Value error, ")
    elif error["type"] in {"model_type", "dataclass_type", "dict_type"}:
        message = f"expected a table, {{ KEY = VALUE, … }}; got {error['input']!r}"
    else:
        message = f"{error['msg'][:1].lower()}{error['msg'][1:]}; got {error['input']!r}"
    return f"{where}: {message}" if where else message
