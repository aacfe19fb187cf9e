"""Messages about forgotten users: the tombstone on the topic `events`, and lines of the topic `forgotten`.

The tombstone has the key of the user's events, so it comes after them in their partition. Its value names the user by a
salted hash alone.
"""

import time
from typing import Any

import msgspec

from features.errors import EventError
from features.value.forgotten import Forgotten, decode_forgotten
from streaming.log.protocol import BLANK

_FIELD = "_forget"
_MARK = b'"%s"' % _FIELD.encode()


class _Tombstone(msgspec.Struct, frozen=True, rename={"forget": _FIELD}):
    forget: msgspec.Raw


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """Line of the topic `forgotten`, the audit of all removals, as JSON.

    Attributes:
        kind: `requested`; `removed` from the state of a bundle's stream; `rewritten` in the log.
        user, salt, at_us: The request, as in `features.value.forgotten.Forgotten`.
        time_ms: Time of the line, milliseconds since 1970.
        by: Name of the API key that asked, or `command line`.
        bundle: Id of the bundle whose stream removed the user.
        seq: Number of the micro-batch that removed the user.
        removed: Number of removed parts: of visits, aggregates and records of the user, or of messages by topic.
        shared: Parts that keep what they learnt from the user.
    """

    kind: str
    user: str
    salt: str
    at_us: int
    time_ms: int
    by: str = ""
    bundle: str = ""
    seq: int = 0
    removed: dict[str, int] = {}
    shared: list[str] = []


def encode_tombstone(request: Forgotten) -> bytes:
    """Encodes a request as a tombstone."""
    return msgspec.json.encode({_FIELD: request})


def may_forget(data: bytes) -> bool:
    """Returns whether messages, one or several after each other, may be tombstones or blank."""
    return _MARK in data or BLANK in data


def decode_tombstone(value: bytes) -> Forgotten | None:
    """Decodes a tombstone. Returns None if the message is no tombstone.

    Raises:
        EventError: The message is a tombstone, and its request is invalid.
    """
    if _MARK not in value:
        return None
    try:
        tombstone = msgspec.json.decode(value, type=_Tombstone)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        # The text occurs in another place of an event, whose decoder names the fault if there is one.
        return None
    try:
        return decode_forgotten(bytes(tombstone.forget))
    except EventError as error:
        raise EventError(f"events message: {_FIELD}: {error}") from error


def encode_line(kind: str, request: Forgotten, **more: Any) -> bytes:
    """Encodes a line of the topic `forgotten`, with the present time."""
    now_ms = time.time_ns() // 1_000_000
    return msgspec.json.encode(Line(kind, request.user, request.salt, request.at_us, now_ms, **more))


def decode_line(value: bytes) -> Line | None:
    """Decodes a line of the topic `forgotten`. Returns None for any other message."""
    try:
        line = msgspec.json.decode(value, type=Line)
        Forgotten(line.user, line.salt, line.at_us)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return line
