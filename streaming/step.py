"""The online step: turns a micro-batch of messages into deltas and a list of rejected messages.

A step does one pass: decode the messages, look up each event with the history before the event, take one gradient step
of the table, read back the touched rows. The network is frozen. Offline training and serving use the same lookups.

Guarantees:

- The outcome depends on the state and the set of messages alone, and not on the order in which partitions were polled.
  Batch boundaries do change the outcome.
- A message either changes the state or is named in `bad`.
- If a step raises, its state is invalid. The caller must go back to the state before the step.

Order in a batch: items, then tombstones of users, then events, each by (partition, offset).
"""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.errors import EventError, LogError
from features.hashing import fingerprint
from features.history import EventColumns, History, Jagged, reach_of
from features.shown.consumed import ConsumedItems
from features.value.forgotten import Forgotten
from features.wire.arrow import DecodedBatch
from features.wire.decoder import Decoded, Decoder, event_decoder, is_registered, item_decoder
from features.wire.schemas import Schemas
from models.bundle import delta, record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.delta import SNAPSHOT_SEQ, Delta, Record
from models.encoder.meaning.neighbours import LABELLED, coded_labels
from models.ranker.frozen import gradient_of
from models.ranker.loading import task_labels
from models.ranker.network import Ranker
from models.table.batch import Assembler, Batch, Entities, Examples
from streaming.aggregate_updates import AggregateUpdates
from streaming.forget.message import decode_tombstone, may_forget
from streaming.forget.removal import Removals
from streaming.fresh_events import LATENESS_S, FreshEvents
from streaming.inbox import Inbox, in_order
from streaming.item_updates import ItemUpdates
from streaming.log.protocol import BLANK, Message
from streaming.log.topics import Topics
from streaming.ranks.peers import together
from streaming.ranks.pins import sources_of
from streaming.ranks.seat import Seat
from streaming.ranks.table import RangedTable, Shares
from streaming.step_result import POISON, Address, Rejected, StepResult, address

# Number of table rows that can be marked and searched in the time in which one row of a batch is sorted.
_SORT_COST = 256


