"""Forgotten users: salted hashes of their ids, and the rule that says which events of a forgotten user count.

The rule: an event at the time of the request to forget or before it is left out, whenever it arrives. A later event
begins a new life of the same id. The stream, the joiner and the frame apply the rule.

A salted hash names no user to a reader who does not know the id. A reader who has the salt and an id can test the id.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import DatasetError, EventError

SALT_BYTES = 16
"""Number of random bytes of a salt, which is written in hexadecimal."""
_HASH_BYTES = 16


class Forgotten(msgspec.Struct, frozen=True):
    """Request to forget a user.

    Attributes:
        user: Salted hash of the user's canonical id, 32 hexadecimal digits.
        salt: Salt of the hash, hexadecimal digits.
        at_us: Time of the request, microseconds since 1970.
    """

    user: str
    salt: str
    at_us: int

    def __post_init__(self) -> None:
        for name, size in (("user", 2 * _HASH_BYTES), ("salt", 2 * SALT_BYTES)):
            text = getattr(self, name)
            if len(text) != size or set(text) - set("0123456789abcdef"):
                raise ValueError(f"{name}: expected {size} hexadecimal digits, got {text[:40]!r}")


def hashed(user: str, salt: str) -> str:
    """Returns the salted hash of a user's canonical id: keyed BLAKE2b of 16 bytes, as hexadecimal digits."""
    data = user.encode(errors="surrogatepass")
    return hashlib.blake2b(data, key=bytes.fromhex(salt), digest_size=_HASH_BYTES).hexdigest()


class ForgottenUsers:
    """Users that were forgotten, by salted hash. Of several requests about a user the newest counts."""

    def __init__(self, requests: Iterable[Forgotten] = ()) -> None:
        self._until: dict[tuple[str, str], int] = {}
        self._salts: dict[str, None] = {}
        for request in requests:
            self.add(request)

    def __len__(self) -> int:
        return len(self._until)

    def __iter__(self) -> Iterator[Forgotten]:
        for (user, salt), at_us in self._until.items():
            yield Forgotten(user, salt, at_us)

    def add(self, request: Forgotten) -> None:
        """Adds a request."""
        key = (request.user, request.salt)
        self._until[key] = max(request.at_us, self._until.get(key, request.at_us))
        self._salts[request.salt] = None

    def until(self, user: str) -> int | None:
        """Returns the time of the newest request about a user, microseconds since 1970. None without a request."""
        found = (self._until.get((hashed(user, salt), salt)) for salt in self._salts)
        return max((at_us for at_us in found if at_us is not None), default=None)

    def alias(self, user: str, time_us: int) -> str:
        """Returns the salted hash of a user who was forgotten at a time or later, and the id of any other user.

        Args:
            user: Canonical id.
            time_us: Time of what is about the user, microseconds since 1970.
        """
        for salt in self._salts:
            name = hashed(user, salt)
            if time_us <= self._until.get((name, salt), time_us - 1):
                return name
        return user

    def named(self, users: Iterable[str]) -> list[str]:
        """Returns those of some users who were forgotten, in their order."""
        return [user for user in users if self.until(user) is not None] if self._until else []

    def left_out(self, users: Sequence[str] | pl.Series, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Marks the events (E,) that do not count.

        Args:
            users: Canonical id of each event's user.
            times: (E,) time of each event, microseconds since 1970. 0 for an event without a clock.
        """
        if not self._until:
            return np.zeros(len(users), dtype=np.bool_)
        # Each user is hashed once, however many events there are.
        names = users.unique() if isinstance(users, pl.Series) else dict.fromkeys(users)
        until = {user: at for user in names if (at := self.until(user)) is not None}
        if not until:
            return np.zeros(len(users), dtype=np.bool_)
        limits = pl.Series(users, dtype=pl.String).replace_strict(until, default=None, return_dtype=pl.Int64)
        found: NDArray[np.bool_] = (pl.Series(times) <= limits).fill_null(False).to_numpy()
        return found


def decode_forgotten(data: bytes) -> Forgotten:
    """Decodes a request from JSON, which may have further fields.

    Raises:
        EventError: The bytes are no request.
    """
    try:
        return msgspec.json.decode(data, type=Forgotten)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise EventError(f"request to forget a user: {error}") from error


def read_forgotten(path: Path) -> ForgottenUsers:
    """Reads a list of forgotten users: JSON lines, each a request. Blank lines are skipped.

    Raises:
        DatasetError: The file cannot be read, or a line is no request; names the line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror}; `tessera topics export forgotten` writes the list") from error
    found = ForgottenUsers()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.add(decode_forgotten(line))
            except EventError as error:
                raise DatasetError(f"{path}: line {number}: {error}") from error
    return found
