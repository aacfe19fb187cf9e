"""The online step: a micro-batch of messages in, the deltas it caused and the messages that could not be used out.

One step is one pass: shape → look up with the history before each event → one gradient step of the table (the network
is frozen) → read back the rows it touched. The same lookups as offline and in serving, by the same code.

Guarantees: the outcome depends on the state and the batch alone, batch boundaries included. A batch either changes
the state as a whole, or its messages are named in `bad` and change nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch.nn import functional

from features.error import EventError
from features.event import Decoder, event_decoder, event_rows, item_decoder, item_rows
from features.history import History, Jagged
from models import record
from models.bundle import Bundle
from models.catalogue import Catalogue
from models.delta import SNAPSHOT_SEQ, Delta, Record, changed_rows
from models.lookup import Assembler, Batch, Entities, Examples
from streaming.log import Message
from streaming.topic import Topics


@dataclass(frozen=True)
class Bad:
    """A message that cannot be used, and why."""

    message: Message
    reason: str


@dataclass
class Outcome:
    """What one step did.

    Attributes:
        deltas: in order; empty when nothing changed.
        bad: messages for the dead letters.
        events: applied; neutral: valid, but neither positive nor negative by the dataset's rules; items: applied.
        unknown_items: applied events whose item was not in the catalogue.
    """

    deltas: list[Delta] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)
    events: int = 0
    neutral: int = 0
    items: int = 0
    unknown_items: int = 0


class Step:
    """The state of the stream and the function that advances it.

    Args:
        bundle: where the state starts: its table, entities and histories.
        topics: tell items from events.
    """

    def __init__(self, bundle: Bundle, topics: Topics) -> None:
        self.bundle = bundle
        self.seq = SNAPSHOT_SEQ
        self.ranker = bundle.ranker()
        self.catalogue = Catalogue(bundle)
        self.history = History(bundle.schema.history_length)
        visits = bundle.history
        columns = (
            self.catalogue.number_users(visits["user_id"].to_list()),
            self.catalogue.number_items(visits["item_id"].to_list()),
        )
        for user, item, time in zip(*columns, visits["time"].to_list(), strict=True):
            self.history.append(int(user), int(item), time)
        self._published = bundle.items.height
        self._dataset = bundle.dataset
        self._arrivals = 0
        self._topics = topics
        self._decoders: dict[str, Decoder] = {topics.events: event_decoder(self._dataset.events)}
        if self._dataset.items is not None:
            self._decoders[topics.items] = item_decoder(self._dataset.items)

    def apply(self, messages: Sequence[Message], *, train: bool = True) -> Outcome:
        """Advances the state by a batch: first its items, then its events, each in order.

        Args:
            messages: of the topics `items` and `events`.
            train: False only remembers histories and items: how they come back after a restart, when the rows
                come from the deltas.
        """
        outcome = Outcome()
        items, events = self._topics.items, self._topics.events
        rows: dict[str, list[dict[str, object]]] = {items: [], events: []}
        sources: dict[str, list[Message]] = {items: [], events: []}
        for message in messages:
            try:
                rows[message.topic].append(self._decoder(message.topic)(message.value))
                sources[message.topic].append(message)
            except EventError as error:
                outcome.bad.append(Bad(message, str(error)))
        records = self._items(rows[items], sources[items], outcome)
        touched, changes = self._events(rows[events], sources[events], outcome, train=train)
        if train and (len(touched) or records or changes):
            table = self.ranker.table
            # Only a batch that changed something has a number, so that the deltas alone tell where to go on.
            self.seq += 1
            outcome.deltas = list(
                changed_rows(
                    self.bundle.id,
                    self.seq,
                    touched,
                    table.weight,
                    table.accumulator,
                    records=[*records, *changes],
                    times_ms=[message.timestamp_ms for message in messages],
                )
            )
        return outcome

    def _decoder(self, topic: str) -> Decoder:
        if topic not in self._decoders:
            raise EventError(f"{topic} message: the dataset {self._dataset.name} has no [{topic}], so it takes none")
        return self._decoders[topic]

    def _items(self, rows: list[dict[str, object]], sources: list[Message], outcome: Outcome) -> list[Record]:
        if not rows or self._dataset.items is None:
            return []
        frame, bad = item_rows(rows, self._dataset.items, self.catalogue.item_types)
        outcome.bad += [Bad(sources[position], reason) for position, reason in bad.items()]
        if not frame.height:
            return []
        made = self._item_records(frame)
        self.catalogue.put_items(made)
        outcome.items += frame.height
        return [Record(record.ITEM, name, record.encode(item)) for name, item in made.items()]

    def _item_records(self, frame: pl.DataFrame) -> dict[str, record.ItemRecord]:
        encoder, codebook = self.bundle.encoder, self.bundle.codebook
        count = frame.height
        vectors, codes = np.zeros((count, 0), dtype=np.float32), np.zeros((count, 0), dtype=np.uint16)
        if encoder is not None and codebook is not None:
            vectors = encoder.encode(frame["text"].to_list())
            codes = codebook.encode(vectors)
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
            for row in range(count)
        }

    def _events(
        self, rows: list[dict[str, object]], sources: list[Message], outcome: Outcome, *, train: bool
    ) -> tuple[NDArray[np.int64], list[Record]]:
        nothing = np.zeros(0, dtype=np.int64)
        if not rows:
            return nothing, []
        frame, bad = event_rows(rows, self._dataset.events)
        outcome.bad += [Bad(sources[position], reason) for position, reason in bad.items()]
        outcome.neutral += len(rows) - len(bad) - frame.height
        outcome.events += frame.height
        if not frame.height:
            return nothing, []
        known_items = len(self.catalogue.item_ids)
        examples, changed = self._examples(frame, outcome)
        catalogue, schema = self.catalogue, self.bundle.schema
        context = Entities(schema, "event", frame, catalogue.admission)
        assembler = Assembler(schema, catalogue.users, catalogue.items, context, catalogue.vectors)
        admitted = catalogue.admission.sight(*assembler.sightings(examples))
        touched = self._train(assembler.batch(self._with_negatives(examples))) if train else nothing
        records = [self._history_record(user) for user in changed]
        # An item that only events name is rankable too, by its id alone.
        records += [self._bare_item(name) for name in catalogue.item_ids[known_items:]]
        if len(admitted):
            records.append(Record(record.ADMITTED, str(self.seq + 1), record.encode_admitted(admitted)))
        return touched, records

    def _examples(self, frame: pl.DataFrame, outcome: Outcome) -> tuple[Examples, list[str]]:
        """Events with the history before each one, which then enters it; and the users whose history changed."""
        count = frame.height
        has_user, has_item = "user_id" in frame.columns, "item_id" in frame.columns
        users = self.catalogue.number_users(frame["user_id"].to_list()) if has_user else np.zeros(count, dtype=np.int64)
        known = len(self.catalogue.item_ids)
        items = self.catalogue.number_items(frame["item_id"].to_list()) if has_item else np.zeros(count, dtype=np.int64)
        outcome.unknown_items += int((items >= known).sum())
        labels = frame["label"].to_numpy().astype(np.float32)
        times = self._times(frame)
        lists: list[list[int]] = [[] for _ in range(count)]
        changed: dict[str, None] = {}
        if has_user and has_item:
            names = frame["user_id"].to_list()
            columns = zip(users.tolist(), items.tolist(), times, labels.tolist(), names, strict=True)
            for position, (user, item, time, label, name) in enumerate(columns):
                lists[position] = self.history.read(user, time)
                if label:
                    self.history.append(user, item, time)
                    changed[name] = None
        offsets = np.concatenate([[0], np.cumsum([len(found) for found in lists])]).astype(np.int64)
        flat = np.array([item for found in lists for item in found], dtype=np.int64)
        context = np.arange(count, dtype=np.int64)
        return Examples(users, items, Jagged(flat, offsets), labels, context), list(changed)

    def _times(self, frame: pl.DataFrame) -> list[int]:
        """Event times; without a clock or an order, the number of events that arrived before, in any batch."""
        times: list[int] = frame["time"].to_list()
        if self._dataset.events.time is None and self._dataset.events.order is None:
            # Beyond any position in the files, since the stream comes after them.
            times = [(1 << 40) + self._arrivals + place for place in range(frame.height)]
        self._arrivals += frame.height
        return times

    def _with_negatives(self, examples: Examples) -> Examples:
        """Where every event is a positive: drawn negatives behind each, seeded by the batch's number."""
        label = self._dataset.events.label
        if not label.implicit or self._published < 2:
            return examples
        each = label.negatives
        index = np.repeat(np.arange(len(examples)), each + 1)
        repeated = examples.take(index)
        # From the published items alone: their numbers are the same after a restart, whatever came in between.
        drawn = np.random.default_rng(self.seq + 1).integers(0, self._published, len(index))
        drawn = np.where(drawn == repeated.item, (drawn + 1) % self._published, drawn)
        negative = np.arange(len(index)) % (each + 1) > 0
        return Examples(
            repeated.user,
            np.where(negative, drawn, repeated.item),
            repeated.history,
            np.where(negative, np.float32(0), repeated.labels).astype(np.float32),
            repeated.context,
        )

    def _train(self, batch: Batch) -> NDArray[np.int64]:
        loss = functional.binary_cross_entropy_with_logits(self.ranker(batch), batch.labels, reduction="sum")
        (loss / self.bundle.manifest.training.batch).backward()
        self.ranker.table.step()
        touched: NDArray[np.int64] = torch.unique(batch.values).numpy()
        return touched

    def _bare_item(self, name: str) -> Record:
        zero = np.zeros(self.catalogue.vectors.shape[1], dtype="<f4").tobytes()
        bare = record.ItemRecord(encoder=self.bundle.manifest.encoder or "", vector=zero, codes=[], features={})
        return Record(record.ITEM, name, record.encode(bare))

    def _history_record(self, user: str) -> Record:
        visits = self.history.visits(self.catalogue.user_numbers[user])
        found = record.HistoryRecord(
            items=[self.catalogue.item_ids[item] for item, _ in visits], times=[time for _, time in visits]
        )
        return Record(record.HISTORY, user, record.encode(found))