class Step:
    """The state of the stream and the function that advances it.

    Args:
        bundle: Bundle whose table, entities and histories are the first state.
        topics: Names of the topics of items and events.
        lateness_s: Largest age of an event before the newest event of its partition, in seconds of event time. Event
            ids are remembered for the same time.
        learning_rate: Learning rate of the table. Default: the bundle's.
        limit_bytes: Size in bytes of the largest delta that the log accepts.
        trained_until: Event time in microseconds up to which the bundle was trained. If an event is not newer and was
            not appended after this time, it was in the bundle's files. Such an event is skipped like a repeat.
        schemas: Schemas of messages in Avro and Protobuf.
        seat: Share of this process in a stream of several partitions. Default: one partition and one process.
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
        schemas: Schemas | None = None,
        seat: Seat = Seat(),  # noqa: B008 - frozen
    ) -> None:
        self.bundle = bundle
        self.seq = SNAPSHOT_SEQ
        self.seat = seat
        deal = seat.deal
        self.ranker = (
            bundle.ranker(learning_rate=learning_rate)
            if deal.partitions == 1
            else Ranker(RangedTable(bundle, deal, seat.peers, learning_rate=learning_rate), bundle.network())
        )
        self._gradient = gradient_of(self.ranker.network)
        self.rows = deal.own_rows(bundle.schema.rows)
        self.seqs = np.full(len(self.rows), SNAPSHOT_SEQ, dtype=np.int64)
        self.catalogue = Catalogue(bundle)
        lag = bundle.dataset.events.lag
        self.history = History(bundle.schema.history_length, lag=lag)
        self._enter(bundle.history, self.history)
        # All labelled items of a user, by `coded_labels`; without a correction none is kept.
        self.labelled = History(LABELLED, lag=lag) if bundle.correction is not None else None
        if self.labelled is not None:
            self._enter(bundle.labelled, self.labelled)
        self.consumed = self._published_consumed() if bundle.dataset.keeps_consumed else None
        self.published_users, self.published_items = len(self.catalogue.user_numbers), len(self.catalogue.item_ids)
        self._candidates = bundle.items.height
        self._dataset = bundle.dataset
        # Numbers of the users whose history the stream has changed.
        self.visitors: set[int] = set()
        self._topics = topics
        self._limit_bytes = limit_bytes
        # A user's record holds up to `history_length` item ids and must fit into a delta.
        ids = reach_of(bundle.schema.history_length, lag) + (0 if self.labelled is None else LABELLED)
        self._most_id_bytes = delta.record_bytes(limit_bytes) // (ids + 2)
        self._decoders: dict[str, Decoder] = {topics.events: event_decoder(self._dataset.events, schemas)}
        if self._dataset.items is not None:
            self._decoders[topics.items] = item_decoder(self._dataset.items, schemas)
        item_columns = self._decoders[topics.items].columns if topics.items in self._decoders else None
        self.aggregates = AggregateUpdates(bundle, self.catalogue, limit_bytes=delta.record_bytes(limit_bytes))
        self.items = ItemUpdates(bundle, self.catalogue, item_columns, self.aggregates.past.add)
        self.removals = Removals()
        self.fresh = FreshEvents(
            self._dataset.events,
            self._decoders[topics.events].columns,
            topic=topics.events,
            canonical=bundle.canonical,
            lateness_s=lateness_s,
            trained_until=trained_until,
            removals=self.removals,
        )

    def apply(
        self,
        messages: Sequence[Message],
        *,
        train: bool = True,
        poison: AbstractSet[Address] = frozenset(),
        admitted: NDArray[np.uint64] | None = None,
    ) -> StepResult:
        """Advances the state by a batch: first its items, then its tombstones, then its events, each in order.

        Args:
            messages: Messages of the topics `items` and `events`, in any order.
            train: False leaves the table unchanged. A restart uses False, because the rows then come from the deltas.
            poison: Addresses of messages to quarantine without processing, since the step fails at them.
            admitted: Keys of the values that the batch admitted, if its deltas name them. Default: the step decides.

        Raises:
            OversizedError: A record that a message caused does not fit into a delta of `limit_bytes`.
        """
        outcome = StepResult()
        if not train:
            self._plan(messages, outcome, train, poison, admitted)
            return outcome
        # A fault in one process must occur in all, before any of them writes.
        peers = self.seat.peers
        shares, records, trailer = together(peers, lambda: self._plan(messages, outcome, train, poison, admitted))
        touched = self._train(shares, outcome)
        self.seqs[touched - self.rows.low] = self.seq
        together(peers, lambda: self._write(outcome, touched, records, trailer))
        return outcome

    def _plan(
        self,
        messages: Sequence[Message],
        outcome: StepResult,
        train: bool,
        poison: AbstractSet[Address],
        admitted: NDArray[np.uint64] | None,
    ) -> tuple[Shares, list[Record], delta.Trailer]:
        """Advances everything but the table.

        Returns:
            The batches to train on, the changed records, and the inputs of the batch.
        """
        unusable = set(poison)
        ordered = in_order(messages, self._topics)
        inbox = {self._topics.items: Inbox(), self._topics.events: Inbox(by_column=True)}
        tombstones: list[tuple[Message, Forgotten]] = []
        for part, rows in self._rows_at_once(ordered, poison):
            if rows:
                inbox[part[0].topic].extend(part, rows)
                continue
            for message in part:
                try:
                    if (request := self._receive(message, inbox, outcome, unusable, again=not train)) is not None:
                        tombstones.append((message, request))
                except EventError as error:
                    outcome.bad.append(Rejected(message, error.cause, str(error)))
        self.seq += 1
        records = self.items.apply(inbox[self._topics.items], outcome)
        forgotten, outcome.removed = self.removals.apply(
            tombstones,
            self.seq,
            catalogue=self.catalogue,
            histories=[one for one in (self.history, self.labelled) if one is not None],
            forget_aggregates=self.aggregates.forget,
            consumed=self.consumed,
        )
        self.visitors -= self.removals.dead
        records += forgotten
        shares, changes = self._events(inbox[self._topics.events], outcome, train, admitted)
        trailer = delta.Trailer(
            times_ms=[message.timestamp_ms for message in ordered], sources=sources_of(ordered), poison=sorted(unusable)
        )
        return shares, [*records, *changes], trailer

    def _rows_at_once(
        self, ordered: Sequence[Message], poison: AbstractSet[Address]
    ) -> Iterator[tuple[Sequence[Message], Sequence[tuple[Any, ...]]]]:
        """Cuts a batch into runs of messages with their decoded rows, and runs that `_receive` must read one by one.

        Yields:
            Messages of one topic and their rows; or messages and no rows.
        """
        for topic, group in groupby(ordered, key=attrgetter("topic")):
            messages = list(group)
            decoder = self._decoders.get(topic)
            if decoder is None:
                yield messages, ()
                continue
            values = [message.value for message in messages]
            rows = decoder.rows(values, most_bytes=self._most_id_bytes)
            odd = {place for place, row in enumerate(rows) if row is None} if None in rows else set()
            if topic == self._topics.events and may_forget(b"".join(values)):
                odd |= {place for place, value in enumerate(values) if may_forget(value)}
            if poison:
                odd |= {place for place, message in enumerate(messages) if address(message) in poison}
            start = 0
            for place in sorted(odd):
                if start < place:
                    yield messages[start:place], rows[start:place]  # type: ignore[misc]
                yield messages[place : place + 1], ()
                start = place + 1
            if start < len(messages):
                yield messages[start:], rows[start:]  # type: ignore[misc]

    def _receive(
        self, message: Message, inbox: dict[str, Inbox], outcome: StepResult, unusable: set[Address], *, again: bool
    ) -> Forgotten | None:
        """Adds a message to its topic's inbox. Returns the request if the message is a tombstone.

        Raises:
            EventError: The message is rejected.
        """
        if address(message) in unusable:
            raise EventError("the step failed at this message; its changes were undone", cause=POISON)
        if message.topic == self._topics.events:
            request = decode_tombstone(message.value)
            if request is not None or message.value == BLANK:
                outcome.forgotten += 1
                return request
        decoded = self._decode(message, unusable, again=again)
        if self._oversized(message, decoded):
            # The delta names the message like poison, since a repeat of the batch may have another limit.
            unusable.add(address(message))
            raise EventError(f"an id has more than {self._most_id_bytes} bytes", cause="oversized")
        outcome.bad += inbox[message.topic].add(message, decoded)
        return None

    def _write(
        self, outcome: StepResult, touched: NDArray[np.int64], records: Sequence[Record], trailer: delta.Trailer
    ) -> None:
        """Encodes the deltas of this process's row ranges. The first range has the records.

        Encodes before the commit, so that a value that no delta can hold counts as a fault of its message.
        """
        ranges = self.seat.deal.ranges(self.bundle.schema.rows)
        for number in self.seat.deal.own:
            low, high = np.searchsorted(touched, (ranges[number].low, ranges[number].high))
            deltas = self._deltas(touched[low:high], records if number == 0 else (), trailer)
            outcome.deltas += deltas
            outcome.ranges += [number] * len(deltas)
        outcome.payloads = [delta.encode(change) for change in outcome.deltas]

    def _deltas(self, touched: NDArray[np.int64], records: Sequence[Record], trailer: delta.Trailer) -> list[Delta]:
        table, low = self.ranker.table, self.rows.low
        changes = delta.changed_rows(
            self.bundle.id,
            self.seq,
            touched - low,
            table.weight,
            table.accumulator,
            records=records,
            trailer=trailer,
            limit=self._limit_bytes,
        )
        return [delta.shifted(change, low) for change in changes]

    def _oversized(self, message: Message, decoded: Decoded | DecodedBatch) -> bool:
        """Returns whether a message carries an id that is too long for the records of a delta."""
        if message.topic != self._topics.events or len(message.value) <= self._most_id_bytes:
            return False
        if isinstance(decoded, DecodedBatch):
            names = [name for name in (self._dataset.events.user, self._dataset.events.item) if name]
            longest = [decoded.frame[name].cast(pl.String).str.len_bytes().max() for name in names]
            return any(isinstance(size, int) and size > self._most_id_bytes for size in longest)
        row = dict(zip(self._decoders[message.topic].columns, decoded.row, strict=True))
        ids = (row.get(name) for name in (self._dataset.events.user, self._dataset.events.item) if name)
        return any(len(str(value).encode(errors="replace")) > self._most_id_bytes for value in ids)

    def _decode(self, message: Message, unusable: set[Address], *, again: bool) -> Decoded | DecodedBatch:
        """Decodes a message.

        Args:
            message: The message.
            unusable: Receives the address of a message that the registry's schemas do not read. The delta names it, so
                that it stays rejected after a restart, when the registry may have other schemas.
            again: True if the message was decoded before, by an earlier step on the same log.
        """
        if message.topic not in self._decoders:
            raise EventError(
                f"{message.topic} message: the dataset {self._dataset.name} has no [{message.topic}] table, "
                "so it accepts no such messages"
            )
        decoder = self._decoders[message.topic]
        if message.topic == self._topics.items and not message.value and message.key:
            # A compacted topic keeps an empty message for a deleted key.
            return Decoded(
                (message.key.decode(errors="replace"), *[None] * (len(decoder.columns) - 1)), None, None, True
            )
        try:
            return decoder.read(message.value)
        except EventError as error:
            if is_registered(message.value):
                if again:
                    raise LogError(
                        f"{message.topic} partition {message.partition} offset {message.offset} was applied before and "
                        f"cannot be read now: {error}; give the registry its schemas back"
                    ) from error
                unusable.add(address(message))
            raise

    def _events(
        self, inbox: Inbox, outcome: StepResult, train: bool, admitted: NDArray[np.uint64] | None
    ) -> tuple[Shares, list[Record]]:
        frame = self.fresh.select(inbox, outcome)
        if not frame.height:
            return [], []
        outcome.events += frame.height
        known_items = len(self.catalogue.item_ids)
        examples, changed = self._examples(frame, outcome)
        catalogue = self.catalogue
        assembler = self._assembler(frame, examples)
        admitted = catalogue.admission.sight(*assembler.waiting(examples), admitted=admitted)
        enters = np.ones(len(examples), dtype=np.bool_)
        if train:
            examples, enters = self._with_negatives(examples)
        consumed = self._consume(frame, examples, enters)
        columns, aggregates = self.aggregates.apply(frame, examples, enters)
        examples = replace(examples, aggregates=columns)
        partitions = self._partitions(frame, inbox)[examples.context]
        if self._dataset.events.crossed and len(examples) > frame.height:
            # A drawn negative has features of its own with its item.
            assembler = self._assembler(frame[examples.context], examples)
            examples = replace(examples, context=np.arange(len(examples), dtype=np.int64))
        shares = self._shares(assembler, examples, partitions) if train else []
        records = self._history_records(changed) + consumed + aggregates
        records += self.items.add_bare(catalogue.item_ids[known_items:])
        return shares, records + self._admission_records(admitted)

    def _partitions(self, frame: pl.DataFrame, inbox: Inbox) -> NDArray[np.int64]:
        """Returns the partition of each event (E,): that of its message, by the deal."""
        if self.seat.deal.partitions == 1:
            return np.zeros(frame.height, dtype=np.int64)
        numbers = [inbox.messages[number].partition for number in frame["event"].to_list()]
        return self.seat.deal.parts_of(np.array(numbers, dtype=np.int64))

    def _shares(self, assembler: Assembler, examples: Examples, partitions: NDArray[np.int64]) -> Shares:
        """Returns the batches of this process's partitions that have examples."""
        deal = self.seat.deal
        if deal.partitions == 1:
            return [(0, assembler.batch(examples))]
        chosen = {part: np.flatnonzero(partitions == part) for part in deal.own}
        return [(part, assembler.batch(examples.take(index))) for part, index in chosen.items() if len(index)]

    def _assembler(self, events: pl.DataFrame, examples: Examples) -> Assembler:
        """Returns an assembler of events, one for each example, with their features of several tables."""
        catalogue, schema = self.catalogue, self.bundle.schema
        crossed = catalogue.crossed(events, examples.user, examples.item)
        context = Entities(schema, "event", crossed, catalogue.admission)
        return Assembler(schema, catalogue.users, catalogue.items, context, catalogue.ranker_vectors)

    def _examples(self, frame: pl.DataFrame, outcome: StepResult) -> tuple[Examples, NDArray[np.int64]]:
        """Returns the events with the history before each event, and the users whose history changed.

        Each event then enters the history.
        """
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
            times = frame["time"].to_numpy()
            past, changed = self.history.advance(EventColumns(users, items, times, labels > 0))
            if self.labelled is not None:
                every = np.ones(count, dtype=np.bool_)
                _, changed = self.labelled.advance(EventColumns(users, coded_labels(items, labels), times, every))
        tasks = task_labels(frame)
        return Examples(users, items, past, labels, np.arange(count, dtype=np.int64), tasks=tasks), changed

    def _with_negatives(self, examples: Examples) -> tuple[Examples, NDArray[np.bool_]]:
        """Adds negatives behind each event if every event is a positive. The batch's number seeds the draw.

        Returns:
            The examples, and whether each is an event.
        """
        label = self._dataset.events.label
        if not label.implicit or self._candidates < 2:
            return examples, np.ones(len(examples), dtype=np.bool_)
        each = label.negatives
        index = np.repeat(np.arange(len(examples)), each + 1)
        repeated = examples.take(index)
        # Draws from the published items alone, since their numbers are the same after a restart.
        drawn = np.random.default_rng(self.seq).integers(0, self._candidates, len(index))
        drawn = np.where(drawn == repeated.item, (drawn + 1) % self._candidates, drawn)
        negative = np.arange(len(index)) % (each + 1) > 0
        drawn_examples = Examples(
            repeated.user,
            np.where(negative, drawn, repeated.item),
            repeated.history,
            np.where(negative, np.float32(0), repeated.labels).astype(np.float32),
            repeated.context,
        )
        return drawn_examples, ~negative

    def _train(self, shares: Shares, outcome: StepResult) -> NDArray[np.int64]:
        """Does one step of the table. Returns the changed rows of this process, ascending."""
        if isinstance(self.ranker.table, RangedTable):
            done = self.ranker.table.learn(self.ranker.network, shares)
            outcome.labels, outcome.logits = done.labels, done.logits
            return done.rows
        touched = np.zeros(0, dtype=np.int64)
        for _, batch in shares:
            touched = self._train_whole(batch, outcome)
        return touched

    def _train_whole(self, batch: Batch, outcome: StepResult) -> NDArray[np.int64]:
        pooled, mean_of = self.ranker.table(batch), self.bundle.manifest.training.batch
        logits, gradient = self._gradient(pooled.detach(), batch, mean_of)
        pooled.backward(gradient)
        self.ranker.table.step()
        judged = self.ranker.network.judged
        outcome.labels, outcome.logits = judged(batch.labels.numpy()), judged(logits.numpy())
        return _distinct(batch.values.numpy(), len(self.seqs))

    def _admission_records(self, keys: NDArray[np.uint64]) -> list[Record]:
        """Returns records of admitted keys under the batch's number. A very large batch has several records."""
        most = delta.record_bytes(self._limit_bytes) // 16
        parts = [keys[start : start + most] for start in range(0, len(keys), most)]
        return [
            Record(record.ADMITTED, f"{self.seq}.{number}" if number else str(self.seq), record.encode_admitted(part))
            for number, part in enumerate(parts)
        ]

    def _published_consumed(self) -> ConsumedItems:
        """Returns the consumed items of the bundle, by the catalogue's numbers of the users."""
        published, state = self.bundle.consumed, ConsumedItems()
        state.advance(self.catalogue.number_users(published["user_id"].to_list()), published["key"].to_numpy())
        return state

    def _consume(self, frame: pl.DataFrame, examples: Examples, events: NDArray[np.bool_]) -> list[Record]:
        """Adds the items of positive events to what their users have consumed. Returns the changed records."""
        if self.consumed is None:
            return []
        own = np.flatnonzero(events)
        positive = examples.labels[own] > 0
        items = frame["item_id"].filter(pl.Series(positive)).to_list()
        users, filled = self.consumed.advance(examples.user[own][positive], fingerprint(items))
        return [Record(*one) for one in self.consumed.records(users, filled, self.catalogue.user_ids)]

    def _history_records(self, users: NDArray[np.int64]) -> list[Record]:
        ids, items = self.catalogue.user_ids, self.catalogue.item_ids.__getitem__
        numbers = users.tolist()
        self.visitors.update(numbers)
        if self.labelled is not None:
            return [Record(record.HISTORY, ids[user], record.encode(self.history_record(user))) for user in numbers]
        found = zip(numbers, self.history.visits_of(users), strict=True)
        return [
            Record(record.HISTORY, ids[user], record.encode(record.HistoryRecord(list(map(items, seen)), times)))
            for user, (seen, times) in found
        ]

    def history_record(self, user: int) -> record.HistoryRecord:
        """Returns the store's record of a user's history.

        Args:
            user: Number of the user in the catalogue.
        """
        visits = self.history.visits(user)
        ids = self.catalogue.item_ids
        coded = [] if self.labelled is None else self.labelled.latest(user)
        return record.HistoryRecord(
            items=[ids[item] for item, _ in visits],
            times=[time for _, time in visits],
            labelled=[ids[value // 2] for value in coded],
            labels=bytes(value % 2 for value in coded),
        )

    def _enter(self, events: pl.DataFrame, history: History) -> None:
        """Enters a bundle's published visits, or its labelled items, into a history."""
        items = self.catalogue.number_items(events["item_id"].to_list())
        if "label" in events.columns:
            items = coded_labels(items, events["label"].to_numpy())
        users = self.catalogue.number_users(events["user_id"].to_list())
        times = events["time"].to_numpy().astype(np.int64)
        history.advance(EventColumns(users, items, times, np.ones(events.height, dtype=np.bool_)))


def _distinct(rows: NDArray[np.int64], table_rows: int) -> NDArray[np.int64]:
    """Returns the distinct rows of a batch, ascending."""
    if _SORT_COST * len(rows) < table_rows:
        return np.unique(rows)
    # Marking every row of the table costs less here than sorting the rows of the batch.
    touched = np.zeros(table_rows, dtype=np.bool_)
    touched[rows] = True
    return np.flatnonzero(touched)
