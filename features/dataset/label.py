"""Label rules: they say which events are positives and which are negatives.

Each dataset has its own terms (a rating, a kind of event, a play count), so a rule compares one column with a value:
OP VALUE. Rules are parsed when the descriptor is read, so that a misspelt rule is refused before any file is read.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
