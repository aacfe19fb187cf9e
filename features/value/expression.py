"""Features made of declared columns: an expression in SQL over one table or two, or a small table that maps values.

One engine (polars) evaluates an expression in the frame, the stream's step and the server, over columns of fixed types.
So a feature has the same bits in all three. An expression must treat each row alone: a sum or a rank over rows would
depend on the batch, and is refused when the descriptor is read.
Shape letter: R, the rows of a table.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from features.config import Config, nearest
from features.value.canonical import VERSION, canonical

Kind = Literal["categorical", "numeric"]
Input = Literal["text", "number", "time"]

ENTITIES = ("item", "user", "event")
INPUT_TYPES: dict[str, pl.DataType] = {"text": pl.String(), "number": pl.Float64(), "time": pl.Datetime("us")}
MOST_VALUES = 10_000
"""Most values of a lookup table. A bundle's manifest holds them all."""

_NAME = re.compile(r"[^\W\d][\w-]*")
# Text, then a quoted name, then a qualified name: item.price, item."unit price".
_TOKEN = re.compile(r"""'(?:[^']|'')*'|\b(item|user|event)\.("(?:[^"]|"")+"|[^\W\d]\w*)|"(?:[^"]|"")*\"""")
_FAULTS = (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, ValueError, OverflowError)
# Values of a probe. A sum, a rank or a neighbour's value differs between all its rows, a few rows and one row.
_PROBE_ROWS = 96
_PROBE: dict[str, list[Any]] = {
    "text": ["a", "b", None, "a", "7", "2.5", "", "x y"],
    "number": [1.0, -2.5, None, 0.0, 7.0, 1e9, 0.25, float("nan")],
    "time": [0, 86_399_000_000, None, -1, 951_782_400_000_000, 1_700_000_000_000_000, 1, 4_102_444_800_000_000],
}


class Derived(Config):
    """Feature made of declared columns: `sql`, or `column` with `values` or `file`.

    Attributes:
        sql: Expression in polars' SQL over columns that are written `item.price`, `user.country`, `event.at`.
        column: Column whose values are looked up, written `user.country`.
        values: Results by value, as canonical text. A value without a result is null.
        file: csv of such results, relative to the descriptor, with the columns `key` and `value`.
        kind: `categorical` or `numeric`. By default text, truth values and dates are categorical, and numbers and
            durations (in seconds) are numeric.
    """

    sql: str | None = Field(None, min_length=1)
    column: str | None = Field(None, min_length=1)
    values: dict[str, str | float] | None = None
    file: str | None = Field(None, min_length=1)
    kind: Kind | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        looks_up = self.column is not None
        if (self.sql is not None) == looks_up:
            raise ValueError('write either sql = "...", or column = "..." with values or file')
        if looks_up != (self.values is not None or self.file is not None):
            raise ValueError("column needs values = {...} or file, and they need column")
        if self.values is not None and not 1 <= len(self.values) <= MOST_VALUES:
            raise ValueError(f"values: expected 1 to {MOST_VALUES:,} values, got {len(self.values):,}")
        return self


