"""Fields of a request and of its candidates: columns of the events whose values a caller sends with a ranking.

A field has a type and a default. The default takes the place of a missing value in files, messages and requests, so a
field that a caller leaves out has one meaning everywhere. Shape letter: n, candidates.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, Self, cast

import polars as pl
from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from features.config import Config, nearest
from features.value.attribute import moment
from features.value.canonical import scalar

FieldType = Literal["category", "number", "text", "time"]
MOST_CHARACTERS = 1_024
"""Most characters of a text value."""
ITEM_ID = "item_id"
"""Key of a candidate's id, where a candidate carries fields."""
_EXPECTED = {
    "category": "text, a number, a truth value, or a list of them",
    "number": "a finite number",
    "text": "text",
    "time": "ISO 8601 text such as 2024-01-31T12:00:00Z, or a number since 1970",
}
# Table of the events that holds the fields of a type.
_PLACES: dict[str, str] = {"category": "categorical", "number": "numeric", "text": "read", "time": "read"}


class RequestField(Config):
    """Field of a request, or of each candidate of a request.

    Attributes:
        type: `category` or `number` is a feature. `text` or `time` is a column that only expressions read.
        default: Value that takes the place of a missing value. By default a missing value stays missing.
    """

    type: FieldType
    default: StrictStr | StrictBool | StrictInt | StrictFloat | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default is not None:
            served("default", self, self.default)
            if self.default == "":
                raise ValueError('default: "" is no value; leave default out')
        return self


def declared_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the table `[events]` with the columns of its fields: `request` and `candidate` name columns by type.

    A column that the table declares itself stays, so the result may be given again.

    Raises:
        ValueError: A field is declared twice, or as another kind of column.
    """
    found = dict(data)
    columns: dict[str, Any] = {}
    for place in ("categorical", "numeric", "read"):
        own = data.get(place) or ()
        columns[place] = dict(own) if isinstance(own, Mapping) else dict.fromkeys(own, {} if place != "read" else "")
    seen: set[str] = set()
    for table in ("request", "candidate"):
        fields = data.get(table)
        for name, one in fields.items() if isinstance(fields, Mapping) else ():
            kind = one.get("type") if isinstance(one, Mapping) else getattr(one, "type", None)
            place = _PLACES.get(str(kind), "")
            other = next((known for known, own in columns.items() if name in own and known != place), None)
            if name in seen:
                raise ValueError(f"candidate.{name}: the field is in request too; keep one of them")
            if place and other is not None:
                raise ValueError(f"{table}.{name}: type = {kind!r}, but {other} names the column too; remove one")
            seen.add(name)
            if place:
                columns[place].setdefault(name, kind if place == "read" else {})
    if seen:
        found |= columns | {"numeric": list(columns["numeric"])}
    return found


def served(name: str, field: RequestField, value: Any) -> Any:
    """Returns a value as features read it: a number as a float, a time as text in UTC, None where there is none.

    Raises:
        ValueError: The value is not of the field's type; names the field and the expected type.
    """
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) and field.type == "category" else [value]
    kinds: dict[str, Any] = {"number": (int, float), "text": str, "time": (str, int, float)}
    for part in parts:
        if part is None:
            continue
        if isinstance(part, str) and (len(part) > MOST_CHARACTERS or any("\ud800" <= one <= "\udfff" for one in part)):
            raise ValueError(f"{name}: expected text of at most {MOST_CHARACTERS:,} whole characters; shorten it")
        of_type = isinstance(part, kinds.get(field.type, (str, int, float, bool)))
        if not of_type or (isinstance(part, bool) and field.type != "category"):
            raise _misfit(name, field, part)
        if isinstance(part, (int, float)) and not _is_finite(part):
            raise _misfit(name, field, part)
    if field.type == "number":
        return float(value)
    if field.type == "time":
        try:
            return moment(value).isoformat()
        except (ValueError, TypeError, OverflowError) as error:
            raise _misfit(name, field, value) from error
    if field.type == "category":
        texts = [scalar(part) for part in parts]
        return texts if isinstance(value, (list, tuple)) else texts[0]
    return value or None


def served_fields(
    fields: Mapping[str, RequestField], values: Mapping[str, Any], *, known: Sequence[str] = (), where: str = "context"
) -> dict[str, Any]:
    """Returns the value that a ranking reads of each field: as sent, or the default.

    Args:
        fields: Declared fields by name.
        values: Values as sent, by name.
        known: Other names that `values` may hold.
        where: Name of the values in errors.

    Raises:
        ValueError: A name is unknown, or a value is not of its type.
    """
    for name in values:
        if name not in fields and name not in known:
            valid = [*fields, *(one for one in known if one not in fields)]
            hint = f"the nearest is {nearest(name, valid)!r} (valid: {', '.join(valid)})" if valid else "there is none"
            raise ValueError(f"{where}.{name}: unknown field {name!r}; {hint}")
    return {name: _sent(f"{where}.{name}", field, values.get(name)) for name, field in fields.items()}


def split_candidates(candidates: Sequence[str | Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Returns the ids of n candidates, and the fields that they carry: n values by name, None where one is absent.

    Args:
        candidates: Each an id, or a mapping with `item_id` and fields.

    Raises:
        ValueError: A candidate has no id.
    """
    if all(type(candidate) is str for candidate in candidates):
        return list(candidates), {}  # type: ignore[arg-type]
    if candidates and set(map(type, candidates)) == {dict}:
        rows = cast(Sequence[dict[str, Any]], candidates)
        found = [row.get(ITEM_ID) for row in rows]
        if set(map(type, found)) == {str}:
            names = dict.fromkeys(chain.from_iterable(rows))
            return cast(list[str], found), {name: [row.get(name) for row in rows] for name in names if name != ITEM_ID}
    return _split_one_by_one(candidates)


