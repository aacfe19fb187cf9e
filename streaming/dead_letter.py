"""Dead letters: quarantined messages with their position, reason and original bytes.

The topic holds letters and marks. A mark says that a letter was put back, and is committed in the same transaction as
the message that was put back: exactly once, however often and by however many it is asked for.
"""

import base64
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from features.errors import LogError
from streaming.log.protocol import EventLog, Message, Transactor
from streaming.log.topics import Topics

# A dead letter must itself fit into a message.
KEPT_BYTES = 1 << 20
_REASON_CHARS = 2_000
UNREADABLE = "unreadable"
"""The cause of a message of the topic that is no dead letter."""
# What `Filing` holds: so many letters, with so much of each message.
NEWEST, SHOWN_BYTES = 1_000, 4_096
# Letters and bytes that one transaction puts back.
_CHUNK, _CHUNK_BYTES = 500, 32 << 20


class DeadLetter(msgspec.Struct, frozen=True, tag="letter", tag_field="kind"):
    """Quarantined message, as JSON on the log.

    Attributes:
        topic, partition, offset: where it stood.
        cause: the kind of fault in one word; reason: what it is.
        size_bytes: of the message; more than is kept where it was longer than `KEPT_BYTES`.
        timestamp_ms: when it was appended.
        key_size_bytes: of the key; more than is kept where it was longer than `KEPT_BYTES`.
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
    key_size_bytes: int = 0

    @property
    def value(self) -> bytes:
        """The original message, or its first bytes where `size_bytes` says that it was longer."""
        return base64.b64decode(self.value_base64)

    @property
    def key(self) -> bytes | None:
        """The original key, or its first bytes."""
        return None if self.key_base64 is None else base64.b64decode(self.key_base64)

    @property
    def whole(self) -> bool:
        """True if message and key are kept from the first byte to the last."""
        return len(self.value) >= self.size_bytes and len(self.key or b"") >= self.key_size_bytes


class PutBack(msgspec.Struct, frozen=True, tag="put-back", tag_field="kind"):
    """The mark that the letter at offset `letter` of this topic was put back."""

    letter: int


@dataclass(frozen=True)
class Filed:
    """A letter in the dead-letter topic: its offset there, and whether it was put back."""

    number: int
    letter: DeadLetter
    put_back: bool

    @property
    def waits(self) -> bool:
        """True if it can be put back and was not yet."""
        return not self.put_back and self.letter.cause != UNREADABLE


def encode_dead_letter(message: Message, cause: str, reason: str, *, kept_bytes: int = KEPT_BYTES) -> bytes:
    """Returns the dead letter of a message as bytes on the log, at most four times `kept_bytes` of them."""
    letter = DeadLetter(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        cause=cause,
        reason=reason if len(reason) <= _REASON_CHARS else f"{reason[:_REASON_CHARS]}…",
        size_bytes=len(message.value),
        timestamp_ms=message.timestamp_ms,
        value_base64=_base64(message.value[:kept_bytes]),
        key_base64=None if message.key is None else _base64(message.key[:kept_bytes]),
        key_size_bytes=len(message.key or b""),
    )
    return msgspec.json.encode(letter)


def read_dead_letters(log: EventLog, topics: Topics) -> list[Filed]:
    """Returns all dead letters, oldest first; a message that is none has the cause `UNREADABLE`."""
    letters: dict[int, DeadLetter] = {}
    marks: set[int] = set()
    for number, found in _scan(log, topics, 0, log.end_offsets(topics.dead_letters)[0]):
        if isinstance(found, PutBack):
            marks.add(found.letter)
        else:
            letters[number] = found
    return [Filed(number, letter, number in marks) for number, letter in letters.items()]


def waiting(log: EventLog, topics: Topics, cause: str) -> set[int]:
    """Returns the numbers of the letters of a cause that can be put back and were not yet."""
    numbers: set[int] = set()
    for number, found in _scan(log, topics, 0, log.end_offsets(topics.dead_letters)[0]):
        if isinstance(found, PutBack):
            numbers.discard(found.letter)
        elif found.cause == cause != UNREADABLE:
            numbers.add(number)
    return numbers


@dataclass(frozen=True)
class Letters:
    """The dead letters as of now.

    Attributes:
        total: how many there are.
        waiting: how many can be put back and were not yet, by cause, the commonest first.
        newest: the last `NEWEST`, oldest first, each with the start of its message.
    """

    total: int = 0
    waiting: dict[str, int] = field(default_factory=dict)
    newest: list[Filed] = field(default_factory=list)


class Filing:
    """Follows the dead letters in bounded memory: counts of all, and the newest."""

    def __init__(self) -> None:
        self._newest: dict[int, Filed] = {}
        self._waiting: Counter[str] = Counter()
        self._total = 0
        self._next = 0

    def read_on(self, log: EventLog, topics: Topics) -> Letters:
        """Reads what has come since the last call."""
        end = log.end_offsets(topics.dead_letters)[0]
        for number, found in _scan(log, topics, self._next, end):
            if isinstance(found, PutBack):
                self._mark(log, topics, found.letter)
            else:
                self._total += 1
                filed = Filed(number, _shortened(found), put_back=False)
                self._newest[number] = filed
                self._waiting[found.cause] += filed.waits
                if len(self._newest) > NEWEST:
                    del self._newest[next(iter(self._newest))]
            self._next = number + 1
        self._next = max(self._next, end)
        counts = {cause: count for cause, count in self._waiting.most_common() if count}
        return Letters(self._total, counts, list(self._newest.values()))

    def _mark(self, log: EventLog, topics: Topics, number: int) -> None:
        if number in self._newest:
            self._newest[number] = Filed(number, self._newest[number].letter, put_back=True)
            letter: DeadLetter | PutBack | None = self._newest[number].letter
        else:
            letter = next((found for _, found in _scan(log, topics, number, number + 1)), None)
        if isinstance(letter, DeadLetter):
            self._waiting[letter.cause] -= 1


def causes(letters: Collection[Filed]) -> dict[str, int]:
    """Counts the letters that wait to be put back, by cause."""
    return dict(Counter(filed.letter.cause for filed in letters if filed.waits).most_common())


def _scan(log: EventLog, topics: Topics, start: int, stop: int) -> Iterator[tuple[int, DeadLetter | PutBack]]:
    """Letters and marks by their offsets; a message that is neither becomes a letter that says so."""
    start = max(start, log.offsets_at(topics.dead_letters, 0)[0])
    for message in log.read(topics.dead_letters, 0, start, stop) if start < stop else ():
        try:
            found: DeadLetter | PutBack = msgspec.json.decode(message.value, type=DeadLetter | PutBack)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            found = _unreadable(message, str(error))
        else:
            if isinstance(found, DeadLetter) and not _is_base64(found):
                found = _unreadable(message, "its message is not base64")
        yield message.offset, found


def _unreadable(message: Message, why: str) -> DeadLetter:
    data = encode_dead_letter(message, UNREADABLE, f"this message of the topic is no dead letter: {why}")
    return msgspec.json.decode(data, type=DeadLetter)


def _is_base64(letter: DeadLetter) -> bool:
    try:
        return len(letter.value) >= 0 and (letter.key is None or len(letter.key) >= 0)
    except ValueError:
        return False


def _shortened(letter: DeadLetter) -> DeadLetter:
    return msgspec.structs.replace(letter, value_base64=_base64(letter.value[:SHOWN_BYTES]), key_base64=None)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def put_back(log: EventLog, topics: Topics, numbers: Collection[int], mended: Mapping[int, bytes]) -> list[int]:
    """Appends letters to the topics they came from, once each; returns the numbers of those that were not before.

    An item's message gets the version of its first arrival, so that it does not undo what came since; an event is
    marked as old on purpose, so that it is not quarantined as late.

    Args:
        numbers: offsets in the dead-letter topic.
        mended: by number, what to append instead of the original bytes.

    Raises:
        LogError: a number is no letter's, or a letter was cut short and is not mended; nothing is appended.
        FencedError: somebody else has begun to put letters back.
    """
    transactor = log.transactor(f"deadletters-{topics.dead_letters}")
    chosen = {*numbers, *mended}
    try:
        # Read after the fence: what another one has put back before it is seen.
        end = log.end_offsets(topics.dead_letters)[0]
        _check(log, topics, chosen, mended, end)
        done = {found.letter for _, found in _scan(log, topics, 0, end) if isinstance(found, PutBack)}
        left = sorted(chosen - done)
        pending: list[tuple[int, DeadLetter]] = []
        for number, found in _scan(log, topics, left[0], left[-1] + 1) if left else ():
            if number in chosen - done and isinstance(found, DeadLetter):
                pending.append((number, found))
                if len(pending) == _CHUNK or sum(letter.size_bytes for _, letter in pending) > _CHUNK_BYTES:
                    _append(transactor, topics, pending, mended)
                    pending = []
        _append(transactor, topics, pending, mended)
        return left
    finally:
        transactor.close()


def _check(log: EventLog, topics: Topics, chosen: set[int], mended: Mapping[int, bytes], end: int) -> None:
    missing = set(chosen)
    for number, found in _scan(log, topics, 0, end):
        if number not in missing or isinstance(found, PutBack):
            continue
        missing.discard(number)
        if found.cause == UNREADABLE:
            raise LogError(f"letter {number}: {found.reason}; it cannot be put back")
        if not found.whole and number not in mended:
            raise LogError(f"letter {number}: only the start of its {found.size_bytes} bytes was kept; give it mended")
    if missing:
        raise LogError(f"letter {min(missing)}: no such letter; `tessera deadletters list` shows all")


def _append(
    transactor: Transactor, topics: Topics, letters: list[tuple[int, DeadLetter]], mended: Mapping[int, bytes]
) -> None:
    if not letters:
        return
    with transactor.begin() as transaction:
        for number, letter in letters:
            own: dict[str, object] = (
                {"_version": letter.timestamp_ms} if letter.topic == topics.items else {"_backfill": True}
            )
            value = _marked(mended.get(number, letter.value), own)
            transaction.append(letter.topic, value, key=letter.key)
            transaction.append(topics.dead_letters, msgspec.json.encode(PutBack(number)))


def _marked(value: bytes, own: dict[str, object]) -> bytes:
    """A message with fields that it does not have itself; what is no object stays as it is."""
    try:
        message = msgspec.json.decode(value, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return value
    return msgspec.json.encode(own | message)
