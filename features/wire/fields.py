"""Compares the fields of a schema with the columns that a table declares."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from features.wire.logical import LogicalType

Kinds = frozenset[str]
"""Kinds of values that a field of a schema can hold: `null`, those of `SCALARS`, `list of` one of these, or `other`."""

SCALARS = frozenset({"text", "integer", "number", "boolean"})
"""Kinds of values that are no lists."""
_LISTS = frozenset(f"list of {kind}" for kind in SCALARS)
_NUMBERS = frozenset({"integer", "number", "boolean"})
_VECTORS = frozenset({"list of integer", "list of number"})
_ENVELOPE = {
    "_schema": frozenset({"integer"}),
    "_event_id": frozenset({"text", "integer"}),
    "_version": frozenset({"integer"}),
    "_deleted": frozenset({"boolean"}),
    "_backfill": frozenset({"boolean"}),
}


@dataclass(frozen=True)
class DeclaredFields:
    """Columns of a table and the kinds of values that each may hold.

    Attributes:
        table: `events` or `items`.
        required: Columns of one value that is never null.
        optional: Columns of one value, a list, or null.
        numeric: Optional columns of numbers.
        vectors: Optional columns of lists of numbers.
        units: Unit in which numbers of a column are times, where the descriptor names a unit.
    """

    table: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    numeric: frozenset[str] = frozenset()
    vectors: frozenset[str] = frozenset()
    units: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns, in the order of a decoded row."""
        return (*self.required, *self.optional)

    def misfit(self, held: Mapping[str, Kinds], logical: Mapping[str, LogicalType]) -> str | None:
        """Returns the first difference that makes a schema unusable, by the name of its field, or None.

        Args:
            held: Kinds of each field of the schema. Fields that are not declared may hold anything.
            logical: Logical types of fields.
        """
        for name in self.columns:
            if name not in held:
                return f"has no field {name!r}, which [{self.table}] of the descriptor declares"
            if problem := _problem(held[name] - {"null"}, self._expected(name)):
                return f"field {name!r} {problem}"
            own, unit = logical.get(name), self.units.get(name)
            if own is not None and own.unit is not None and unit not in (None, own.unit):
                return f"field {name!r} holds {own.name}, but [{self.table}] time has the unit {unit!r}"
        for name, expected in _ENVELOPE.items():
            if problem := _problem(held.get(name, frozenset()) - {"null"}, expected):
                return f"field {name!r} {problem}"
        return None

    def _expected(self, name: str) -> Kinds:
        if name in self.vectors:
            return _VECTORS
        if name in self.numeric:
            return _NUMBERS
        return SCALARS if name in self.required else SCALARS | _LISTS


def _problem(held: Kinds, expected: Kinds) -> str:
    wrong = held - expected
    return f"holds {_named(wrong)}, expected {_named(expected)}" if wrong else ""


def _named(kinds: Collection[str]) -> str:
    return " or ".join(sorted(kinds))
