"""Declaration of aggregates: `[aggregates]` of the descriptor, checked against its other tables.

An aggregate is a number of an entity as of a time: a count, a smoothed rate, a sum. `features.aggregate` computes it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from features.config import Config, nearest, refuse_repeats

PREFIX: Final = "aggregate."
"""Opening of the names of the columns that aggregates give."""
ALL: Final = "all"
"""Window that never ends."""

Counted = Literal["count", "positive", "rate", "recency"]
OfColumn = Literal["sum", "mean", "min", "max", "last", "distinct"]
COUNTED: Final = ("count", "positive", "rate", "recency")
OF_COLUMN: Final = ("sum", "mean", "min", "max", "last", "distinct")
_UNENDING: Final = ("min", "max", "last", "distinct", "recency")
_DECAYING: Final = ("count", "positive", "rate")

_UNIT_US: Final = {"s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000, "w": 604_800_000_000}
_DURATION: Final = re.compile(r"([1-9][0-9]{0,6})([smhdw])")
_LEAST_WINDOW_US, _MOST_US = 60_000_000, 1_000 * _UNIT_US["d"]
_MOST_PARTS = 2
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def duration_us(text: str) -> int:
    """Returns a duration such as "30m", "1h" or "7d" in microseconds.

    Raises:
        ValueError: The text is no duration, or shorter than a second or longer than 1,000 days.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is no duration; write a whole number and a unit, such as "30m", "1h", "7d"')
    found = int(match[1]) * _UNIT_US[match[2]]
    if found > _MOST_US:
        raise ValueError(f'{text!r} is longer than 1,000 days; write a shorter duration, or windows = ["all"]')
    return found


class Aggregate(Config):
    """An aggregate by an entity, by a column of an entity, or by both.

    Attributes:
        by: `user`, `item`, a categorical column of them such as `item.genres`, or a list of two of these.
        value: `positive` and `count` count positives and events; `rate` is the smoothed share of positives; `recency`
            is the time since the last event; `{ sum = COLUMN }` takes a numeric column of the events, as do `mean`,
            `min`, `max` and `last`; `{ distinct = COLUMN }` counts values of `item`, `user` or a categorical column
            of the events.
        windows: Windows that end at the event's time: `all`, or durations such as `7d`.
        half_life: Half-lives of exponentially decayed counts and rates, in place of windows.
        prior: Events of the average rate that a rate starts with.
    """

    by: tuple[str, ...]
    value: str | dict[str, str]
    windows: tuple[str, ...] | None = None
    half_life: tuple[str, ...] = ()
    prior: float = Field(10.0, gt=0)

    @field_validator("by", "windows", "half_life", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("value")
    @classmethod
    def _known(cls, value: str | dict[str, str]) -> str | dict[str, str]:
        valid = COUNTED if isinstance(value, str) else OF_COLUMN
        names = [value] if isinstance(value, str) else list(value)
        if len(names) != 1:
            raise ValueError(f'a value of a column is written {{ sum = "price" }}, got {value}')
        if names[0] not in valid:
            written = names[0] if isinstance(value, str) else f"{{ {names[0]} = … }}"
            every = ", ".join((*COUNTED, *(f"{{ {name} = COLUMN }}" for name in OF_COLUMN)))
            raise ValueError(f"unknown value {written}; the nearest is {nearest(names[0], valid)} (valid: {every})")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_repeats("by", self.by)
        if not 1 <= len(self.by) <= _MOST_PARTS:
            raise ValueError(f"by takes one or two of user, item and their columns, got {len(self.by)}")
        ended = [window for window in self.windows or () if window != ALL]
        for text in (*ended, *self.half_life):
            if duration_us(text) < _LEAST_WINDOW_US:
                raise ValueError(f"{text!r} is shorter than a minute; write a longer duration")
        refuse_repeats("windows", self.windows or ())
        refuse_repeats("half_life", self.half_life)
        if self.half_life and self.kind not in _DECAYING:
            raise ValueError(f"half_life goes with {', '.join(_DECAYING)}; remove half_life from {self.kind}")
        if ended and self.kind in _UNENDING:
            raise ValueError(f'{self.kind} knows windows = ["all"] alone; remove {ended[0]!r}')
        return self

    @property
    def kind(self) -> str:
        """Name of the value: `rate`, `sum` and so on."""
        return self.value if isinstance(self.value, str) else next(iter(self.value))

    @property
    def column(self) -> str:
        """Column of the events that the value is of; "" for a value that counts events."""
        return "" if isinstance(self.value, str) else next(iter(self.value.values()))

    @property
    def timed(self) -> bool:
        """True if the aggregate needs a clock."""
        return bool(self.half_life) or self.kind == "recency" or any(name != ALL for name in self.windows or ())


class DeclaredEvents(NamedTuple):
    """Declarations of the events that decide which aggregates are possible.

    Attributes:
        clock: True if events have a time.
        implicit: True if every event is a positive.
        numeric, categorical: Columns of the events' context.
    """

    clock: bool
    implicit: bool
    numeric: tuple[str, ...]
    categorical: tuple[str, ...]


def check_aggregates(
    aggregates: Mapping[str, Aggregate], columns: Mapping[str, tuple[str, ...]], events: DeclaredEvents
) -> None:
    """Raises ValueError if an aggregate names what the dataset lacks, or a column of the events is named like one.

    Args:
        aggregates: Aggregates by name.
        columns: Categorical columns of the entities that the events name, by entity.
        events: Declarations of the events.
    """
    for name in (*events.numeric, *events.categorical):
        if name.startswith(PREFIX):
            raise ValueError(f"[events] column '{name}' begins like an aggregate's column; rename it in the files")
    valid = [*columns, *(f"{kind}.{name}" for kind, names in columns.items() for name in names)]
    for name, declared in aggregates.items():
        where = f"[aggregates] {name}"
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: a name has letters, digits, _ and -; rename the aggregate")
        for part in declared.by:
            if part not in valid:
                near = nearest(part, valid)
                known = f"the nearest is '{near}' (valid: {', '.join(valid)})" if valid else "the events name no entity"
                raise ValueError(f"{where}: by = '{part}' is no entity or categorical column of one; {known}")
        if declared.timed and not events.clock:
            raise ValueError(
                f'{where}: a window of time needs time = "..." in [events]; without a clock keep windows = ["all"]'
            )
        if declared.kind == "rate" and events.implicit:
            raise ValueError(f"{where}: with an implicit label every event is a positive; use count or recency")
        if declared.column:
            _check_column(where, declared, list(columns), events)


def _check_column(where: str, declared: Aggregate, entities: Sequence[str], events: DeclaredEvents) -> None:
    distinct = declared.kind == "distinct"
    valid = [*entities, *events.categorical] if distinct else list(events.numeric)
    if declared.column not in valid:
        expected = "user, item or a categorical column of [events]" if distinct else "a numeric column of [events]"
        known = f"the valid names are {', '.join(valid)}" if valid else "[events] declares none"
        raise ValueError(f"{where}: {declared.kind} = '{declared.column}' must be {expected}; {known}")
