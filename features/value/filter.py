"""Filters on items' attributes: the language, without the columns that it is evaluated on.

A filter is a tree: comparisons of one column at the leaves, `and`, `or` and `not` above them.

    {"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "in": ["Horror", "War"]}}]}

A column of lists holds a value if one of its elements is that value. An item without a value matches no comparison
except `"eq": null`.
"""

from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, StrictStr, model_validator

from features.errors import EventError

MOST_DEPTH, MOST_PARTS, MOST_VALUES = 16, 256, 1_000

Text = Annotated[StrictStr, Field(max_length=1_024)]
# An integer beyond 64 bits would be read as a float, and lose digits.
Whole = Annotated[StrictInt, Field(ge=-(10**308), le=10**308)]
Number = Whole | Annotated[FiniteFloat, Field(strict=True)]
Scalar = StrictBool | Number | Text


class Filter(BaseModel):
    """Condition on items: one comparison of a column, or other filters under `and`, `or` or `not`."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        json_schema_extra={
            "examples": [{"and": [{"column": "year", "gte": 1990}, {"not": {"column": "genres", "eq": "Horror"}}]}]
        },
    )

    column: Text | None = Field(default=None, description="A filterable column of the items.")
    eq: Scalar | None = Field(default=None, description="The value is equal to this one; null: there is no value.")
    one_of: list[Scalar] | None = Field(default=None, alias="in", min_length=1, max_length=MOST_VALUES)
    gt: Number | Text | None = None
    gte: Number | Text | None = None
    lt: Number | Text | None = None
    lte: Number | Text | None = None
    every: "list[Filter] | None" = Field(default=None, alias="and", min_length=1, max_length=MOST_PARTS)
    some: "list[Filter] | None" = Field(default=None, alias="or", min_length=1, max_length=MOST_PARTS)
    none: "Filter | None" = Field(default=None, alias="not")

    @model_validator(mode="after")
    def _one_meaning(self) -> "Filter":
        given = self.model_fields_set
        kinds = given & {"column", "every", "some", "none"}
        if len(kinds) != 1:
            raise ValueError("expected exactly one of column, and, or, not")
        compared = given - {"column", "every", "some", "none"}
        if "column" not in given:
            if compared:
                raise ValueError(f"{_wire(min(compared))} needs a column")
            return self
        if {"eq"} != compared and {"one_of"} != compared and not (compared and compared <= {"gt", "gte", "lt", "lte"}):
            raise ValueError("column needs eq, or in, or a range of gt, gte, lt and lte")
        if any(getattr(self, name) is None for name in (given - {"eq"})):
            raise ValueError("null can be compared by eq alone")
        return self

    @cached_property
    def key(self) -> str:
        """Text of the filter; equal texts are equal filters."""
        return self.model_dump_json(by_alias=True, exclude_unset=True)

    def check_size(self) -> None:
        """Raises EventError if a filter is deeper, or has more parts, than a server accepts."""
        level, parts, depth = [self], 0, 0
        while level:
            parts, depth = parts + len(level), depth + 1
            if depth > MOST_DEPTH or parts > MOST_PARTS:
                raise EventError(f"filter: at most {MOST_DEPTH} levels and {MOST_PARTS} parts are accepted")
            level = [below for part in level for below in part.below()]

    def below(self) -> "list[Filter]":
        """Returns the filters right under this one."""
        return [*(self.every or ()), *(self.some or ()), *([self.none] if self.none else ())]

    def columns(self) -> "frozenset[str]":
        """Returns the names of the columns that the filter compares."""
        own = [self.column] if self.column is not None else []
        return frozenset(own).union(*(below.columns() for below in self.below()))


def _wire(name: str) -> str:
    return {"one_of": "in"}.get(name, name)
