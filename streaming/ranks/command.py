"""Commands of the leader to all processes. A process does nothing between two commands."""

from collections.abc import Sequence

import msgspec

from streaming.log.protocol import Message
from streaming.ranks.pins import Marks

_Address = tuple[str, int, int]


class Command(msgspec.Struct, frozen=True):
    """Order of the leader to all processes.

    Attributes:
        kind: `idle`, `start`, `step`, `snapshot` or `end`.
        messages: Inputs of a step: topic, partition, offset, key, value and time of each message.
        poison: Addresses of messages that the step skips. None: the processes find out.
        snapshot: True writes a snapshot after the step.
        marks: State of the log, of `start`.
    """

    kind: str
    messages: list[tuple[str, int, int, bytes | None, bytes, int]] = []
    poison: list[_Address] | None = None
    snapshot: bool = False
    marks: Marks | None = None

    def batch(self) -> list[Message]:
        """Returns the inputs of a step."""
        return [Message(*fields) for fields in self.messages]


def step_command(messages: Sequence[Message], *, poison: list[_Address] | None, snapshot: bool) -> Command:
    """Returns the command to do a step on messages."""
    fields = [(one.topic, one.partition, one.offset, one.key, one.value, one.timestamp_ms) for one in messages]
    return Command("step", fields, poison, snapshot)


def encode_command(command: Command) -> bytes:
    """Encodes a command."""
    return msgspec.msgpack.encode(command)


def decode_command(data: bytes) -> Command:
    """Decodes a command of the same release."""
    return msgspec.msgpack.decode(data, type=Command)
