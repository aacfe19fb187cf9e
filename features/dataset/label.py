"""Label rules: they say which events are positives and which are negatives.

Each dataset has its own terms (a rating, a kind of event, a play count), so a rule compares one column with a value:
OP VALUE. Rules are parsed when the descriptor is read, so that a misspelt rule is refused before any file is read.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from features.config import Config, nearest
from features.value.score import ScoreFormula

TASK = "label."
"""Start of the name of a task's column in the frame, such as `label.click`."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
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


class TaskLabel(Label):
    """Label of one task among several.

    Attributes:
        weight: Weight of the task's loss in training.
    """

    weight: float = Field(1.0, gt=0, le=1_000)

    @model_validator(mode="after")
    def _explicit(self) -> Self:
        if self.implicit:
            raise ValueError("implicit = true draws negatives for one label; several tasks read rules, so remove it")
        return self


@dataclass(frozen=True)
class Tasks:
    """Tasks of the events: their labels, the one that is judged, and the formula of the score.

    Attributes:
        labels: Label of each task by its name. The names' order is that of the ranker's outputs.
        judge: Task whose label is `label` everywhere else: history, aggregates, gates and rollouts.
        score: Serving formula over the tasks' probabilities.

    Raises:
        ValueError: A name, `judge` or `score` cannot be used; names it and the remedy.
    """

    labels: Mapping[str, TaskLabel]
    judge: str
    score: str

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise ValueError("labels names fewer than two tasks; write label = { ... } for one")
        for name in self.labels:
            if not _NAME.fullmatch(name):
                raise ValueError(f"labels.{name}: a name has letters, digits and _, since score reads it; rename it")
        if self.judge not in self.labels:
            near, valid = nearest(self.judge, self.labels), ", ".join(self.labels)
            raise ValueError(f"judge: unknown task {self.judge!r}; the nearest is {near!r} (valid: {valid})")
        try:
            self.formula()
        except ValueError as error:
            raise ValueError(f"score: {error}") from error

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each task's loss by its name."""
        return {name: task.weight for name, task in self.labels.items()}

    def formula(self) -> ScoreFormula:
        """Returns the serving formula."""
        return ScoreFormula(self.score, tuple(self.labels))


def with_judged(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the declared events with the judged task as `label`, and defaults for `judge` and `score`.

    Raises:
        ValueError: `label` stands beside `labels`, or `judge` and `score` stand without `labels`.
    """
    labels = data.get("labels")
    if not labels:
        for key in ("judge", "score"):
            if data.get(key) is not None:
                raise ValueError(f"{key} is about several tasks; name them under [events.labels], or remove {key}")
        return data
    if data.get("label") is not None:
        raise ValueError("label and labels both say what is learnt; keep label for one task, labels for several")
    if not isinstance(labels, Mapping) or not all(isinstance(one, Mapping) for one in labels.values()):
        return data
    judge = data.get("judge") or next(iter(labels))
    # A judge that is no task is refused by `Tasks`, which names it.
    judged = {key: value for key, value in labels.get(judge, next(iter(labels.values()))).items() if key != "weight"}
    # Names decide the order of the outputs, since tables in files may be written in any order.
    ordered = dict(sorted(labels.items()))
    return {**data, "labels": ordered, "judge": judge, "score": data.get("score") or judge, "label": judged}
