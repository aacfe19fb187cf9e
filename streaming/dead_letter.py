"""Dead letters: quarantined messages with their position, reason and original bytes.

The topic has letters and marks. A mark says that a letter was put back. The mark is committed in the same transaction
as the message that was put back, so a letter is put back exactly once, even if several callers put it back.
"""

import base64
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from features.errors import LogError
from features.wire.decoder import marked
from streaming.log.protocol import BLANK, EventLog, Message, Transactor
from streaming.log.topics import Topics

KEPT_BYTES = 1 << 20
"""Largest number of kept bytes of a message, so that a dead letter fits into a message."""
_REASON_CHARS = 2_000
UNREADABLE = "unreadable"
"""Cause of a message in the topic that is no dead letter."""
NEWEST, SHOWN_BYTES = 1_000, 4_096
"""Number of letters in `Letters.newest`, and number of bytes of each message."""
# Largest number of letters and bytes that a transaction puts back.
_CHUNK, _CHUNK_BYTES = 500, 32 << 20


class DeadLetter(msgspec.Struct, frozen=True, tag="letter", tag_field="kind"):
    """Quarantined message, as JSON on the log.

    Attributes:
        topic, partition, offset: Position of the message in the log.
        cause: Kind of the fault, in one word.
        reason: Description of the fault.
        size_bytes: Size of the message, bytes. At most `KEPT_BYTES` of the message are kept.
        timestamp_ms: Append time of the message, Unix milliseconds.
        value_base64: Message, or its first bytes, as base64.
        key_base64: Key, or its first bytes, as base64. None without a key.
        key_size_bytes: Size of the key, bytes. At most `KEPT_BYTES` of the key are kept.
        bundle: Id of the bundle whose stream could not use the message. "" in letters of earlier releases.
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
    bundle: str = ""

    @property
    def value(self) -> bytes:
        """The original message, or its first bytes if `size_bytes` is larger."""
        return base64.b64decode(self.value_base64)

    @property
    def key(self) -> bytes | None:
        """The original key, or its first bytes if `key_size_bytes` is larger."""
        return None if self.key_base64 is None else base64.b64decode(self.key_base64)

    @property
    def whole(self) -> bool:
        """True if all bytes of message and key are kept."""
        return len(self.value) >= self.size_bytes and len(self.key or b"") >= self.key_size_bytes


class PutBack(msgspec.Struct, frozen=True, tag="put-back", tag_field="kind"):
    """Mark of a letter that was put back.

    Attributes:
        letter: Offset of the letter in the topic of dead letters.
        moved: True if the letter was appended again instead.
    """

    letter: int
    moved: bool = False


@dataclass(frozen=True)
class Filed:
    """Letter in the topic of dead letters.

    Attributes:
        number: Offset of the letter in the topic.
        letter: The letter.
        put_back: True if the letter was put back.
    """

    number: int
    letter: DeadLetter
    put_back: bool

    @property
    def waits(self) -> bool:
        """True if the letter can be put back and was not put back yet."""
        return not self.put_back and self.letter.cause != UNREADABLE


def encode_dead_letter(
    message: Message, cause: str, reason: str, *, kept_bytes: int = KEPT_BYTES, bundle: str = ""
) -> bytes:
    """Encodes the dead letter of a message.

    Args:
        message: The quarantined message.
        cause: Kind of the fault, in one word.
        reason: Description of the fault.
        kept_bytes: Largest number of kept bytes of the message, and of its key.
        bundle: Id of the bundle whose stream could not use the message.

    Returns:
        The letter, at most four times `kept_bytes` bytes.
    """
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
        bundle=bundle,
    )
    return msgspec.json.encode(letter)


def replace_value(letter: DeadLetter, value: bytes) -> DeadLetter:
    """Returns a letter with another message, and without a key."""
    return msgspec.structs.replace(
        letter, value_base64=_base64(value), size_bytes=len(value), key_base64=None, key_size_bytes=0
    )


def read_dead_letters(log: EventLog, topics: Topics) -> list[Filed]:
    """Returns all dead letters, oldest first. A message that is no dead letter has the cause `UNREADABLE`."""
    letters: dict[int, DeadLetter] = {}
    marks: set[int] = set()
    for number, entry in _scan(log, topics, 0, log.end_offsets(topics.dead_letters)[0]):
        if isinstance(entry, PutBack):
            marks.add(entry.letter)
        else:
            letters[number] = entry
    return [Filed(number, letter, number in marks) for number, letter in letters.items()]


def waiting(log: EventLog, topics: Topics, cause: str) -> set[int]:
    """Returns the numbers of the letters of a cause that can be put back and were not put back yet."""
    numbers: set[int] = set()
    for number, entry in _scan(log, topics, 0, log.end_offsets(topics.dead_letters)[0]):
        if isinstance(entry, PutBack):
            numbers.discard(entry.letter)
        elif entry.cause == cause != UNREADABLE:
            numbers.add(number)
    return numbers


@dataclass(frozen=True)
class Letters:
    """Summary of the dead letters.

    Attributes:
        total: Number of letters.
        waiting: Number of letters that can be put back and were not put back yet, by cause, the most frequent first.
        newest: The last `NEWEST` letters, oldest first, each with the start of its message.
    """

    total: int = 0
    waiting: dict[str, int] = field(default_factory=dict)
    newest: list[Filed] = field(default_factory=list)


class Filing:
    """Follows the dead letters in bounded memory: counts all letters, and keeps the newest."""

    def __init__(self) -> None:
        self._newest: dict[int, Filed] = {}
        self._waiting: Counter[str] = Counter()
        self._total = 0
        self._next = 0

    def read_on(self, log: EventLog, topics: Topics) -> Letters:
        """Reads the new letters and marks, and returns the summary of all letters."""
        end = log.end_offsets(topics.dead_letters)[0]
        for number, entry in _scan(log, topics, self._next, end):
            if isinstance(entry, PutBack):
                self._mark(log, topics, entry.letter)
            else:
                self._total += 1
                filed = Filed(number, _shortened(entry), put_back=False)
                self._newest[number] = filed
                self._waiting[entry.cause] += filed.waits
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
            letter = next((entry for _, entry in _scan(log, topics, number, number + 1)), None)
        if isinstance(letter, DeadLetter):
            self._waiting[letter.cause] -= 1


def causes(letters: Collection[Filed]) -> dict[str, int]:
    """Counts the letters that wait to be put back, by cause."""
    return dict(Counter(filed.letter.cause for filed in letters if filed.waits).most_common())


def _scan(log: EventLog, topics: Topics, start: int, stop: int) -> Iterator[tuple[int, DeadLetter | PutBack]]:
    """Yields letters and marks with their offsets. Any other message is yielded as a letter with cause `UNREADABLE`."""
    start = max(start, log.offsets_at(topics.dead_letters, 0)[0])
    for message in log.read(topics.dead_letters, 0, start, stop) if start < stop else ():
        if message.value == BLANK:
            continue
        try:
            entry: DeadLetter | PutBack = msgspec.json.decode(message.value, type=DeadLetter | PutBack)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            entry = _unreadable(message, str(error))
        else:
            if isinstance(entry, DeadLetter) and not _is_base64(entry):
                entry = _unreadable(message, "its message is not base64")
        yield message.offset, entry


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
    """Appends the messages of letters to their original topics, each once.

    A message that several bundles could not use has a letter of each, and is put back once for all of them.
    An item's message gets the version of its first arrival, so that it does not undo later changes. An event is marked
    as a backfill, so that it is not quarantined as late.

    Args:
        log: Log of the topics.
        topics: Names of the topics.
        numbers: Numbers of letters.
        mended: Bytes to append instead of the original message, by the number of the letter.

    Returns:
        Numbers of the letters that this call put back. Letters that were put back before are skipped.

    Raises:
        LogError: A number is not a letter's, or a letter was shortened and has no new bytes. Nothing is appended.
        FencedError: Another caller has started to put letters back.
    """
    transactor = log.transactor(f"deadletters-{topics.dead_letters}")
    chosen = {*numbers, *mended}
    try:
        # The topic is read after the fence, so that letters which another caller has put back are seen.
        end = log.end_offsets(topics.dead_letters)[0]
        _check(log, topics, chosen, mended, end)
        marks = [entry for _, entry in _scan(log, topics, 0, end) if isinstance(entry, PutBack)]
        done, put = {mark.letter for mark in marks}, {mark.letter for mark in marks if not mark.moved}
        twins = _twins(log, topics, chosen - done, end)
        groups = [group & chosen for group in twins.values() if not group & put]
        once = {min(group - done, key=lambda one: (one not in mended, one)) for group in groups}
        left = sorted(once)
        pending: list[tuple[int, DeadLetter]] = []
        for number, entry in _scan(log, topics, left[0], left[-1] + 1) if left else ():
            if number in once and isinstance(entry, DeadLetter):
                pending.append((number, entry))
                if len(pending) == _CHUNK or sum(letter.size_bytes for _, letter in pending) > _CHUNK_BYTES:
                    _append(transactor, topics, pending, mended, twins)
                    pending = []
        _append(transactor, topics, pending, mended, twins)
        return left
    finally:
        transactor.close()


def move_waiting(log: EventLog, topics: Topics, before: int, *, changed: Mapping[int, bytes]) -> None:
    """Appends the letters that wait before an offset again, each once, so that a log may delete all before the offset.

    Args:
        log: Log of the topics.
        topics: Names of the topics.
        before: Offset in the topic of dead letters.
        changed: New values of letters, by number. A blank letter is not kept.

    Raises:
        FencedError: Another caller has started to put letters back.
    """
    transactor = log.transactor(f"deadletters-{topics.dead_letters}")
    try:
        kept = [one for one in read_dead_letters(log, topics) if one.number < before and one.waits]
        moved = [one for one in kept if changed.get(one.number) != BLANK]
        for start in range(0, len(moved), _CHUNK):
            with transactor.begin() as transaction:
                for filed in moved[start : start + _CHUNK]:
                    value = changed.get(filed.number) or msgspec.json.encode(filed.letter)
                    transaction.append(topics.dead_letters, value)
                    transaction.append(topics.dead_letters, msgspec.json.encode(PutBack(filed.number, moved=True)))
    finally:
        transactor.close()


def _check(log: EventLog, topics: Topics, chosen: set[int], mended: Mapping[int, bytes], end: int) -> None:
    missing = set(chosen)
    for number, entry in _scan(log, topics, 0, end):
        if number not in missing or isinstance(entry, PutBack):
            continue
        missing.discard(number)
        if entry.cause == UNREADABLE:
            raise LogError(f"letter {number}: {entry.reason}; it cannot be put back")
        if not entry.whole and number not in mended:
            raise LogError(f"letter {number}: only the start of its {entry.size_bytes} bytes was kept; give it mended")
    if missing:
        raise LogError(f"letter {min(missing)}: no such letter; `tessera deadletters list` shows all")


def _twins(log: EventLog, topics: Topics, chosen: set[int], end: int) -> dict[int, set[int]]:
    """Returns the numbers of the letters of all bundles for the same message, by the number of each chosen letter."""

    def identity(number: int, letter: DeadLetter) -> tuple[Any, ...]:
        # A letter of an earlier release is the only one of its message.
        own = letter.topic, letter.partition, letter.offset, letter.value_base64
        return own if letter.bundle else (number,)

    groups: dict[tuple[Any, ...], set[int]] = {}
    for number, entry in _scan(log, topics, 0, end):
        if number in chosen and isinstance(entry, DeadLetter):
            groups[identity(number, entry)] = set()
    found: dict[int, set[int]] = {}
    for number, entry in _scan(log, topics, 0, end):
        if isinstance(entry, DeadLetter) and (group := groups.get(identity(number, entry))) is not None:
            group.add(number)
            if number in chosen:
                found[number] = group
    return found


def _append(
    transactor: Transactor,
    topics: Topics,
    letters: list[tuple[int, DeadLetter]],
    mended: Mapping[int, bytes],
    twins: Mapping[int, set[int]],
) -> None:
    if not letters:
        return
    with transactor.begin() as transaction:
        for number, letter in letters:
            fields: dict[str, object] = (
                {"_version": letter.timestamp_ms} if letter.topic == topics.items else {"_backfill": True}
            )
            value = marked(mended.get(number, letter.value), fields)
            transaction.append(letter.topic, value, key=letter.key)
            for twin in sorted(twins[number]):
                transaction.append(topics.dead_letters, msgspec.json.encode(PutBack(twin)))
