"""The plan of a dataset's aggregates: the columns that they give, and the groups of sums behind them.

Aggregates by the same entities share one group, whose sums are kept once. A plan is part of a bundle's schema.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from features.dataset.aggregate import ALL, PREFIX, Aggregate, duration_us
from features.dataset.descriptor import Dataset

Choice = Literal["default", "declared", "off"]
USER_HALF_LIVES, ITEM_HALF_LIVES = ("1h", "7d"), ("30d",)
_DECAYED_PRIOR = 5.0
_LEAST_RATE = 1e-4
_MOST_ENTITIES = 2
MOST_CROSSED: Final = 16
"""Most default aggregates that are by two entities or columns."""
MOST_KEYS: Final = 5_000_000
"""Default of `AggregatePlan.most_keys`; a key of a default aggregate takes about 100 bytes."""
COUNT, POSITIVE = "count", "positive"


@dataclass(frozen=True)
class Aggregation:
    """One declared aggregate, resolved.

    Attributes:
        name: Name in the descriptor.
        by: Entities or columns of entities.
        kind: `count`, `positive`, `rate`, `recency`, `sum`, `mean`, `min`, `max`, `last` or `distinct`.
        column: Column of the events; "" for kinds that count events.
        windows: `all`, or durations.
        half_lives: Durations.
        prior: Events of the base rate that a rate starts with.
    """

    name: str
    by: tuple[str, ...]
    kind: str
    column: str = ""
    windows: tuple[str, ...] = ()
    half_lives: tuple[str, ...] = ()
    prior: float = 10.0

    @property
    def channels(self) -> tuple[str, ...]:
        """Sums that the aggregate reads, by name."""
        if self.kind in (COUNT, POSITIVE):
            return (self.kind,)
        if self.kind == "rate":
            return (COUNT, POSITIVE)
        return {
            "sum": (f"sum {self.column}",),
            "mean": (f"sum {self.column}", f"present {self.column}"),
            "distinct": (f"distinct {self.column}",),
        }.get(self.kind, ())

    @property
    def horizons(self) -> tuple[tuple[str, str], ...]:
        """Pairs of the kind of horizon, `window` or `half_life`, and its duration."""
        return tuple(("window", text) for text in self.windows) + tuple(("half_life", t) for t in self.half_lives)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns that the aggregate gives; a rate gives its log-odds and the weight of its events."""
        if self.kind == "recency":
            return (f"{PREFIX}{self.name}",)
        found: list[str] = []
        for kind, text in self.horizons:
            name = f"{PREFIX}{self.name}.{text if kind == 'window' else f'half_{text}'}"
            found += [name, f"{name}.weight"] if self.kind == "rate" else [name]
        return tuple(found)


@dataclass(frozen=True)
class Group:
    """Sums that are kept for each combination of some entities.

    Attributes:
        by: Entities or columns of entities.
        aggregations: The aggregates that read the sums.
        channels: Names of the sums; every event adds one number to each.
        windows_us, half_lives_us: Horizons beside `all`, in microseconds, ascending.
        extremes: Kinds and columns of `min`, `max` and `last`.
        distinct: Columns whose values are counted once a key.
    """

    by: tuple[str, ...]
    aggregations: tuple[Aggregation, ...]
    channels: tuple[str, ...]
    windows_us: tuple[int, ...]
    half_lives_us: tuple[int, ...]
    extremes: tuple[tuple[str, str], ...] = ()
    distinct: tuple[str, ...] = ()


@dataclass(frozen=True)
class AggregatePlan:
    """All aggregates of a dataset.

    Attributes:
        aggregations: In the order of their columns.
        base_rate: Share of positives in training; a rate starts there.
        most_keys: Most keys of a group. A frame with more is refused; a stream forgets the keys whose last event is the
            oldest.
    """

    aggregations: tuple[Aggregation, ...] = ()
    base_rate: float = 0.5
    most_keys: int = MOST_KEYS

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, in their order."""
        return tuple(name for aggregation in self.aggregations for name in aggregation.columns)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Groups, in the order of their first aggregate."""
        return tuple(_group(by, self._of(by)) for by in dict.fromkeys(one.by for one in self.aggregations))

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """Entities and columns of entities that the aggregates are by."""
        return tuple(dict.fromkeys(part for one in self.aggregations for part in one.by))

    @cached_property
    def value_columns(self) -> tuple[str, ...]:
        """Numeric columns of the events that the aggregates read."""
        return tuple(dict.fromkeys(one.column for one in self.aggregations if one.column and one.kind != "distinct"))

    @cached_property
    def counted_columns(self) -> tuple[str, ...]:
        """Columns of the events whose distinct values are counted: `user`, `item` or a categorical column."""
        return tuple(dict.fromkeys(one.column for one in self.aggregations if one.kind == "distinct"))

    def _of(self, by: tuple[str, ...]) -> tuple[Aggregation, ...]:
        return tuple(one for one in self.aggregations if one.by == by)


