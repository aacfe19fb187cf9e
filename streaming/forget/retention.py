"""Rewrites a log without its forgotten users: message by message in the embedded log, by deletion on Kafka."""

from collections.abc import Mapping, Set

from features.errors import StreamError
from features.value.forgotten import Forgotten
from features.wire.schemas import Schemas
from models.bundle.bundle import Bundle
from streaming.dead_letter import move_waiting
from streaming.forget.message import encode_line
from streaming.forget.rewrite import Owner, Rewrite, planned
from streaming.log.protocol import EventLog, Message, Offsets, Positions, offset_in
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot


def rewrite(
    log: EventLog,
    bundle: Bundle,
    topics: Topics,
    snapshot: Snapshot,
    *,
    stored: Offsets,
    delete_records: bool = False,
    schemas: Schemas | None = None,
    owners: Mapping[str, Owner] | None = None,
) -> Rewrite:
    """Removes forgotten users from the messages that a snapshot covers, and appends a line to the audit for each user.

    Args:
        log: Log of the topics.
        bundle: Bundle that streams.
        topics: Names of the topics.
        snapshot: Newest snapshot of the bundle.
        stored: Position up to which the store has the deltas, by partition.
        schemas: Schemas of messages in Avro and Protobuf.
        delete_records: True allows Kafka to delete all events and deltas before the snapshot, of all users. In a topic
            of `owners` it deletes all messages up to the last message of a forgotten user, and so it does with dead
            letters, after it has appended the waiting letters of others again.
        owners: Reads the user of the messages of further topics, by topic. No state depends on these topics.

    Returns:
        The changes. On Kafka only the counts are filled.

    Raises:
        StreamError: The store lags behind the snapshot, or the log can only delete and `delete_records` is False.
        LogError: The log does not answer.
    """
    # Marks of transactions have offsets too, so a store that has everything may be before the snapshot's position.
    for number, end in enumerate(snapshot.deltas):
        if next(iter(log.read(topics.deltas, number, offset_in(stored, number), end)), None) is not None:
            raise StreamError(
                f"the store has the deltas of partition {number} up to {offset_in(stored, number)}, the snapshot up to "
                f"{end}; run `tessera stream --once`"
            )
    covered = {**snapshot.inputs} | {(topics.deltas, number): end for number, end in enumerate(snapshot.deltas)}
    found = planned(
        log,
        topics,
        bundle.dataset.events,
        canonical=bundle.canonical,
        covered=covered,
        schemas=schemas,
        owners=owners,
    )
    if isinstance(log, LocalLog):
        log.rewrite(found.messages)
    else:
        if not delete_records:
            raise StreamError(
                "Kafka cannot change a message; --delete-records deletes ALL events and deltas before the snapshot, or "
                "give the topics a retention: `tessera topics create --events-days`"
            )
        from streaming.log.kafka import KafkaLog

        assert isinstance(log, KafkaLog)
        before: Positions = {place: at for place, at in covered.items() if place[0] == topics.events}
        # The writer starts at its position, which must stay readable.
        for number, end in enumerate(snapshot.deltas):
            before[topics.deltas, number] = min(offset_in(stored, number), end)
        before |= _ends(found.messages, {*(owners or {}), topics.dead_letters})
        if (last := before.get((topics.dead_letters, 0), 0)) > 0:
            changed = {one.offset: one.value for one in found.messages if one.topic == topics.dead_letters}
            move_waiting(log, topics, last, changed=changed)
        found.messages.clear()
        found.counts = log.delete_records(before)
    removed = dict(found.counts)
    lines = [
        (None, encode_line("rewritten", Forgotten(user.user, user.salt, user.at_us), removed=removed))
        for user in found.users
    ]
    if lines and removed:
        log.append(topics.forgotten, lines)
    return found


def _ends(messages: list[Message], topics: Set[str]) -> Positions:
    """Returns the position after the last message of each partition of some topics."""
    found: Positions = {}
    for message in messages:
        if message.topic in topics:
            place = (message.topic, message.partition)
            found[place] = max(found.get(place, 0), message.offset + 1)
    return found
