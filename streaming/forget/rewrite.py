"""Removes what the log still holds of forgotten users.

In the embedded log, `rewrite` replaces the user's messages by blank ones, in one transaction. An Arrow batch keeps the
rows of other users. All offsets stay. Only
messages that the newest snapshot covers change, so that a restart never applies a changed message.

On Kafka no message can be changed. `covered` then says up to where `delete records` may remove all messages.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from features.dataset.descriptor import Events
from features.errors import EventError, StreamError
from features.message import Rows, event_rows
from features.shown.message import Impression, decode_impression
from features.value.canonical import canonical_values
from features.value.forgotten import Forgotten, ForgottenUsers
from features.wire.decoder import Decoded, event_decoder, kept_rows
from features.wire.schemas import Schemas
from models.bundle import aggregate_record, delta, record
from models.bundle.delta import Delta, Record
from streaming.dead_letter import DeadLetter, replace_value
from streaming.forget.message import decode_tombstone
from streaming.forget.request import audit
from streaming.log.protocol import BLANK, EventLog, Message, Positions
from streaming.log.topics import Topics

Owner = Callable[[bytes], tuple[str, int] | None]
"""Returns the user and the time, microseconds since 1970, that a message names. None for a message without a user."""
_CHUNK = 1_000
_LONG_AGO_US = -(2**63)


@dataclass
class Rewrite:
    """Changes of a log.

    Attributes:
        messages: Changed messages, each with its address.
        counts: Number of changed messages by topic.
        users: Users whose tombstone is covered, or is no longer kept.
        newer: Number of tombstones that are not covered yet.
    """

    messages: list[Message] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    users: ForgottenUsers = field(default_factory=ForgottenUsers)
    newer: int = 0


def planned(
    log: EventLog,
    topics: Topics,
    events: Events,
    *,
    canonical: int,
    covered: Positions,
    schemas: Schemas | None = None,
    owners: Mapping[str, Owner] | None = None,
) -> Rewrite:
    """Returns the changes that remove forgotten users from the kept messages of a log.

    Args:
        log: Log of the topics.
        topics: Names of the topics.
        events: Events' table of the bundle that streams.
        canonical: Version of the canonical form of values, of the bundle.
        covered: Position up to which messages may change, by partition: of the topics `events` and `deltas`, those of a
            snapshot that the store has.
        schemas: Schemas of messages in Avro and Protobuf.
        owners: Reads the user of the messages of further topics, by topic. No state depends on these topics.
    """
    found = Rewrite()
    places: dict[int, list[tuple[int, Forgotten]]] = {}
    tombstones = ForgottenUsers()
    for message in _kept(log, topics.events):
        request = _request(message)
        if request is None:
            continue
        tombstones.add(request)
        if message.offset >= covered.get((topics.events, message.partition), 0):
            found.newer += 1
            continue
        found.users.add(request)
        places.setdefault(message.partition, []).append((message.offset, request))
    for request in _expired(log, topics, tombstones):
        found.users.add(request)
    if not len(found.users):
        return found
    reader = _EventReader(events, canonical, schemas)
    for chunk in _chunks(_kept(log, topics.events, covered)):
        _note(found, topics.events, reader.changed(chunk, found.users, places))
    for topic, owner in ({topics.impressions: _shown_to} | dict(owners or {})).items():
        _note(found, topic, _owned(_kept(log, topic), found.users, owner))
    _note(found, topics.dead_letters, _letters(_kept(log, topics.dead_letters), found.users, reader))
    _note(found, topics.deltas, _deltas(log, topics, covered))
    return found


def _expired(log: EventLog, topics: Topics, tombstones: ForgottenUsers) -> Iterator[Forgotten]:
    """Yields the requests that a trainer has applied and whose tombstone the log no longer keeps."""
    kept = {(request.user, request.salt) for request in tombstones}
    for line in audit(log, topics):
        if line.kind == "removed" and (line.user, line.salt) not in kept:
            yield Forgotten(line.user, line.salt, line.at_us)


def _note(found: Rewrite, topic: str, messages: Iterator[Message]) -> None:
    for message in messages:
        found.messages.append(message)
        found.counts[topic] = found.counts.get(topic, 0) + 1


def _kept(log: EventLog, topic: str, covered: Positions | None = None) -> Iterator[Message]:
    oldest = log.offsets_at(topic, 0)
    for partition, end in log.end_offsets(topic).items():
        stop = end if covered is None else min(end, covered.get((topic, partition), 0))
        if oldest[partition] < stop:
            yield from log.read(topic, partition, oldest[partition], stop)


def _chunks(messages: Iterator[Message]) -> Iterator[list[Message]]:
    chunk: list[Message] = []
    for message in messages:
        chunk.append(message)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _request(message: Message) -> Forgotten | None:
    try:
        return decode_tombstone(message.value)
    except EventError:
        return None


def _blank(message: Message, value: bytes = BLANK) -> Message:
    return Message(message.topic, message.partition, message.offset, None, value, message.timestamp_ms)


class _EventReader:
    """Reads users and times of messages of the topic `events`."""

    def __init__(self, events: Events, canonical: int, schemas: Schemas | None) -> None:
        self._events, self._canonical = events, canonical
        self._decode = event_decoder(events, schemas)

    def changed(
        self, chunk: Sequence[Message], users: ForgottenUsers, tombstones: Mapping[int, list[tuple[int, Forgotten]]]
    ) -> Iterator[Message]:
        """Yields the messages that change: a tombstone loses its key, an older event of its user its content."""
        for message, rows in zip(chunk, self.read(chunk), strict=True):
            if _request(message) is not None:
                if message.key is not None:
                    yield _blank(message, message.value)
                continue
            if message.value == BLANK:
                continue

            def goes(row: "_Row", message: Message = message) -> bool:
                until = None if row.user is None else users.until(row.user)
                if row.user is None or until is None:
                    return False
                earlier = any(
                    message.offset < offset and ForgottenUsers([request]).until(row.user) is not None
                    for offset, request in tombstones.get(message.partition, ())
                )
                return earlier or min(row.times_us) <= until

            value = _without_rows(message.value, rows, [goes(row) for row in rows])
            if value is not None:
                yield _blank(message, value)

    def read(self, chunk: Sequence[Message]) -> list[list["_Row"]]:
        """Returns the rows of each message. A message that cannot be read is one row of the user that its key names."""
        found: list[list[_Row]] = []
        values: list[tuple[Any, ...]] = []
        rows: list[_Row] = []
        for message in chunk:
            key = None if message.key is None else message.key.decode(errors="replace")
            try:
                decoded = self._decode.read(message.value)
            except (EventError, StreamError):
                found.append([_Row(key, [_append_us(message)], 0, 1)])
                continue
            if isinstance(decoded, Decoded):
                size, places, taken = 1, [0], [decoded.row]
            else:
                size = len(decoded.places) + len(decoded.refused)
                places, taken = decoded.places, decoded.frame.rows()
            own = [_Row(key, [_append_us(message)], place, size) for place in places]
            found.append(own)
            values += taken
            rows += own
        if not rows or self._events.user is None:
            return found
        column = self._decode.columns.index(self._events.user)
        for row, own_values in zip(rows, values, strict=True):
            row.user = self._user(own_values[column]) or row.user
        if self._events.time is not None:
            frame, _ = event_rows(Rows(self._decode.columns, [*values]), self._events, version=self._canonical)
            numbers = frame["event"].to_list() if frame.height else []
            for number, time in zip(numbers, frame["time"].to_list() if frame.height else [], strict=True):
                rows[number].times_us.append(time)
        return found

    def _user(self, value: object) -> str | None:
        of_csv = self._events.kind == "csv"
        try:
            user = canonical_values("user", [value], version=self._canonical, of_csv=of_csv)[0]
        except (TypeError, ValueError):
            return None
        return user if isinstance(user, str) else None


@dataclass
class _Row:
    """Row of a message.

    Attributes:
        user: User of the row, None without one.
        times_us: Time of the append, and of the event, microseconds since 1970.
        place: Position in the message.
        size: Number of rows of the message.
    """

    user: str | None
    times_us: list[int]
    place: int
    size: int


def _without_rows(value: bytes, rows: Sequence[_Row], gone: Sequence[bool]) -> bytes | None:
    """Returns a message without some of its rows: `BLANK` if none is left, None if none goes."""
    if not any(gone):
        return None
    removed = {row.place for row, goes in zip(rows, gone, strict=True) if goes}
    left = [place for place in range(rows[0].size) if place not in removed]
    return kept_rows(value, left) if left else BLANK


def _append_us(message: Message) -> int:
    return 1_000 * message.timestamp_ms


def _shown_to(value: bytes) -> tuple[str, int] | None:
    try:
        shown = decode_impression(value)
    except EventError:
        return None
    return (shown.user, 1_000 * shown.time_ms) if isinstance(shown, Impression) else None


def _owned(messages: Iterator[Message], users: ForgottenUsers, owner: Owner) -> Iterator[Message]:
    for message in messages:
        owned = owner(message.value)
        if owned is not None:
            user, time_us = owned
            until = users.until(user)
            if until is not None and min(time_us, _append_us(message)) <= until:
                yield _blank(message)


def _letters(messages: Iterator[Message], users: ForgottenUsers, reader: _EventReader) -> Iterator[Message]:
    for message in messages:
        try:
            letter = msgspec.json.decode(message.value, type=DeadLetter)
            original = Message(
                letter.topic, letter.partition, letter.offset, letter.key, letter.value, letter.timestamp_ms
            )
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
            continue
        (rows,) = reader.read([original])
        limits = [None if row.user is None else users.until(row.user) for row in rows]
        gone = [until is not None and min(row.times_us) <= until for row, until in zip(rows, limits, strict=True)]
        value = _without_rows(original.value, rows, gone)
        if value is None:
            continue
        if value == BLANK:
            yield _blank(message)
        else:
            kept = replace_value(letter, value)
            yield _blank(message, msgspec.json.encode(kept))


def _deltas(log: EventLog, topics: Topics, covered: Positions) -> Iterator[Message]:
    """Yields the deltas without the records that their bundle's stream has removed, and without users' ids."""
    users: dict[tuple[str, str], int] = {}
    aggregates: dict[tuple[str, str], int] = {}
    for message in _kept(log, topics.deltas, covered):
        change = delta.decode(message.value)
        for one in change.records:
            if one.kind == record.FORGOTTEN:
                forgotten = record.decode_forgotten_record(one.payload)
                if forgotten.user:
                    users[change.bundle, forgotten.user] = change.seq
                aggregates |= {(change.bundle, name): change.seq for name in forgotten.aggregates}
    for message in _kept(log, topics.deltas, covered):
        change = delta.decode(message.value)
        records = [kept for one in change.records for kept in _without(one, change, users, aggregates)]
        if records != change.records:
            yield _blank(message, delta.encode(msgspec.structs.replace(change, records=records)))


def _without(
    one: Record, change: Delta, users: Mapping[tuple[str, str], int], aggregates: Mapping[tuple[str, str], int]
) -> Iterator[Record]:
    """Yields a record without what was removed later."""
    if one.kind == record.HISTORY:
        if change.seq < users.get((change.bundle, one.id), 0):
            return
    elif (user := record.consumed_user(one.kind, one.id)) is not None:
        if change.seq < users.get((change.bundle, user), 0):
            return
    elif one.kind == record.FORGOTTEN:
        forgotten = record.decode_forgotten_record(one.payload)
        one = Record(one.kind, one.id, record.encode(msgspec.structs.replace(forgotten, user="")))
    elif one.kind == aggregate_record.BATCH:
        group, keys, rows = aggregate_record.decode_batch(one)
        names = [(change.bundle, aggregate_record.key_id(group, key)) for key in keys.tolist()]
        kept = np.array([change.seq >= aggregates.get(name, 0) for name in names], dtype=np.bool_)
        if not kept.all():
            parts = aggregate_record.batch_records(group, keys[kept], rows[kept], limit=len(one.payload) + 64)
            yield from (Record(one.kind, one.id, part.payload) for part in parts)
            return
    yield one