NOTHING: Final = AggregatePlan()
"""The plan of no aggregates."""


def plan_of(dataset: Dataset, choice: Choice = "default", *, most_keys: int = MOST_KEYS) -> AggregatePlan:
    """Returns the declared aggregates of a dataset and, by default, the default ones before them.

    A declared aggregate replaces a default one of its name.
    """
    if choice == "off":
        return NOTHING
    declared = {name: _resolved(name, one) for name, one in dataset.aggregates.items()}
    default = {one.name: one for one in defaults(dataset)} if choice == "default" else {}
    return AggregatePlan(tuple((default | declared).values()), most_keys=most_keys)


def defaults(dataset: Dataset) -> tuple[Aggregation, ...]:
    """Returns the aggregates of a dataset that declares none.

    With a clock and explicit labels: rates of users and items, of all time and decayed, of users by each categorical
    column of the items, of items by each of the users, and of each pair of such columns; at most `MOST_CROSSED` are by
    two. With a clock and implicit labels: counts and recencies, since a rate has no denominator. Without a clock: none.
    """
    events = dataset.events
    if events.time is None:
        return ()
    named = [kind for kind, column in (("user", events.user), ("item", events.item)) if column]
    half_lives = {"user": USER_HALF_LIVES, "item": ITEM_HALF_LIVES}
    found: list[Aggregation] = []
    kind = COUNT if events.label.implicit else "rate"
    for entity in named:
        found.append(Aggregation(f"{entity}_{kind}", (entity,), kind, windows=(ALL,)))
        decayed = Aggregation(f"{entity}_mood", (entity,), kind, half_lives=half_lives[entity], prior=_DECAYED_PRIOR)
        found.append(decayed)
        if events.label.implicit:
            found.append(Aggregation(f"{entity}_recency", (entity,), "recency"))
    if len(named) == _MOST_ENTITIES:
        crossed = _crosses(dataset.entity_columns, columns_alone=kind == "rate")
        found += [Aggregation(_crossed(by), by, kind, windows=(ALL,)) for by in crossed[:MOST_CROSSED]]
    return tuple(found)


def _crosses(columns: Mapping[str, tuple[str, ...]], *, columns_alone: bool) -> list[tuple[str, str]]:
    """Returns the pairs of user and item, one or both by a column; users by a column of the items come first."""
    of_users, of_items = ([f"{kind}.{name}" for name in columns[kind]] for kind in ("user", "item"))
    pairs = [("user", column) for column in of_items] + [("item", column) for column in of_users]
    return pairs + [(user, item) for user in of_users for item in of_items if columns_alone]


def column_of(part: str) -> tuple[str, str]:
    """Returns the entity and column of a part: `item` and `genres` of `item.genres`, `user` and `user_id` of `user`.

    The salt of the column's keys is the part, or the column if the part is an entity.
    """
    entity, _, column = part.partition(".")
    return entity, column or f"{entity}_id"


def _crossed(by: tuple[str, ...]) -> str:
    return "_".join(part.replace(".", "_") for part in by)


def _resolved(name: str, declared: Aggregate) -> Aggregation:
    windows = declared.windows
    if windows is None:
        windows = () if declared.half_life or declared.kind == "recency" else (ALL,)
    return Aggregation(
        name, declared.by, declared.kind, declared.column, windows, declared.half_life, float(declared.prior)
    )


def _group(by: tuple[str, ...], aggregations: Sequence[Aggregation]) -> Group:
    windows = {duration_us(text) for one in aggregations for text in one.windows if text != ALL}
    half_lives = {duration_us(text) for one in aggregations for text in one.half_lives}
    extremes = [(one.kind, one.column) for one in aggregations if one.kind in ("min", "max", "last")]
    return Group(
        by,
        tuple(aggregations),
        tuple(dict.fromkeys(channel for one in aggregations for channel in one.channels)),
        tuple(sorted(windows)),
        tuple(sorted(half_lives)),
        tuple(dict.fromkeys(extremes)),
        tuple(dict.fromkeys(one.column for one in aggregations if one.kind == "distinct")),
    )


def with_base_rate(plan: AggregatePlan, rate: float) -> AggregatePlan:
    """Returns the plan with the share of positives in training, which stays off 0 and 1."""
    return replace(plan, base_rate=min(max(rate, _LEAST_RATE), 1 - _LEAST_RATE))


def horizon_us(text: str) -> int:
    """Returns a horizon in microseconds, 0 for `all`."""
    return 0 if text == ALL else duration_us(text)
