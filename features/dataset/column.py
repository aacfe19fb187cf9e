"""Converts one column as the files hold it to the values the platform works with.

Identifiers and categorical values become canonical text (`features.value.canonical`), whatever type a file gave them.
Numbers and labels get one type each. Text is parsed value by value. A value that cannot be converted is refused with
its row. Shape letter: R, the rows of the table.
"""

import numpy as np
import polars as pl

from features.dataset.files import SourceTable, infer
from features.dataset.label import Label, LabelRule, parse_rule
from features.dataset.source import Categorical
from features.value.attribute import typed
from features.value.canonical import canonical
from features.value.written_list import WrittenListError, written_lists

__all__ = ["canonical", "typed"]
_WRITTEN = {"value": pl.String(), "list": pl.List(pl.String)}
# A bundle with an earlier canonical form of ids and categories takes each text unchanged.
_WRITTEN_FROM = 2
# Most rows of a batch of messages; a larger column is not copied.
_FEW = 65_536
# Largest number of a position; a larger one is an id or a time.
_MOST_POSITION = 1_000_000


def texts(table: SourceTable, name: str) -> pl.Series:
    """Returns a column as canonical text or lists of it; see `features.value.canonical`."""
    values = table.column(name)
    try:
        found = canonical(values, version=table.version)
    except TypeError as error:
        raise table.error(name, f"{error}, text or numbers expected; flatten the column in the files") from error
    if (row := _nul(found)) is not None:
        raise table.error(name, "holds a NUL character, which is not text; remove it", row=row)
    return found


def _nul(values: pl.Series) -> int | None:
    if values.dtype == pl.String:
        if len(values) <= _FEW and not _holds_nul(values):
            return None
        return first(values.str.contains("\0", literal=True))
    if not values.list.len().sum():
        return None
    return first(values.list.eval(pl.element().str.contains("\0", literal=True)).list.any())


def _holds_nul(values: pl.Series) -> bool:
    """True if a text may hold a NUL. Polars' expressions take a third of a millisecond, whatever the length."""
    data = values.to_arrow().buffers()[-1]
    return data is not None and b"\0" in bytes(memoryview(data))


def attribute(table: SourceTable, name: str) -> pl.Series:
    """Returns a filterable column with the type of the files; the type of a csv column is inferred by `files.infer`."""
    return infer(table.column(name)) if table.kind == "csv" else table.column(name)


def ids(table: SourceTable, name: str) -> pl.Series:
    """Returns an identifier column: (R,) String without nulls."""
    values = texts(table, name)
    if isinstance(values.dtype, pl.List):
        raise table.error(name, "holds lists, but an id is one value; name another column")
    if values.null_count():
        raise table.error(name, "the id is null; fill it in, or remove the row", row=first(values.is_null()))
    return values


def unique_ids(table: SourceTable, name: str) -> pl.Series:
    """Returns an identifier column in which no id comes twice: (R,) String."""
    values = ids(table, name)
    row = first(~values.is_first_distinct())
    if row is not None:
        file, number = table.place(int((values == values[row]).arg_true()[0]))
        raise table.error(name, f"id '{values[row]}' is also in row {number} of {file.name}; keep one of them", row=row)
    return values


def categories(table: SourceTable, name: str, options: Categorical) -> pl.Series:
    """Returns a categorical feature: (R,) String, or (R,) List(String) where it is multi-valued; null stays null.

    Splitting trims each value and drops the empty ones. A list column is multi-valued with or without `split`; a column
    in which a list is written as text is multi-valued too.
    """
    values = texts(table, name)
    if isinstance(values.dtype, pl.List):
        return values
    try:
        written = written_lists(values, options.split) if table.version >= _WRITTEN_FROM else {}
    except WrittenListError as error:
        remedy = "write it as JSON, or give the values with split between them"
        raise table.error(name, f"{error}; {remedy}", row=(values == error.text).arg_max()) from error
    if options.split is None and not written:
        return values
    part = pl.element().str.strip_chars()
    split = pl.col("value").str.split(options.split) if options.split else pl.concat_list("value")
    lists = split.list.eval(part.filter(part != "")) if options.split else split
    known = pl.DataFrame({"value": [*written], "list": [*written.values()]}, schema_overrides=_WRITTEN)
    found = values.to_frame("value").join(known, on="value", how="left", maintain_order="left")
    chosen = pl.when(pl.col("value").is_not_null()).then(pl.coalesce("list", lists))
    return found.select(chosen.alias(name)).to_series()


