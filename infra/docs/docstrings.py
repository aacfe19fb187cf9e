"""Lets mkdocstrings read entries of docstrings that name several attributes: `title, detail: …`."""

import re
from typing import Any

import griffe

_SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):(.*(?:\n\1 +.*)*)", re.MULTILINE)


def split_names(docstring: str) -> str:
    """Gives each name of an entry an entry of its own, with the same text."""
    return _SEVERAL.sub(lambda m: "\n".join(f"{m[1]}{name}:{m[3]}" for name in m[2].split(", ")), docstring)


class SplitNames(griffe.Extension):
    """Splits the entries of every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """See `griffe.Extension.on_instance`."""
        if obj.docstring:
            obj.docstring.value = split_names(obj.docstring.value)
