"""Pins: the inputs of each step of a stream of several partitions, written before any process does the step.

The topic `steps` has one partition. The leader writes the pin of a step in a transaction of its own, so only the newest
leader pins. Each row range then commits the step alone. After a crash, a step that some ranges have is done again from
its pin with the same bits, and the other ranges write it.
"""

import time
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import msgspec

from features.errors import EventError, LogError
from models.bundle import delta
from models.bundle.delta import SNAPSHOT_SEQ, Delta, Source
from streaming.log.protocol import EventLog, Message, Offsets, offset_in
from streaming.log.topics import Topics

VERSION = 1
_FIRST_WINDOW = 64
_VISIBLE_S, _POLL_S = 30.0, 0.02
Found = TypeVar("Found")


class Pin(msgspec.Struct, frozen=True, array_like=True):
    """Inputs of one step.

    Attributes:
        version: Version of this format.
        bundle: Id of the bundle.
        seq: Number of the step, ≥ 1.
        sources: Ranges of the messages.
        processes: Number of processes of the stream that pinned the step. No result depends on it.
    """

    version: int
    bundle: str
    seq: int
    sources: list[Source]
    processes: int


def encode_pin(pin: Pin) -> bytes:
    """Encodes a pin: a msgpack array in the order of the fields."""
    return msgspec.msgpack.encode(pin)


def decode_pin(data: bytes) -> Pin:
    """Decodes a pin.

    Raises:
        EventError: The bytes are no pin, or the version is unknown.
    """
    try:
        pin = msgspec.msgpack.decode(data, type=Pin)
    except msgspec.DecodeError as error:
        raise EventError(f"pin of a step: {error}") from error
    if pin.version != VERSION:
        raise EventError(f"pin of a step: version {pin.version}, this release reads {VERSION}", cause="unknown-version")
    return pin


class Marks(msgspec.Struct, frozen=True):
    """State of the log when a stream of several partitions starts.

    Attributes:
        seq: Number of the last step that every row range has.
        done: Number of the last step that each row range has, by number.
        sources: Inputs of step `seq + 1` if it is pinned.
        poison: Addresses of the messages that step `seq + 1` skips. None if no range has this step.
    """

    seq: int
    done: list[int]
    sources: list[Source] = []
    poison: list[tuple[str, int, int]] | None = None


def marks(
    log: EventLog, topics: Topics, bundle: str, partitions: int, *, begin: Offsets = (), floor: Callable[[], int]
) -> Marks:
    """Returns how far each row range has come. No process may write meanwhile.

    Args:
        log: Log of the topics.
        topics: Names of the topics.
        bundle: Id of the bundle.
        partitions: Number of row ranges.
        begin: Offset in each partition before which no delta of the bundle lies.
        floor: Returns the number of a step that every range has. It counts if the log no longer keeps such a delta.

    Raises:
        LogError: The ranges and the pins contradict each other, so one of the topics was replaced.
    """
    newest = [
        _newest_delta(log, topics.deltas, number, bundle, offset_in(begin, number)) for number in range(partitions)
    ]
    least = floor() if None in newest else SNAPSHOT_SEQ
    done = [least if change is None else change.seq for change in newest]
    seq = min(done)
    pin = _newest(log, topics.steps, 0, lambda message: _own_pin(message, bundle))
    pinned = least if pin is None else pin.seq
    if max(done) > seq + 1 or not max(done) <= pinned <= seq + 1:
        raise LogError(
            f"{topics.deltas}: the last steps of the row ranges are {done}, the last pinned step is {pinned}; a topic "
            f"was deleted or replaced: give {topics.deltas} and {topics.steps} back, or begin with new topics"
        )
    ahead = next((change for change in newest if change is not None and change.seq == seq + 1), None)
    return Marks(
        seq,
        done,
        pin.sources if pin is not None and pinned == seq + 1 else [],
        None if ahead is None else ahead.poison,
    )


def await_step(log: EventLog, topic: str, bundle: str, partitions: Sequence[int], seq: int) -> None:
    """Waits until partitions of the deltas show a committed step. A commit shows within milliseconds, not at once.

    Raises:
        LogError: The step does not show.
    """
    give_up = time.monotonic() + _VISIBLE_S
    for number in partitions if seq > SNAPSHOT_SEQ else ():
        while (change := _newest_delta(log, topic, number, bundle)) is None or change.seq < seq:
            if time.monotonic() > give_up:
                found = "none" if change is None else change.seq
                raise LogError(f"{topic} partition {number}: expected the committed step {seq}, found {found}")
            time.sleep(_POLL_S)


def _newest_delta(log: EventLog, topic: str, partition: int, bundle: str, begin: int = 0) -> Delta | None:
    """Returns the last delta of a bundle in a partition. It has the step's inputs."""

    def own(message: Message) -> Delta | None:
        change = delta.decode(message.value)
        return change if change.bundle == bundle and change.sources else None

    return _newest(log, topic, partition, own, begin)


def _own_pin(message: Message, bundle: str) -> Pin | None:
    pin = decode_pin(message.value)
    return pin if pin.bundle == bundle else None


def _newest(
    log: EventLog, topic: str, partition: int, read: Callable[[Message], Found | None], begin: int = 0
) -> Found | None:
    """Returns the last message of a partition from `begin` on that `read` accepts, as `read` returns it."""
    oldest, stop = max(begin, log.offsets_at(topic, 0)[partition]), log.end_offsets(topic)[partition]
    size = _FIRST_WINDOW
    while oldest < stop:
        start = max(oldest, stop - size)
        found = [one for message in log.read(topic, partition, start, stop) if (one := read(message)) is not None]
        if found:
            return found[-1]
        stop, size = start, 4 * size
    return None


def messages_of(log: EventLog, sources: Sequence[Source]) -> list[Message]:
    """Returns the messages of a step's inputs.

    Raises:
        LogError: The log does not have exactly these messages.
    """
    found: list[Message] = []
    for source in sources:
        part = list(log.read(source.topic, source.partition, source.first, source.last + 1))
        if not part or (part[0].offset, part[-1].offset) != (source.first, source.last):
            raise LogError(
                f"{source.topic} partition {source.partition}: a pinned step has messages {source.first} to "
                f"{source.last}, and the log no longer keeps them; restore the topic"
            )
        found += part
    return found


def sources_of(messages: Sequence[Message]) -> list[Source]:
    """Returns the ranges of messages, of each partition in order."""
    first: dict[tuple[str, int], Message] = {}
    last: dict[tuple[str, int], Message] = {}
    # In the order of a step, the messages of a partition follow each other.
    for partition, group in groupby(messages, key=attrgetter("topic", "partition")):
        run = list(group)
        first.setdefault(partition, run[0])
        last[partition] = run[-1]
    return [Source(*partition, one.offset, last[partition].offset) for partition, one in first.items()]
