"""Logical types of Avro: values that an integer or bytes carry, read as JSON and files hold them.

| logical type | read as |
|--|--|
| `timestamp-*`, `local-timestamp-*` | ISO 8601 text in UTC, or the number if the column's unit is the same |
| `date` | the text YYYY-MM-DD |
| `decimal` | a number |
| any other, such as `uuid` or `time-millis` | the type that carries it |
"""

from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from features.value.canonical import scalar

_EPOCH = datetime(1970, 1, 1)
_FIRST_DAY = date(1970, 1, 1).toordinal()
_UNITS = {"millis": "ms", "micros": "us", "nanos": "ns"}
_PER_US = {"ms": 1_000, "us": 1}
_MOST_DIGITS = 1_000


class LogicalType(NamedTuple):
    """Logical type of a field.

    Attributes:
        name: `date`, `decimal`, or a timestamp's name.
        scale: Digits of a decimal after the point.
    """

    name: str
    scale: int = 0

    @property
    def unit(self) -> str | None:
        """Unit of a timestamp: `ms`, `us` or `ns`. None for the other types."""
        return _UNITS.get(self.name.rpartition("-")[2]) if "timestamp-" in self.name else None

    @property
    def kind(self) -> str:
        """Kind of the values, as in `features.wire.fields.Kinds`."""
        return "number" if self.name == "decimal" else "text"

    def read(self, value: Any) -> str | int | float:
        """Returns a value as JSON holds it.

        Raises:
            ValueError: The value is beyond the calendar, or of too many digits.
        """
        try:
            if self.name == "decimal":
                return _decimal(value, self.scale)
            if self.name == "date":
                return date.fromordinal(_FIRST_DAY + value).isoformat()
            unit = self.unit
            micros = value // 1_000 if unit == "ns" else value * _PER_US[unit or "us"]
            moment = _EPOCH + timedelta(microseconds=micros)
            return str(scalar(moment if self.name.startswith("local") else moment.replace(tzinfo=UTC)))
        except OverflowError as error:
            raise ValueError(f"{self.name} {value} is beyond the years 1 to 9999") from error


def logical_type(found: Any) -> LogicalType | None:
    """Returns the logical type of a field's type, or of the only type in it beside null. None without a type above.

    A logical type on a type that cannot carry it is none, as the specification says.
    """
    parts = [part for part in found if part != "null"] if isinstance(found, list) else [found]
    if len(parts) != 1 or not isinstance(parts[0], Mapping):
        return None
    own = parts[0]
    name, carrier = str(own.get("logicalType", "")), own.get("type")
    if isinstance(carrier, Mapping):
        return logical_type(carrier)
    fits = (
        (name == "date" and carrier == "int")
        or (name == "decimal" and carrier in ("bytes", "fixed"))
        or (LogicalType(name).unit is not None and carrier == "long")
    )
    if not fits:
        return None
    scale = own.get("scale", 0) if name == "decimal" else 0
    if not isinstance(scale, int) or not 0 <= scale <= _MOST_DIGITS:
        raise ValueError(f"has a decimal of the scale {scale!r}; expected 0 to {_MOST_DIGITS:,} digits")
    return LogicalType(name, scale)


def reader(logical: LogicalType, unit: str | None) -> Callable[[Any], Any] | None:
    """Returns the function that reads a column's values. None if the carrier is the value.

    Args:
        logical: Logical type of the field.
        unit: Unit in which the descriptor reads numbers of the column as times. None if it names no unit.
    """
    return None if logical.unit is not None and logical.unit == unit else logical.read


def _decimal(value: bytes, scale: int) -> int | float:
    if len(value) > _MOST_DIGITS // 3:
        raise ValueError(f"a decimal of {len(value)} bytes; expected at most {_MOST_DIGITS // 3}")
    exact = Decimal(int.from_bytes(value, "big", signed=True)).scaleb(-scale)
    text = scalar(exact)
    assert text is not None
    return int(text) if text.lstrip("-").isdigit() else float(text)