class Expression:
    """Compiled feature of one table, or of an event together with its item or user.

    Attributes:
        name: Name of the feature, and of its column.
        of: Table of its columns: `item`, `user` or `event`. A feature of several tables is of the event.
        inputs: Names of the columns that it reads, by table.
        crosses: True if it reads columns of several tables, so that it differs for each candidate.
        kind: `categorical` or `numeric`.

    Args:
        name: Name of the feature.
        declared: Declaration of the feature.
        columns: Type of every column that an expression may read, by table and name.

    Raises:
        ValueError: The declaration cannot be used; says why and what to do.
    """

    def __init__(self, name: str, declared: Derived, columns: Mapping[str, Mapping[str, Input]]) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{name}': a name has letters, digits, _ and -; rename the feature")
        self.name = name
        text = declared.sql if declared.sql is not None else qualified(str(declared.column))
        try:
            self._expression = pl.sql_expr(_TOKEN.sub(_quoted, text))
            roots = tuple(dict.fromkeys(self._expression.meta.root_names()))
        except _FAULTS as error:
            raise ValueError(f"{name}: {text!r} is not an expression ({_first_line(error)}); fix it") from error
        self._types = _input_types(name, text, roots, columns)
        self.inputs: dict[str, tuple[str, ...]] = {}
        for root in self._types:
            entity, _, column = root.partition(".")
            self.inputs[entity] = (*self.inputs.get(entity, ()), column)
        self.crosses = len(self.inputs) > 1
        self.of = "event" if self.crosses else next(iter(self.inputs))
        if declared.values is not None:
            self._expression = _looked_up(self._expression, declared.values)
        dtype = self._dtype(text)
        self._spans = isinstance(dtype, pl.Duration)
        self.kind: Kind = declared.kind or ("numeric" if dtype.is_numeric() or self._spans else "categorical")
        if self.kind == "numeric" and (dtype == pl.String or (dtype.is_temporal() and not self._spans)):
            raise ValueError(f"{name}: {text!r} gives {dtype}, which is no number; remove kind, or cast it")
        self._refuse_neighbours(text)

    @property
    def types(self) -> Mapping[str, Input]:
        """Types of the columns that it reads, by their name with the table."""
        return self._types

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all columns that it reads, each with its table, such as `item.price`."""
        return tuple(self._types)

    def evaluate(self, inputs: pl.DataFrame, *, version: int = VERSION) -> pl.Series:
        """Returns the feature of each row of one table (R, …), whose columns have no prefix; see `evaluate`."""
        return evaluate([self], inputs.rename(lambda name: f"{self.of}.{name}"), version=version)[0]

    def column(self) -> pl.Expr:
        """Returns the feature over columns that are named as `item.price`: Float32 if numeric, else uncanonical."""
        found = self._expression
        if self._spans:
            found = found.dt.total_microseconds().cast(pl.Float64) / 1_000_000
        if self.kind == "numeric":
            found = found.cast(pl.Float64).cast(pl.Float32)
            found = pl.when(found.is_finite()).then(found)
        return found.alias(self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.__getstate__() == other.__getstate__()

    def __hash__(self) -> int:
        return hash((self.name, self.reads, self.kind))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_expression": self._expression.meta.serialize()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_expression": pl.Expr.deserialize(state["_expression"])})

    def _dtype(self, text: str) -> pl.DataType:
        frame = pl.LazyFrame(schema={name: INPUT_TYPES[kind] for name, kind in self._types.items()})
        try:
            dtype = frame.select(found=self._expression).collect_schema()["found"]
        except _FAULTS as error:
            problem = f"{text!r} does not fit its columns ({_first_line(error)}); fix it"
            raise ValueError(f"{self.name}: {problem}") from error
        if dtype.is_numeric() or dtype.is_temporal() or dtype in (pl.String, pl.Boolean):
            return dtype
        raise ValueError(f"{self.name}: {text!r} gives {dtype}; a feature is text, a number, a time or a truth value")

    def _refuse_neighbours(self, text: str) -> None:
        """Refuses an expression that fails on a value, or whose result for a row depends on other rows."""
        rng = np.random.default_rng(0)
        probe = pl.DataFrame(
            [
                pl.Series(name, _PROBE[kind]).cast(INPUT_TYPES[kind])[rng.integers(0, 8, _PROBE_ROWS)]
                for name, kind in self._types.items()
            ]
        )
        try:
            whole = evaluate([self], probe)[0]
            alone = [evaluate([self], probe[row : row + 1])[0] for row in range(8)]
            parts = [evaluate([self], probe[row : row + 8])[0] for row in range(8, _PROBE_ROWS, 8)]
        except _FAULTS as error:
            remedy = "write an expression that fails for no value, such as TRY_CAST(x AS DOUBLE)"
            raise ValueError(f"{self.name}: {text!r} fails for some values ({_first_line(error)}); {remedy}") from error
        if len(whole) != probe.height or not whole.equals(pl.concat([*alone, *parts])):
            raise ValueError(
                f"{self.name}: {text!r} reads other rows too, such as a sum or a rank; an expression treats each row "
                "alone. [aggregates] counts over events"
            )


def evaluate(expressions: Sequence[Expression], inputs: pl.DataFrame, *, version: int = VERSION) -> list[pl.Series]:
    """Returns features, evaluated together.

    Args:
        expressions: Features.
        inputs: (R, …) the columns that the features read, named as in `reads`, of the types in `INPUT_TYPES`.
        version: Version of the canonical form of categorical values.

    Returns:
        For each feature (R,) String if categorical, and (R,) Float32 if numeric: a result that is not finite is null,
        and a duration is its seconds.
    """
    found = inputs.select(one.column() for one in expressions)
    return [
        own if one.kind == "numeric" else canonical(own, version=version).cast(pl.String)
        for one, own in zip(expressions, found.iter_columns(), strict=True)
    ]


def qualified(name: str) -> str:
    """Returns a column such as `user.country of birth` with quotes around its name, as an expression writes it."""
    entity, dot, column = name.partition(".")
    quoted = column if column.startswith('"') else '"' + column.replace('"', '""') + '"'
    return f"{entity}.{quoted}" if dot else name


def _quoted(token: re.Match[str]) -> str:
    """Returns `item.price` as one quoted name, and any other token unchanged."""
    if token[1] is None:
        return token[0]
    column = token[2][1:-1] if token[2].startswith('"') else token[2]
    return f'"{token[1]}.{column}"'


def _input_types(
    name: str, text: str, roots: tuple[str, ...], columns: Mapping[str, Mapping[str, Input]]
) -> dict[str, Input]:
    """Returns the type of each column that an expression reads, by its name with the table."""
    if not roots:
        raise ValueError(f"{name}: {text!r} reads no column; write a column as item.price, user.country or event.at")
    found: dict[str, Input] = {}
    valid = [f"{entity}.{column}" for entity, known in columns.items() for column in known]
    for root in roots:
        entity, _, column = root.partition(".")
        if column not in columns.get(entity, {}):
            known = f"the nearest is '{nearest(root, valid)}' (valid: {', '.join(valid)})" if valid else "there is none"
            raise ValueError(
                f"{name}: '{root}' is no column that an expression reads; {known}. Declare a column that is no feature "
                'under read, such as read = { released = "time" }'
            )
        found[root] = columns[entity][column]
    return found


def _looked_up(column: pl.Expr, values: Mapping[str, str | float]) -> pl.Expr:
    numbers = all(isinstance(value, float) for value in values.values())
    dtype = pl.Float64() if numbers else pl.String()
    results = [value if numbers else str(value) for value in values.values()]
    return column.replace_strict(list(values), results, default=None, return_dtype=dtype)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:160]
