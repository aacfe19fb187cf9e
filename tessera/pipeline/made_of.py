"""Inputs that decide a stage's output: their hash is the stage's key, their differences say why it runs again."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec


class MadeOf(msgspec.Struct, frozen=True, omit_defaults=True):
    """Inputs of a stage. A part is empty if the stage reads none of it.

    Attributes:
        code: Version of the code and of the libraries, see `tessera.code_version`.
        options: Choices of the run by dotted name.
        descriptor: Parts of the dataset's descriptor.
        files: sha256 of each file of the dataset by its name; names are shown, and decide nothing.
        after: Keys of earlier stages by name, those of a warm start included.
    """

    code: str = ""
    options: dict[str, Any] = {}
    descriptor: dict[str, Any] = {}
    files: dict[str, str] = {}
    after: dict[str, str] = {}

    def key(self, stage: str) -> str:
        """Returns the stage's key."""
        return key_of(stage, self.code, self.options, self.descriptor, list(self.files.values()), self.after)

    def changes(self, now: "MadeOf") -> list[str]:
        """Returns a phrase for each difference from `now`."""
        phrases = ["the code or a library changed"] if self.code != now.code else []
        phrases += differences(self.options, now.options)
        described = differences(dict(leaves(self.descriptor)), dict(leaves(now.descriptor)))
        phrases += [f"descriptor: {phrase}" for phrase in described]
        for name in sorted(self.files.keys() | now.files.keys()):
            before, after = self.files.get(name), now.files.get(name)
            if before != after:
                phrases.append(f"{name} {'is new' if before is None else 'is gone' if after is None else 'changed'}")
        phrases += [f"{name} ran again" for name, key in now.after.items() if self.after.get(name) != key]
        phrases += [f"there is no {name} any more" for name in self.after if name not in now.after]
        return phrases


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the values that differ, such as `table.budget auto → 2000000`; a missing name shows as not set."""
    names = [*now, *(name for name in before if name not in now)]
    shown = ((name, _shown(before, name), _shown(now, name)) for name in names)
    return [f"{name} {old} → {new}" for name, old, new in shown if old != new]


def key_of(*parts: Any) -> str:
    """Hashes values that JSON can hold."""
    return hashlib.sha256(msgspec.json.encode(parts, order="sorted")).hexdigest()


def _shown(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "not set"
    value = values[name]
    if value is None:
        return "auto"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted names and the values of a nested table."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
