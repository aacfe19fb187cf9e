"""Reads lists written as text, as a csv has to hold them: ['Drama', 'Action'], ["a", "b"], {'x'}, [1, 2].

Each text is judged alone: it is a list if JSON or Python reads it as a list of plain values. A text that looks like a
list and cannot be read is refused, since splitting it would make `['Drama'` a value.
"""

import ast
import json
import re
import warnings
from typing import Any

import polars as pl

from features.value.canonical import scalar

_ONE_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^'"].*""", re.DOTALL)
_CLOSES = {"[": "]", "(": ")", "{": "}"}


class WrittenListError(ValueError):
    """Error of a text that looks like a list and cannot be read; `text` is the value of the column."""

    def __init__(self, text: str) -> None:
        super().__init__(f"holds a list written as text that cannot be read: {text[:80]!r}")
        self.text = text


def written_lists(values: pl.Series, split: str | None) -> dict[str, list[str]]:
    """Maps the distinct texts of a String column that are written lists to their values as text, without null and "".

    Args:
        values: (R,) String.
        split: Separator of a text that is not a written list; None if such a text is one value.

    Raises:
        WrittenListError: A text holds a list that cannot be read: of lists or objects, or without its quotes.
    """
    candidates = values.filter(values.str.contains(r"^\s*[\[({].*[\])}]\s*$"))
    found = {text: _read(text, split) for text in candidates.unique(maintain_order=True)}
    return {text: elements for text, elements in found.items() if elements is not None}


def _read(text: str, split: str | None) -> list[str] | None:
    bare = text.strip()
    opens, body = bare[0], bare[1:-1].strip()
    if bare[-1] != _CLOSES[opens]:
        return None
    quoted = body[:1] in ("'", '"')
    if opens == "[" or quoted:
        elements = _elements(bare)
        if elements is not None:
            if any(isinstance(element, (list, tuple, set, dict)) for element in elements):
                raise WrittenListError(text)
            texts = (scalar(element) for element in elements)
            return [element for element in texts if element]
        if opens == "[" and quoted:
            raise WrittenListError(text)
    # [Drama, Action] and {a,b}: lists of Java and PostgreSQL. "[a],[b]" is not.
    if split is not None and opens != "(" and _CLOSES[opens] not in bare.split(split)[0]:
        raise WrittenListError(text)
    return None


def _elements(text: str) -> list[Any] | None:
    """Returns the elements, in order, of a JSON or Python list, tuple or set; None if the text is none of them."""
    try:
        found = json.loads(text)
        return found if isinstance(found, list) else None
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text, mode="eval").body
            # 'a' 'b' is one text to Python, and two values to NumPy, which prints it.
            if isinstance(body, (ast.List, ast.Tuple, ast.Set)) and all(
                _ONE_LITERAL.fullmatch(ast.get_source_segment(text, element) or "") for element in body.elts
            ):
                return [ast.literal_eval(element) for element in body.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    return None
