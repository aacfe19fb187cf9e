"""The online step: a micro-batch of messages in, the deltas it caused and the messages that could not be used out.

One step is one pass: decode and shape → look up with the history before each event → one gradient step of the table
(the network is frozen) → read back the rows it touched. The same lookups as offline and in serving, by the same code.

Guarantees: the outcome depends on the state and the set of messages alone, not on the order in which partitions were
polled; batch boundaries do matter. A message either changes the state or is named in `bad`. Should a step raise, the
state is spoilt: go back to the one before it.

Order in a batch: items, then events, each by (partition, offset).
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import polars as pl
from numpy.typing import NDArray
from torch.nn import functional

from features.errors import EventError
from features.history import EventColumns, History, Jagged
from features.message import Decoded, Decoder, Rows, event_decoder, item_decoder, item_rows
from models.bundle import delta, record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.delta import SNAPSHOT_SEQ, Record, Source
from models.table.batch import Assembler, Batch, Entities, Examples
from streaming.fresh_events import LATENESS_S, FreshEvents, Inbox
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step_result import POISON, Address, Rejected, StepResult, address

# Rows of the table that can be marked and searched while one row of a batch is sorted.
_SORT_COST = 256


class Step:
    """The state of the stream and the function that advances it.

    Args:
        bundle: where the state starts: its table, entities and histories.
        topics: tell items from events.
        lateness_s: how much older than the newest event of its partition an event may be, in event time; also how
            long event ids are remembered.
        learning_rate: of the table; the bundle's own by default.
        limit_bytes: size of a delta that the log takes.
        trained_until: event time in microseconds up to which the bundle was trained. An event that was appended before
            that time, and is no newer, was in the bundle's files: it is skipped like a repeat.
    """

    def __init__(
        self,
        bundle: Bundle,
        topics: Topics,
        *,
        lateness_s: float = LATENESS_S,
        learning_rate: float | None = None,
        limit_bytes: int = delta.DELTA_BYTES,
        trained_until: int | None = None,
    ) -> None:
        self.bundle = bundle
        self.seq = SNAPSHOT_SEQ
        self.ranker = bundle.ranker(learning_rate=learning_rate)
        self.seqs = np.full(bundle.schema.rows, SNAPSHOT_SEQ, dtype=np.int64)
        self.catalogue = Catalogue(bundle)
        self.history = History(bundle.schema.history_length)
        visits = bundle.history
        self.history.advance(
            EventColumns(
                self.catalogue.number_users(visits["user_id"].to_list()),
                self.catalogue.number_items(visits["item_id"].to_list()),
                visits["time"].to_numpy().astype(np.int64),
                np.ones(visits.height, dtype=np.bool_),
            )
        )
        self.published_users, self.published_items = len(self.catalogue.user_numbers), len(self.catalogue.item_ids)
        self._candidates = bundle.items.height
        self._dataset = bundle.dataset
        # Users whose history the stream has changed.
        self.visitors: set[int] = set()
        # What the stream last wrote of each item, and the version it had.
        self.item_records: dict[str, bytes] = {}
        self.item_versions: dict[str, int] = {}
        self._topics = topics
        self._limit_bytes = limit_bytes
        # A user's record holds so many item ids, and must fit into a delta.
        self._most_id_bytes = delta.record_bytes(limit_bytes) // (bundle.schema.history_length + 2)
        self._decoders: dict[str, Decoder] = {topics.events: event_decoder(self._dataset.events)}
        if self._dataset.items is not None:
            self._decoders[topics.items] = item_decoder(self._dataset.items)
        self.fresh = FreshEvents(
            self._dataset.events,
            self._decoders[topics.events].columns,
            topic=topics.events,
            canonical=bundle.canonical,
            lateness_s=lateness_s,
            trained_until=trained_until,
        )

    def apply(
        self,
        messages: Sequence[Message],
        *,
        train: bool = True,
        poison: AbstractSet[Address] = frozenset(),
        admitted: NDArray[np.uint64] | None = None,
    ) -> StepResult:
        """Advances the state by a batch: first its items, then its events, each in order.

        Args:
            messages: of the topics `items` and `events`.
            train: False leaves the table as it is: how the rest comes back after a restart, when the rows come from
                the deltas.
            poison: Messages to quarantine without processing, since the step fails at them.
            admitted: keys of the values that the batch admitted, where the deltas say so.

        Raises:
            OversizedError: a record that a message caused does not fit into a delta of `limit_bytes`.
        """
        outcome = StepResult()
        unusable = set(poison)
        ordered = sorted(messages, key=lambda message: (message.topic != self._topics.items, *address(message)))
        inbox = {self._topics.items: Inbox(), self._topics.events: Inbox()}
        for message in ordered:
            try:
                if address(message) in poison:
                    raise EventError("the step failed at this message; its changes were undone", cause=POISON)
                decoded = self._decode(message)
                if self._oversized(message, decoded):
                    # Named in the delta like poison: the limit may be another one when the batch is done again.
                    unusable.add(address(message))
                    raise EventError(f"an id of more than {self._most_id_bytes} bytes", cause="oversized")
                inbox[message.topic].messages.append(message)
                inbox[message.topic].decoded.append(decoded)
            except EventError as error:
                outcome.bad.append(Rejected(message, error.cause, str(error)))
        self.seq += 1
        records = self._items(inbox[self._topics.items], outcome)
        touched, changes = self._events(inbox[self._topics.events], outcome, train, admitted)
        self.seqs[touched] = self.seq
        if train:
            table = self.ranker.table
            outcome.deltas = list(
                delta.changed_rows(
                    self.bundle.id,
                    self.seq,
                    touched,
                    table.weight,
                    table.accumulator,
                    records=[*records, *changes],
                    trailer=delta.Trailer(
                        times_ms=[message.timestamp_ms for message in ordered],
                        sources=_sources(ordered),
                        poison=sorted(unusable),
                    ),
                    limit=self._limit_bytes,
                )
            )
            # Before anything is committed, so that a value that no delta can hold is its message's fault.
            outcome.payloads = [delta.encode(change) for change in outcome.deltas]
        return outcome

    def _oversized(self, message: Message, decoded: Decoded) -> bool:
        """Returns whether a message carries an id too long for the records that it would enter."""
        if message.topic != self._topics.events or len(message.value) <= self._most_id_bytes:
            return False
        row = dict(zip(self._decoders[message.topic].columns, decoded.row, strict=True))
        ids = (row.get(name) for name in (self._dataset.events.user, self._dataset.events.item) if name)
        return any(len(str(value).encode(errors="replace")) > self._most_id_bytes for value in ids)

    def _decode(self, message: Message) -> Decoded:
        if message.topic not in self._decoders:
            raise EventError(
                f"{message.topic} message: the dataset {self._dataset.name} has no [{message.topic}], so it takes none"
            )
        decoder = self._decoders[message.topic]
        if message.topic == self._topics.items and not message.value and message.key:
            # What a compacted topic holds for a key that is gone.
            return Decoded(
                (message.key.decode(errors="replace"), *[None] * (len(decoder.columns) - 1)), None, None, True
            )
        return decoder(message.value)

    # Items.

    def _items(self, inbox: Inbox, outcome: StepResult) -> list[Record]:
        if not inbox.messages or self._dataset.items is None:
            return []
        rows = Rows(self._decoders[self._topics.items].columns, [found.row for found in inbox.decoded])
        frame, bad = item_rows(rows, self._dataset.items, self.catalogue.item_types, version=self.bundle.canonical)
        outcome.bad += [Rejected(inbox.messages[place], "invalid", reason) for place, reason in bad.items()]
        if not frame.height:
            return []
        newest: dict[str, int | None] = {}
        for place, (position, name) in enumerate(zip(frame["message_row"], frame["item_id"], strict=True)):
            if not self._is_newest(name, inbox.decoded[position].version, inbox.messages[position].timestamp_ms):
                outcome.stale += 1
            elif inbox.decoded[position].deleted:
                outcome.deleted += 1
                newest[name] = None
            else:
                outcome.items += 1
                newest[name] = place
        gone = [name for name, place in newest.items() if place is None]
        kept = [place for place in newest.values() if place is not None]
        made = self._item_records(frame[kept]) if kept else {}
        self.catalogue.put_items(made)
        self.catalogue.remove_items(gone)
        written = {name: record.encode(item) for name, item in made.items()} | dict.fromkeys(gone, record.TOMBSTONE)
        return self._written(written)

    def _is_newest(self, name: str, version: int | None, timestamp_ms: int) -> bool:
        """Returns whether a message about an item counts; without a version of its own the log's order decides."""
        known = self.item_versions.get(name)
        if version is not None and known is not None and version <= known:
            return False
        self.item_versions[name] = version if version is not None else max(timestamp_ms, known or timestamp_ms)
        return True

    def _written(self, payloads: dict[str, bytes]) -> list[Record]:
        self.item_records |= payloads
        return [Record(record.ITEM, name, payload) for name, payload in payloads.items()]

    def _numbered(self, kind: str, payloads: Sequence[bytes]) -> list[Record]:
        """Records under the batch's number, of which a very large batch has several."""
        return [
            Record(kind, f"{self.seq}.{part}" if part else str(self.seq), payload)
            for part, payload in enumerate(payloads)
        ]

    def _item_records(self, frame: pl.DataFrame) -> dict[str, record.ItemRecord]:
        encoder, codebook = self.bundle.encoder, self.bundle.codebook
        vectors, codes, _ = self.bundle.encode_items(frame["text"].to_list())
        features = frame.drop("message_row", "text", "item_id").to_dicts()
        ids = frame["item_id"].to_list()
        return {
            ids[row]: record.ItemRecord(
                encoder=encoder.id if encoder else "",
                vector=vectors[row].astype("<f4").tobytes(),
                codes=codes[row].tolist(),
                features=features[row],
                codebook=codebook.id if codebook else "",
            )
            for row in range(frame.height)
        }

    # Events.

    def _events(
        self, inbox: Inbox, outcome: StepResult, train: bool, admitted: NDArray[np.uint64] | None
    ) -> tuple[NDArray[np.int64], list[Record]]:
        nothing = np.zeros(0, dtype=np.int64)
        frame = self.fresh.select(inbox, outcome)
        if not frame.height:
            return nothing, []
        outcome.events += frame.height
        known_items = len(self.catalogue.item_ids)
        examples, changed = self._examples(frame, outcome)
        catalogue, schema = self.catalogue, self.bundle.schema
        context = Entities(schema, "event", frame, catalogue.admission)
        assembler = Assembler(schema, catalogue.users, catalogue.items, context, catalogue.vectors)
        admitted = catalogue.admission.sight(*assembler.sightings(examples), admitted=admitted)
        touched = self._train(assembler.batch(self._with_negatives(examples)), outcome) if train else nothing
        records = self._history_records(changed)
        # An item that only events name is rankable too, by its id alone.
        records += self._written({name: self._bare_item() for name in catalogue.item_ids[known_items:]})
        if len(admitted):
            most = delta.record_bytes(self._limit_bytes) // 16
            parts = [admitted[start : start + most] for start in range(0, len(admitted), most)]
            records += self._numbered(record.ADMITTED, [record.encode_admitted(part) for part in parts])
        return touched, records

    def _examples(self, frame: pl.DataFrame, outcome: StepResult) -> tuple[Examples, NDArray[np.int64]]:
        """Events with the history before each one, which then enters it; and the users whose history changed."""
        count = frame.height
        has_user, has_item = "user_id" in frame.columns, "item_id" in frame.columns
        users = self.catalogue.number_users(frame["user_id"].to_list()) if has_user else np.zeros(count, dtype=np.int64)
        known = len(self.catalogue.item_ids)
        items = self.catalogue.number_items(frame["item_id"].to_list()) if has_item else np.zeros(count, dtype=np.int64)
        outcome.unknown_items += int((items >= known).sum())
        labels = frame["label"].to_numpy().astype(np.float32)
        changed = np.zeros(0, dtype=np.int64)
        past = Jagged(changed, np.zeros(count + 1, dtype=np.int64))
        if has_user and has_item:
            past, changed = self.history.advance(EventColumns(users, items, frame["time"].to_numpy(), labels > 0))
        return Examples(users, items, past, labels, np.arange(count, dtype=np.int64)), changed

    def _with_negatives(self, examples: Examples) -> Examples:
        """Adds drawn negatives behind each event if every event is a positive, seeded by the batch's number."""
        label = self._dataset.events.label
        if not label.implicit or self._candidates < 2:
            return examples
        each = label.negatives
        index = np.repeat(np.arange(len(examples)), each + 1)
        repeated = examples.take(index)
        # From the published items alone: their numbers are the same after a restart, whatever came in between.
        drawn = np.random.default_rng(self.seq).integers(0, self._candidates, len(index))
        drawn = np.where(drawn == repeated.item, (drawn + 1) % self._candidates, drawn)
        negative = np.arange(len(index)) % (each + 1) > 0
        return Examples(
            repeated.user,
            np.where(negative, drawn, repeated.item),
            repeated.history,
            np.where(negative, np.float32(0), repeated.labels).astype(np.float32),
            repeated.context,
        )

    def _train(self, batch: Batch, outcome: StepResult) -> NDArray[np.int64]:
        logits = self.ranker(batch)
        loss = functional.binary_cross_entropy_with_logits(logits, batch.labels, reduction="sum")
        (loss / self.bundle.manifest.training.batch).backward()
        self.ranker.table.step()
        outcome.labels, outcome.logits = batch.labels.numpy(), logits.detach().numpy()
        return _distinct(batch.values.numpy(), len(self.seqs))

    def _bare_item(self) -> bytes:
        zero = np.zeros(self.catalogue.vectors.shape[1], dtype="<f4").tobytes()
        bare = record.ItemRecord(encoder=self.bundle.manifest.encoder or "", vector=zero, codes=[], features={})
        return record.encode(bare)

    def _history_records(self, users: NDArray[np.int64]) -> list[Record]:
        names = self.catalogue.user_ids
        self.visitors.update(users.tolist())
        return [
            Record(record.HISTORY, names[user], record.encode(self.history_record(user))) for user in users.tolist()
        ]

    def history_record(self, user: int) -> record.HistoryRecord:
        """Returns the store's record of a user's history."""
        visits = self.history.visits(user)
        ids = self.catalogue.item_ids
        return record.HistoryRecord(items=[ids[item] for item, _ in visits], times=[time for _, time in visits])


def _distinct(rows: NDArray[np.int64], table_rows: int) -> NDArray[np.int64]:
    """The distinct rows of a batch, ascending."""
    if _SORT_COST * len(rows) < table_rows:
        return np.unique(rows)
    # A mark for every row of the table costs less than sorting the rows of the batch.
    touched = np.zeros(table_rows, dtype=np.bool_)
    touched[rows] = True
    return np.flatnonzero(touched)


def _sources(messages: Sequence[Message]) -> list[Source]:
    """The inputs of a batch whose messages are in order."""
    offsets: dict[tuple[str, int], list[int]] = {}
    for message in messages:
        offsets.setdefault((message.topic, message.partition), []).append(message.offset)
    return [Source(*place, found[0], found[-1]) for place, found in offsets.items()]
