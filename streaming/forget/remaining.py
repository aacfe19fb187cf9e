"""Lists what the topics of a log still hold of forgotten users, and until when."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from features.value.forgotten import ForgottenUsers
from features.wire.schemas import Schemas
from models.bundle.bundle import Bundle
from streaming.forget.request import ForgottenFeed
from streaming.forget.rewrite import Owner, planned
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics

_REWRITE = "tessera topics rewrite"
# Age at which Kafka closes a segment by default, milliseconds: a message stays as long as its segment.
_SEGMENT_MS = 7 * 86_400_000


@dataclass(frozen=True)
class Remaining:
    """Place that still holds ids of forgotten users.

    Attributes:
        kind: `topic`, `snapshot`, `bundle`, `backfill` or `ledger`.
        name: Name of the topic, or path.
        count: Number of messages of a topic, and of ids elsewhere. 0 for a place that cannot be read.
        until: Date or step that removes the ids.
    """

    kind: str
    name: str
    count: int
    until: str


def remaining_messages(
    log: EventLog, bundle: Bundle, topics: Topics, *, owners: Mapping[str, Owner], schemas: Schemas | None = None
) -> tuple[ForgottenUsers, list[Remaining]]:
    """Returns the forgotten users, and the topics that hold messages with their ids.

    Args:
        log: Log of the topics.
        bundle: Bundle that streams.
        topics: Names of the topics.
        owners: Reads the user of the messages of further topics, by topic.
        schemas: Schemas of messages in Avro and Protobuf.

    Raises:
        LogError: The log does not answer.
    """
    ends = {(topic, part): end for topic in (topics.events, topics.deltas) for part, end in _ends(log, topic)}
    found = planned(
        log, topics, bundle.dataset.events, canonical=bundle.canonical, covered=ends, owners=owners, schemas=schemas
    )
    newest: dict[str, int] = {}
    for message in found.messages:
        newest[message.topic] = max(message.timestamp_ms, newest.get(message.topic, 0))
    deletable = {topics.events, topics.deltas, topics.dead_letters, *owners}
    listed = [
        Remaining("topic", topic, found.counts[topic], _until(log, topic, at, deletable=topic in deletable))
        for topic, at in newest.items()
    ]
    return ForgottenFeed(log, topics).read_on(), listed


def _ends(log: EventLog, topic: str) -> list[tuple[int, int]]:
    return list(log.end_offsets(topic).items())


def _until(log: EventLog, topic: str, newest_ms: int, *, deletable: bool) -> str:
    """Returns the date or the step that removes messages of a topic, the newest of which has a time."""
    if isinstance(log, LocalLog):
        return _REWRITE
    from streaming.log.kafka import KafkaLog

    assert isinstance(log, KafkaLog)
    settings = log.settings(topic)
    kept_ms, segment_ms = int(settings.get("retention.ms", -1)), int(settings.get("segment.ms", _SEGMENT_MS))
    if kept_ms < 0:
        first = f"{_REWRITE} --delete-records, or " if deletable else ""
        return f"{first}a retention of the topic: retention.ms is -1, which keeps the messages forever"
    last = datetime.fromtimestamp((newest_ms + kept_ms + segment_ms) / 1_000, UTC)
    return f"{last:%Y-%m-%d} at the latest, by the topic's retention"