def _split_one_by_one(candidates: Sequence[str | Mapping[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Splits candidates of any form: the readable twin of `split_candidates`."""
    ids: list[str] = []
    columns: dict[str, list[Any]] = {}
    for place, candidate in enumerate(candidates):
        if isinstance(candidate, Mapping):
            if not isinstance(candidate.get(ITEM_ID), str):
                raise ValueError(f'candidates.{place}: no {ITEM_ID}; give {{"{ITEM_ID}": "…"}} with its fields')
            for name in candidate:
                if name != ITEM_ID and name not in columns:
                    columns[name] = [None] * len(candidates)
                if name != ITEM_ID:
                    columns[name][place] = candidate[name]
        ids.append(candidate[ITEM_ID] if isinstance(candidate, Mapping) else candidate)
    return ids, columns


def distinct_candidates(
    ids: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> tuple[list[str], Mapping[str, Sequence[Any]]]:
    """Returns each candidate once, with the fields of its first place."""
    names = list(dict.fromkeys(ids))
    if len(names) == len(ids) or not columns:
        return names, columns
    first = {name: place for place, name in reversed(list(enumerate(ids)))}
    return names, {column: [values[first[name]] for name in names] for column, values in columns.items()}


def served_columns(
    fields: Mapping[str, RequestField], columns: Mapping[str, Sequence[Any]], count: int
) -> dict[str, list[Any]]:
    """Returns the values that a ranking reads of each field of n candidates; see `served_fields`.

    Raises:
        ValueError: A name is unknown, or a value is not of its type; names candidate and field.
    """
    for name in columns:
        if name not in fields:
            hint = (
                f"the nearest is {nearest(name, fields)!r} (valid: {', '.join(fields)})" if fields else "there is none"
            )
            raise ValueError(f"candidates: unknown field {name!r}; {hint}. Declare it in [events.candidate]")
        if len(columns[name]) != count:
            raise ValueError(
                f"candidates: {len(columns[name])} values of {name!r} for {count} candidates; give one each"
            )
    return {name: _column(name, field, columns.get(name), count) for name, field in fields.items()}


def filled(values: pl.Series, default: Any) -> pl.Series:
    """Returns a column with a default in place of null. Lists get a list of the default."""
    if default is None or not values.null_count():
        return values
    if isinstance(values.dtype, pl.List):
        lists = pl.Series([[default]], dtype=values.dtype)
        return (
            values.is_null()
            .to_frame("null")
            .select(pl.when("null").then(pl.lit(lists)).otherwise(pl.lit(values)).alias(values.name))
            .to_series()
        )
    return values.fill_null(default)


def _column(name: str, field: RequestField, values: Sequence[Any] | None, count: int) -> list[Any]:
    if values is None:
        return [_sent(name, field, None)] * count
    found = _usual(field, values)
    if found is not None:
        default = _sent(name, field, None)
        return found if default is None else [default if value is None else value for value in found]
    return _column_one_by_one(name, field, values)


def is_usual_text(values: Sequence[str]) -> bool:
    """Returns whether all texts are whole characters, of which each text has at most `MOST_CHARACTERS`."""
    if max(map(len, values), default=0) > MOST_CHARACTERS:
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _usual(field: RequestField, values: Sequence[Any]) -> list[Any] | None:
    """Returns a column of values of one type as features read it. None for any other column."""
    kinds = set(map(type, values)) - {type(None)}
    if field.type == "number" and kinds <= {float}:
        known = values if kinds and None not in values else [value for value in values if value is not None]
        return list(values) if all(map(math.isfinite, known)) else None
    if field.type in ("category", "text") and kinds <= {str}:
        return [value or None for value in values] if is_usual_text([one for one in values if one]) else None
    return None


def _column_one_by_one(name: str, field: RequestField, values: Sequence[Any]) -> list[Any]:
    """Returns a column of any values: the readable twin of the paths of `_column`."""
    return [_sent(f"candidates.{place}.{name}", field, value) for place, value in enumerate(values)]


def _sent(name: str, field: RequestField, value: Any) -> Any:
    found = served(name, field, value)
    return found if found is not None or field.default is None else served(name, field, field.default)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _misfit(name: str, field: RequestField, value: Any) -> ValueError:
    return ValueError(f"{name}: a {field.type} is {_EXPECTED[field.type]}; got {str(value)[:80]!r}")
