"""Keys of the dataset descriptor: types and defaults from the classes, meanings from their docstrings."""

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from features.dataset.aggregate import Aggregate
from features.dataset.clock import Time
from features.dataset.descriptor import Dataset, Events, Items, Users
from features.dataset.label import Label, TaskLabel
from features.dataset.source import Categorical, TableSource
from features.dataset.split import Split
from features.shown.placement import Placement
from features.shown.policy import Boost, Diversity, NewItems, PinnedPlace, Policy
from features.value.expression import Derived
from features.value.field import RequestField
from features.value.vector import GivenSpace
from infra.docs.reference.markdown import code, table, text
from tessera.pipeline.options import RunOptions, known_choices

_ATTRIBUTE = re.compile(r"^(\w+(?:, \w+)*): (.*)$")
_NOT_SET = object()

SECTIONS: tuple[tuple[str, type[BaseModel], type[BaseModel] | None], ...] = (
    ("Top level", Dataset, None),
    ("`[items]`, `[users]` and `[events]`: files and features", TableSource, None),
    ("`categorical = { COLUMN = { … } }`", Categorical, None),
    ("`[items]`", Items, TableSource),
    ("`[items]`: `vectors = { NAME = { … } }`", GivenSpace, None),
    ("`[users]`", Users, TableSource),
    ("`[events]`", Events, TableSource),
    ("`time = { … }`", Time, None),
    ("`label = { … }`", Label, None),
    ("`[events.labels]`: `NAME = { … }`", TaskLabel, Label),
    ("`[events.request]`, `[events.candidate]`: `NAME = { … }`", RequestField, None),
    ("`[events.placement]`", Placement, None),
    ("`[split]`", Split, None),
    ("`[aggregates]`: `NAME = { … }`", Aggregate, None),
    ("`[features]`: `NAME = { … }`", Derived, None),
    ("`[policies.NAME]`", Policy, None),
    ("`[policies.NAME]`: `diversity = { … }`", Diversity, None),
    ("`[policies.NAME]`: `boost = [{ … }]`", Boost, None),
    ("`[policies.NAME]`: `pin = [{ … }]`", PinnedPlace, None),
    ("`[policies.NAME]`: `new = { … }`", NewItems, None),
)
"""Heading, class, and the class whose keys an earlier section has."""


def descriptor() -> str:
    """Returns a section for each table of the descriptor."""
    return "\n\n".join(_section(heading, kind, base) for heading, kind, base in SECTIONS)


def run_table() -> str:
    """Returns a section for `[run]` and for each table in it."""
    defaults = RunOptions()
    rows: dict[str, list[tuple[str, ...]]] = {}
    for name, (path, kind) in known_choices().items():
        owner = defaults
        for part in path[:-1]:
            owner = getattr(owner, part)
        table_name, _, key = name.rpartition(".")
        told = meanings(type(owner)).get(path[-1], "")
        meaning = f"{told[:1].upper()}{told[1:]}".replace("None", "auto")
        default = _default(getattr(owner, path[-1])) or (code('"auto"') if type(None) in typing.get_args(kind) else "")
        rows.setdefault(table_name, []).append((code(key), code(spelled(kind)), default, text(meaning)))
    heads = ("key", "type", "default", "meaning")
    return "\n\n".join(
        f"### `[{f'run.{name}' if name else 'run'}]`\n\n{table(heads, own)}" for name, own in rows.items()
    )


def keys(kind: type, base: type | None = None) -> dict[str, tuple[Any, Any]]:
    """Returns type and default of each key, those of `base` left out; `source` is no key of the file."""
    inherited = set(keys(base)) if base else set()
    found: dict[str, tuple[Any, Any]] = {}
    if issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            made = field.default_factory() if field.default_factory else field.default  # type: ignore[call-arg]
            found[name] = (field.annotation, _NOT_SET if made is PydanticUndefined else made)
    else:
        annotations = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            made = field.default
            if made is dataclasses.MISSING:
                made = _NOT_SET
                if field.default_factory is not dataclasses.MISSING:
                    made = field.default_factory()
            found[field.name] = (annotations[field.name], made)
    return {name: value for name, value in found.items() if name not in inherited and name != "source"}


def meanings(kind: type) -> dict[str, str]:
    """Returns the entries of the docstring's `Attributes:` section."""
    found: dict[str, str] = {}
    _, _, rest = (inspect.cleandoc(kind.__doc__ or "") + "\n").partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", rest)[0]
    names: list[str] = []
    for line in textwrap.dedent(section).split("\n"):
        if match := _ATTRIBUTE.match(line):
            names = match[1].split(", ")
            found |= dict.fromkeys(names, match[2])
        elif line.startswith(" ") and names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif line.strip():
            break
    return found


def _section(heading: str, kind: type, base: type | None = None) -> str:
    told = meanings(kind)
    summary = (inspect.cleandoc(kind.__doc__ or "")).split("\n\n")[0].replace("\n", " ")
    rows = [
        (code(name), code(spelled(annotation)), _default(default), text(told.get(name, "")))
        for name, (annotation, default) in keys(kind, base).items()
    ]
    return f"### {heading}\n\n{text(summary)}\n\n{table(('key', 'type', 'default', 'meaning'), rows)}"


def spelled(annotation: Any) -> str:
    """Writes a type in the words of TOML."""
    origin, given = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(f'"{value}"' for value in given)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spelled(one) for one in given if one is not type(None))
    if origin is typing.Annotated:
        return spelled(given[0])
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"table of {spelled(given[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {spelled(given[0])}"
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return "table"
    named = {str: "text", Path: "text", int: "integer", float: "number", bool: "boolean", Any: "value"}
    return named.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(value: Any) -> str:
    if value is _NOT_SET:
        return "required"
    if value is None or (isinstance(value, tuple | dict | list) and not value):
        return ""
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple | list):
        return code(list(value))
    return code(f'"{value}"' if isinstance(value, str) else value)
