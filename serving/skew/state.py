"""The state of a bundle at an offset of the log, from which the inputs of an answer are computed again.

The state is the fold: published tables of the batch path, snapshot, and all deltas before the offset. It shares no
store, no mirror and no page with a server.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.aggregate.aggregator import Aggregator
from features.aggregate.stored import restore_aggregates
from features.value.forgotten import Forgotten, ForgottenUsers
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.corrector import corrector_of, labelled_of
from models.bundle.delta import Delta, Record
from models.bundle.request_aggregates import answer
from models.bundle.request_features import request_events, sent_values
from models.bundle.scorer import Lookups, Scorer
from serving.skew.record import SkewRecord
from serving.store.page import pack, unpack
from serving.store.protocol import StoredTable
from streaming.fold import Fold
from streaming.log.protocol import EventLog, Message, Offsets
from streaming.log.topics import Topics
from streaming.snapshot import Snapshot


@dataclass(frozen=True)
class ExpectedInputs:
    """Inputs of one answer as the state has them.

    Attributes:
        history: Ids of the visited items, oldest first.
        labelled: Ids of the labelled items, oldest first, and their labels.
        votes: (n,) change of each candidate's log-odds by the labelled items that the server read; 0 without one.
        lookups: Rows, numbers and content vectors.
        vectors: (M, D) float32 vectors of the rows that the server read, in the format of its store.
    """

    history: list[str]
    labelled: tuple[list[str], bytes]
    votes: NDArray[np.float64]
    lookups: Lookups
    vectors: NDArray[np.float32]


class SkewState:
    """State of one bundle at an offset of its deltas.

    Attributes:
        bundle: The bundle.
        scorer: Network over the state's users and items.

    Args:
        log: Log with the deltas.
        bundle: The bundle.
        topics: Names of the topics.
        snapshot: Snapshot with which the state starts. None: the state starts with the bundle.
    """

    def __init__(self, log: EventLog, bundle: Bundle, topics: Topics, snapshot: Snapshot | None = None) -> None:
        self.bundle = bundle
        self._fold = Fold(log, bundle, topics, snapshot)
        self._catalogue = Catalogue(bundle)
        self._default_item = self._catalogue.add_default_item()
        self._aggregates = bundle.aggregates()
        self.scorer = Scorer(
            bundle.schema, bundle.network(), self._catalogue, bundle.dataset.events.varying, bundle.formula
        )
        self._corrector = corrector_of(bundle, self._catalogue)
        self._published = bundle.rows()
        if snapshot is not None:
            self._apply([one for one in snapshot.records(bundle) if one.kind != aggregate_record.AGGREGATE])
            self._aggregates = Aggregator(bundle.schema.aggregates)
            restore_aggregates(self._aggregates, snapshot.arrays)
            self._forget(ForgottenUsers(user.request for user in snapshot.memory.forgotten))

    @property
    def start(self) -> Offsets:
        """First offset in each partition at which the state can be."""
        return self._fold.position

    def steps(self) -> Iterator[tuple[Message, Delta]]:
        """Yields each delta with its message; see `streaming.fold.Fold.steps`."""
        for message, change in self._fold.steps():
            yield message, change
            self._apply(change.records)

    def _apply(self, records: Sequence[Record]) -> None:
        catalogue, payloads, gone = self._catalogue, {}, ForgottenUsers()
        for changed in records:
            if changed.kind == record.ADMITTED:
                catalogue.admission.admit(record.decode_admitted(changed.payload))
            elif changed.kind == record.ITEM:
                payloads[changed.id] = changed.payload
            elif changed.kind == record.FORGOTTEN:
                forgotten = record.decode_forgotten_record(changed.payload)
                gone.add(Forgotten(changed.id, forgotten.salt, forgotten.at_us))
        self._forget(gone)
        catalogue.put_items({name: record.decode_item(data) for name, data in payloads.items() if data})
        catalogue.remove_items([name for name, data in payloads.items() if not data])
        aggregate_record.apply(self._aggregates, records)

    def _forget(self, users: ForgottenUsers) -> None:
        """Removes the published features of forgotten users, as servers do."""
        self._catalogue.forget_users(users.named(list(self._catalogue.user_numbers)))

    def expected(self, served: SkewRecord) -> ExpectedInputs:
        """Computes the inputs of an answer.

        Features of the history are computed from the history that the server read, so that a wrong history is one
        difference.

        Raises:
            EventError: The context of the request does not fit the dataset.
        """
        schema, catalogue = self.bundle.schema, self._catalogue
        numbers = catalogue.item_numbers
        items = np.array([self._number(name) for name in served.candidates], dtype=np.int64)
        visits = np.array([numbers[name] for name in served.history if name in numbers], dtype=np.int64)
        sent = sent_values(self.bundle, served.context, served.fields, len(items))
        events = request_events(self.bundle, catalogue, sent, served.user, items, at_us=served.now_us)
        columns = None
        if schema.aggregates.columns:
            keys = self.scorer.aggregate_keys(served.user, items)
            columns, _ = answer(self._aggregates, keys, len(items), served.at)
        lookups = self.scorer.lookups(served.user, items, visits, events, columns)
        stored = self._record(served.user)
        return ExpectedInputs(
            self._history(stored),
            self._labelled(stored),
            self._votes(served, items),
            lookups,
            self.stored(served.storage, served.row_numbers),
        )

    def stored(self, storage: str, rows: NDArray[np.int64], *, published: bool = False) -> NDArray[np.float32]:
        """Returns the vectors (N, D) float32 of rows (N,) as a store with a format gives them back.

        Args:
            storage: Format of the store.
            rows: Rows of the table.
            published: True returns the vectors of the published bundle.
        """
        return as_stored((self._published if published else self._fold.weight)[rows], storage)

    def value(self, source: str, column: str, entity: str) -> object:
        """Returns the value of a column of a user or an item, None if there is none.

        Args:
            source: `user` or `item`.
            column: Name of the column.
            entity: Id of the user or the item.
        """
        if source == "item" and (payload := self._fold.records.get((record.ITEM, entity), (0, None))[1]) is not None:
            return record.decode_item(payload).features.get(column) if payload else None
        numbers = self._catalogue.user_numbers if source == "user" else self._catalogue.item_numbers
        frame = self.bundle.users if source == "user" else self.bundle.items
        number = numbers.get(entity, frame.height)
        return frame.row(number, named=True).get(column) if number < frame.height else None

    def _number(self, item: str) -> int:
        catalogue = self._catalogue
        return self._default_item if item in catalogue.deleted else catalogue.item_numbers.get(item, self._default_item)

    def _record(self, user: str) -> record.HistoryRecord | None:
        payload = self._fold.records.get((record.HISTORY, user), (0, b""))[1]
        return record.decode_history(payload) if payload else None

    def _history(self, stored: record.HistoryRecord | None) -> list[str]:
        known = [name for name in (stored.items if stored else ()) if name in self._catalogue.item_numbers]
        return known[-self.bundle.schema.history_length :]

    def _labelled(self, stored: record.HistoryRecord | None) -> tuple[list[str], bytes]:
        names, labels = labelled_of(stored) if self._corrector is not None else ((), b"")
        return list(names), labels

    def _votes(self, served: SkewRecord, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns the correction by the labelled items that the server read, of candidates that it took for new."""
        new = None
        if self._corrector is not None:
            lookups = served.lookups(visits=None, content=None)
            new = self._corrector.gather(items, lookups, served.labelled, served.labels)
        return np.zeros(len(items)) if new is None else new.votes()


def as_stored(vectors: NDArray[np.float32], storage: str) -> NDArray[np.float32]:
    """Returns vectors (N, D) as a store with a format gives them back."""
    if not len(vectors):
        return vectors
    table = StoredTable(rows=max(len(vectors), 1), dim=vectors.shape[1], storage=storage)
    return unpack(pack(table, vectors))
