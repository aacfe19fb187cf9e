"""Label rules: they say which events are positives and which are negatives.

Each dataset has its own terms (a rating, a kind of event, a play count), so a rule compares one column with a value:
OP VALUE. Rules are parsed when the descriptor is read, so that a misspelt rule is refused before any file is read.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from features.config import Config

_RULE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*([^\s=<>!].*?)\s*")
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class LabelRule:
    """Comparison with a number, or with a string if the value is not a number.

    Attributes:
        op: Operator as written.
        value: Value to compare with.
        raw: Value as written, without quotes.
        quoted: True if the value was written in quotes.
    """

    op: str
    value: float | str
    raw: str
    quoted: bool = False

    @property
    def compare(self) -> Callable[[Any, Any], Any]:
        """Operator as a function; works on polars expressions."""
        return _OPERATORS[self.op]

    @property
    def boolean(self) -> str | None:
        """The value as "true" or "false" if it spells a boolean and has no quotes (== True), else None."""
        return self.raw.lower() if not self.quoted and self.raw.lower() in ("true", "false") else None


@cache
def parse_rule(text: str) -> LabelRule:
    """Parses OP VALUE. In quotes, a value is a string that would else be a number: == '1'.

    Raises:
        ValueError: The text is not a rule.
    """
    match = _RULE.fullmatch(text)
    if match is None:
        raise ValueError(
            f'\'{text}\' is not a rule; write OP VALUE with one of {" ".join(_OPERATORS)}, e.g. ">= 4" or "== click"'
        )
    op, value = match.groups()
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return LabelRule(op, value[1:-1], value[1:-1], quoted=True)
    try:
        return LabelRule(op, float(value), value)
    except ValueError:
        return LabelRule(op, value, value)


class Label(Config):
    """Rule that makes an event a positive or a negative. A rule is OP VALUE with >= <= > < == !=.

    Attributes:
        column: Column that the rules read; without rules it holds 0 or 1.
        positive: Rule of a positive event. Without `negative` every other value that is not null is negative.
        negative: Rule of a negative event. Rows that match neither rule are dropped.
        implicit: True if every event (with `positive`: every matching event) is a positive; negatives are drawn.
        negatives: Negatives drawn for each positive of an implicit label.
    """

    column: str | None = None
    positive: str | None = None
    negative: str | None = None
    implicit: bool = False
    negatives: int = Field(4, ge=1)

    @field_validator("positive", "negative")
    @classmethod
    def _parsable(cls, rule: str | None) -> str | None:
        if rule is not None:
            parse_rule(rule)
        return rule

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.column is None and not self.implicit:
            raise ValueError('a label needs column = "...", or implicit = true when every event is a positive')
        if self.column is None and (self.positive or self.negative):
            raise ValueError('a rule needs column = "...", the column it is about')
        if self.negative is not None and self.positive is None:
            raise ValueError('negative needs positive too: say what counts as a positive, e.g. positive = ">= 4"')
        if self.implicit and self.negative is not None:
            raise ValueError("implicit = true draws its negatives; remove negative, or implicit")
        if self.implicit and self.column is not None and self.positive is None:
            raise ValueError('implicit = true with a column needs positive = "..."; add it, or remove column')
        return self