def numbers(table: SourceTable, name: str) -> pl.Series:
    """Returns a numeric feature: (R,) Float32. NaN, and a number outside the range of float32, become null."""
    numeric = _numeric(table, name).cast(pl.Float32).alias("value").to_frame()
    return numeric.select(pl.when(pl.col("value").is_finite()).then("value")).to_series().alias(name)


def wide_numbers(table: SourceTable, name: str) -> pl.Series:
    """Returns a column of numbers as expressions read it: (R,) Float64. A number that is not finite becomes null."""
    found = _numeric(table, name).cast(pl.Float64).to_numpy()
    return pl.Series(name, np.where(np.isfinite(found), found, np.nan), nan_to_null=True)


def _numeric(table: SourceTable, name: str) -> pl.Series:
    """Returns a column of numbers in the type of the files; text is parsed."""
    values = table.column(name)
    if isinstance(values.dtype, pl.String):
        values = parsed(
            table, name, "a number is expected in a numeric column; fix the value, or declare it categorical"
        )
    elif not (values.dtype.is_numeric() or isinstance(values.dtype, (pl.Boolean, pl.Null))):
        raise table.error(name, f"holds {values.dtype}, numbers expected; remove it from numeric")
    return values


def positions_shown(table: SourceTable, name: str, *, least: int) -> pl.Series:
    """Returns a column of positions, counted from 0: (R,) Int32; null where the position is unknown.

    Args:
        table: Table of R rows.
        name: Column of whole numbers.
        least: Number of the first position.
    """
    values, expected = table.column(name), f"a position is a whole number from {least} to {_MOST_POSITION:,}"
    if not (values.dtype.is_numeric() or values.dtype in (pl.String, pl.Null)):
        kind = "lists" if isinstance(values.dtype, pl.List) else str(values.dtype)
        raise table.error(name, f"holds {kind}, but {expected}; name another column under [events.placement]")
    if values.dtype == pl.String:
        parsed(table, name, f"{expected}; fix the value, or name the column under categorical of [events.placement]")
    found = wide_numbers(table, name)
    row = first((found < least) | (found != found.floor()) | (found > _MOST_POSITION))
    if row is not None:
        zero = least and found[row] == 0
        remedy = (
            "declare first = 0 under [events.placement] if positions are counted from 0" if zero else "fix the value"
        )
        raise table.error(name, f"holds {values[row]!r}, but {expected}; {remedy}", row=row)
    return (found - least).cast(pl.Int32)


def labels(table: SourceTable, label: Label) -> pl.Series:
    """Returns each row's label: (R,) Int8 of 0 and 1. Null marks a row that is neither and is to be dropped."""
    if label.column is None:
        return pl.repeat(1, table.frame.height, dtype=pl.Int8, eager=True)
    if label.positive is None:
        return _zero_or_one(table, label.column)
    positive = _matches(table, label.column, parse_rule(label.positive))
    if label.implicit:
        return positive.replace_strict({True: 1}, default=None, return_dtype=pl.Int8)
    if label.negative is None:
        return positive.cast(pl.Int8)
    negative = _matches(table, label.column, parse_rule(label.negative))
    row = first(positive & negative)
    if row is not None:
        value = table.column(label.column)[row]
        problem = f"{value!r} matches both positive = '{label.positive}' and negative = '{label.negative}'"
        raise table.error(label.column, f"{problem}; change one of the rules so that they exclude each other", row=row)
    # A row that matches a rule is known to be no null of the other.
    found = (positive.fill_null(False) if positive.null_count() else positive).cast(pl.Int8)
    either = positive | negative
    return found.set(~either.fill_null(False) if either.null_count() else ~either, None)


