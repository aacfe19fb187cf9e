"""Base of the descriptor's tables: a frozen model that refuses unknown keys."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def nearest(name: str, valid: Iterable[str]) -> str:
    """Returns the valid name closest to `name` in spelling, or "" when nothing is valid."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.0)
    return matches[0] if matches else ""


class Config(BaseModel):
    """A frozen model that refuses an unknown key and names the nearest valid one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_key",
                        "unknown key '{key}'; the nearest valid name is '{nearest}' (valid: {valid})",
                        {
                            "key": key,
                            "nearest": nearest(str(key), cls.model_fields),
                            "valid": ", ".join(cls.model_fields),
                        },
                    )
        return data


def refuse_repeats(key: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{key} names column '{repeated[0]}' more than once; keep one of them")
