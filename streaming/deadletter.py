"""Dead letters: messages that were set aside, with where they stood, why, and their original bytes.

The topic holds letters and marks. A mark says that a letter was put back, and is committed in the same transaction as
the message that was put back: exactly once, however often and by however many it is asked for.
"""

import base64
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import msgspec

from features.error import EventError, LogError
from streaming.log import EventLog, Message
from streaming.topic import Topics

# A dead letter must itself fit into a message.
KEPT_BYTES = 1 << 20


class DeadLetter(msgspec.Struct, frozen=True, tag="letter", tag_field="kind"):
    """A message that was set aside, as JSON on the log.

    Attributes:
        topic, partition, offset: where it stood.
        cause: the kind of fault in one word; reason: what it is.
        size_bytes: of the message; more than is kept where it was longer than `KEPT_BYTES`.
        timestamp_ms: when it was appended.
    """

    topic: str
    partition: int
    offset: int
    cause: str
    reason: str
    size_bytes: int
    timestamp_ms: int
    value_base64: str
    key_base64: str | None = None

    @property
    def value(self) -> bytes:
        """The original message, or its first `KEPT_BYTES` where `size_bytes` says that it was longer."""
        return base64.b64decode(self.value_base64)

    @property
    def key(self) -> bytes | None:
        """The original key."""
        return None if self.key_base64 is None else base64.b64decode(self.key_base64)


class PutBack(msgspec.Struct, frozen=True, tag="put-back", tag_field="kind"):
    """The mark that the letter at offset `letter` of this topic was put back."""

    letter: int


@dataclass(frozen=True)
class Filed:
    """A letter in the dead-letter topic: its offset there, and whether it was put back."""

    number: int
    letter: DeadLetter
    put_back: bool


def encode_dead_letter(message: Message, cause: str, reason: str) -> bytes:
    """The dead letter of a message, as bytes on the log."""
    letter = DeadLetter(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        cause=cause,
        reason=reason,
        size_bytes=len(message.value),
        timestamp_ms=message.timestamp_ms,
        value_base64=base64.b64encode(message.value[:KEPT_BYTES]).decode(),
        key_base64=None if message.key is None else base64.b64encode(message.key).decode(),
    )
    return msgspec.json.encode(letter)


def read_dead_letters(log: EventLog, topics: Topics) -> list[Filed]:
    """All dead letters, oldest first.

    Raises:
        EventError: the topic holds something else.
    """
    return Filing().read_on(log, topics)


class Filing:
    """All dead letters so far, for those who read on."""

    def __init__(self) -> None:
        self._letters: dict[int, DeadLetter] = {}
        self._put_back: set[int] = set()
        self._next = 0

    def read_on(self, log: EventLog, topics: Topics) -> list[Filed]:
        """Takes in what has come since the last call; returns all, oldest first. Raises as `read_dead_letters`."""
        end = log.end_offsets(topics.dead_letters)[0]
        for message in log.read(topics.dead_letters, 0, self._next, end) if end > self._next else ():
            try:
                found = msgspec.json.decode(message.value, type=DeadLetter | PutBack)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise EventError(f"{topics.dead_letters} offset {message.offset}: {error}") from error
            if isinstance(found, PutBack):
                self._put_back.add(found.letter)
            else:
                self._letters[message.offset] = found
        self._next = end
        return [Filed(number, letter, number in self._put_back) for number, letter in self._letters.items()]


def causes(letters: Collection[Filed]) -> dict[str, int]:
    """How many letters wait to be put back, by cause."""
    return dict(Counter(filed.letter.cause for filed in letters if not filed.put_back).most_common())


def put_back(log: EventLog, topics: Topics, numbers: Collection[int], mended: Mapping[int, bytes]) -> list[int]:
    """Appends letters to the topics they came from, once each; returns the numbers of those that were not before.

    An item's message gets the version of its first arrival, so that it does not undo what came since; an event is
    marked as old on purpose, so that it is not set aside as late.

    Args:
        numbers: offsets in the dead-letter topic.
        mended: by number, what to append instead of the original bytes.

    Raises:
        LogError: a number is no letter's, or a letter was cut short and is not mended.
        FencedError: somebody else has begun to put letters back.
    """
    transactor = log.transactor(f"deadletters-{topics.dead_letters}")
    try:
        # Read after the fence: what another one has put back before it is seen.
        filed = {found.number: found for found in read_dead_letters(log, topics)}
        for number in sorted({*numbers, *mended}):
            if number not in filed:
                raise LogError(f"letter {number}: there is none; `tessera deadletters list` shows them")
            if filed[number].letter.size_bytes > KEPT_BYTES and number not in mended:
                raise LogError(f"letter {number}: only its first {KEPT_BYTES} bytes were kept; give it mended")
        chosen = [number for number in sorted({*numbers, *mended}) if not filed[number].put_back]
        if chosen:
            with transactor.begin() as transaction:
                for number in chosen:
                    letter = filed[number].letter
                    own: dict[str, object] = (
                        {"_version": letter.timestamp_ms} if letter.topic == topics.items else {"_backfill": True}
                    )
                    value = _marked(mended.get(number, letter.value), own)
                    transaction.append(letter.topic, value, key=letter.key)
                    transaction.append(topics.dead_letters, msgspec.json.encode(PutBack(number)))
        return chosen
    finally:
        transactor.close()


def _marked(value: bytes, own: dict[str, object]) -> bytes:
    """A message with fields that it does not have itself; what is no object stays as it is."""
    try:
        message = msgspec.json.decode(value, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return value
    return msgspec.json.encode(own | message)
