"""The Lua scripts that run inside the Redis server."""

import hashlib
from importlib import resources
from typing import TypeAlias

Call: TypeAlias = tuple[list[bytes], list[bytes | int]]
"""Keys and arguments of a script call."""


class Script:
    """Script of the folder `lua/`. A server knows a loaded script by its hash.

    Attributes:
        text: Source of the script.
        sha: SHA-1 of the source, as Redis computes it.

    Args:
        name: Name of the file without its ending.
    """

    def __init__(self, name: str) -> None:
        self.text = resources.files("serving.store.redis").joinpath("lua", f"{name}.lua").read_bytes()
        self.sha = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()