def _zero_or_one(table: SourceTable, name: str) -> pl.Series:
    whole = table.column(name)
    if whole.dtype.is_integer() and is_between(whole, 0, 1):
        return whole.cast(pl.Int8)
    values = _scalars(table, name)
    known = values.str.to_lowercase().replace({"true": "1", "false": "0"})
    row = first(known.is_not_null() & ~known.is_in(["0", "1"]))
    if row is not None:
        problem = f"holds {table.column(name)[row]!r}, but a label without rules is 0 or 1"
        raise table.error(name, f'{problem}; add rules, e.g. positive = ">= 4"', row=row)
    return known.cast(pl.Int8)


def _matches(table: SourceTable, name: str, rule: LabelRule) -> pl.Series:
    """Returns which rows match a rule: (R,) Boolean, null for a null value."""
    if isinstance(rule.value, float) and rule.op not in ("==", "!="):
        remedy = f"the rule '{rule.op} {rule.raw}' compares with a number; fix the value, or the rule"
        numbers = parsed(table, name, remedy)
        if not table.column(name).dtype.is_integer():
            numbers = numbers.fill_nan(None)
        return pl.Series(rule.compare(numbers, rule.value))
    values = _scalars(table, name)
    if isinstance(rule.value, str):
        own = infer(values) if table.kind == "csv" else table.column(name)
        if own.dtype.is_numeric():
            problem = f"holds numbers, but the rule '{rule.op} {rule.raw}' compares with text"
            raise table.error(name, f"{problem}; write a number in the rule")
        if rule.boolean is not None:
            values = values.str.to_lowercase()
            spelled = values.is_in(["true", "false"])
            values = values.zip_with(spelled, _scalars(table, name))
        return pl.Series(rule.compare(values, rule.raw if rule.boolean is None else rule.boolean))
    number = as_number(values)
    equal = (number == rule.value) & number.is_not_null() | (values == rule.raw)
    return equal if rule.op == "==" else ~equal


def _scalars(table: SourceTable, name: str) -> pl.Series:
    values = texts(table, name)
    if isinstance(values.dtype, pl.List):
        raise table.error(name, "holds lists, but a label is judged from one value; name another column")
    return values


def parsed(table: SourceTable, name: str, remedy: str) -> pl.Series:
    """Returns a column as Float64, its empty text null. The first text that is not a number raises DatasetError."""
    if table.column(name).dtype.is_numeric():
        return table.column(name).cast(pl.Float64)
    values = _scalars(table, name)
    found = as_number(values)
    row = first(found.is_null() & values.is_not_null())
    if row is not None:
        raise table.error(name, f"holds '{values[row]}'; {remedy}", row=row)
    return found


def as_number(texts: pl.Series) -> pl.Series:
    """Returns (R,) Float64 of text. True is 1 and false 0; text that is not a number is null."""
    found = texts.cast(pl.Float64, strict=False)
    if found.null_count() == texts.null_count():
        return found
    words = texts.str.to_lowercase().replace_strict({"true": 1.0, "false": 0.0}, default=None, return_dtype=pl.Float64)
    return found.fill_null(words) if words.null_count() < len(words) else found


def refuse_null(table: SourceTable, name: str, problem: str) -> None:
    """Raises DatasetError with the problem if the column has a null."""
    values = table.column(name)
    if values.null_count():
        raise table.error(name, problem, row=first(values.is_null()))


def is_between(values: pl.Series, low: int, high: int) -> bool:
    """True if every whole number of a series lies between two numbers, both included; nulls do not count."""
    least, most = values.min(), values.max()
    return not isinstance(least, int) or not isinstance(most, int) or (low <= least and most <= high)


def first(where: pl.Series) -> int | None:
    """Returns the first row that is true in a Boolean series, None if no row is."""
    return where.arg_max() if where.any() else None
