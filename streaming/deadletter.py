"""Dead letters: messages that were set aside, with where they stood, why, and their original bytes."""

import base64

import msgspec

from features.error import EventError
from streaming.log import EventLog, Message
from streaming.topic import Topics

# A dead letter must itself fit into a message.
KEPT_BYTES = 1 << 20


class DeadLetter(msgspec.Struct, frozen=True):
    """What the dead-letter topic holds, as JSON."""

    topic: str
    partition: int
    offset: int
    reason: str
    size_bytes: int
    value_base64: str

    @property
    def value(self) -> bytes:
        """The original message, or its first `KEPT_BYTES` where `size_bytes` says that it was longer."""
        return base64.b64decode(self.value_base64)


def encode_dead_letter(message: Message, reason: str) -> bytes:
    """The dead letter of a message, as bytes on the log."""
    value = base64.b64encode(message.value[:KEPT_BYTES]).decode()
    size = len(message.value)
    return msgspec.json.encode(DeadLetter(message.topic, message.partition, message.offset, reason, size, value))


def read_dead_letters(log: EventLog, topics: Topics) -> list[DeadLetter]:
    """All dead letters, oldest first.

    Raises:
        EventError: the topic holds something else.
    """
    found = []
    for message in log.read(topics.dead_letters, 0, 0, log.end_offsets(topics.dead_letters)[0]):
        try:
            found.append(msgspec.json.decode(message.value, type=DeadLetter))
        except msgspec.DecodeError as error:
            raise EventError(f"{topics.dead_letters} offset {message.offset}: {error}") from error
    return found
