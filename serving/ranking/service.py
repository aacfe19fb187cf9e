"""Ranking and retrieval. A ranking of many candidates takes one read of rows and one pass through the network.

A `RankService` is bound to one bundle. Rows, histories and items are read under the bundle's id, and the answer names
the bundle.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features import tracing as trace
from features.aggregate.aggregator import Reading, readings
from features.content.chain import BASE, SIMILAR
from features.errors import BundleError, EventError, StoreError
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.embedding import EmbeddingClient, csv_sources
from models.bundle.local import context_frame
from models.bundle.request_aggregates import AsOf
from models.bundle.scorer import Scorer
from models.table.batch import Entities
from serving.ranking.aggregates import RequestAggregates
from serving.ranking.answer import ItemView, RankingAnswer, RetrievalAnswer, published_view, stored_view
from serving.ranking.histories import Histories
from serving.ranking.rows import RowReader, StoreRows
from serving.retrieval.filter import Attributes, Filter
from serving.retrieval.meaning import NOTHING, Meaning, Meant, SharedConcept
from serving.retrieval.retriever import Retriever
from serving.store.feed import Feed
from serving.store.fill import require_loaded
from serving.store.protocol import OnlineStore

MAX_CANDIDATES, MAX_EXPLAINED = 2_000, 100
_RETRIEVED = 200
# Number of items that are applied under the lock at a time, while rankings wait.
_AT_ONCE = 64
# Shortest time that a bundle which another server released stays in the store while this server answers from it.
_LEASE_S = 60.0
_LOGGER = logging.getLogger(__name__)


class RankService:
    """Ranking and retrieval of one bundle.

    Attributes:
        bundle: The bundle.
        rows: Source of the rows.
        embeddings: Embeddings of feature values.
        unreadable: Ids of the items whose record cannot be applied.

    Args:
        bundle: The bundle.
        store: Store that has the bundle.
        rows: Source of the rows. Default: the store.

    Raises:
        StoreError: The store does not answer, or does not have the bundle.
    """

    def __init__(self, bundle: Bundle, store: OnlineStore, rows: RowReader | None = None) -> None:
        require_loaded(store, bundle)
        self.bundle = bundle
        self._store = store
        self.rows = rows or StoreRows(store, bundle.id)
        self._schema = bundle.schema
        self._catalogue = Catalogue(bundle)
        self._published = len(self._catalogue.item_ids)
        self._default_item = self._catalogue.add_default_item()
        items = bundle.dataset.items
        filterable = items.filterable if items is not None else ()
        featured = (*items.categorical_features, *items.numeric_features) if items is not None else ()
        kept = items.attributes if items is not None else ()
        self._attributes = tuple(dict.fromkeys((*featured, *filterable, *kept)))
        of_csv = csv_sources(bundle.dataset)
        self._meaning = Meaning(bundle.concepts, bundle.id)
        named = self._meaning.with_columns(bundle.items, self._catalogue.vectors[: bundle.items.height])
        attributes = Attributes(named, (*filterable, *self._meaning.filterable), of_csv="item" in of_csv)
        aspects = {
            name: (aspect, bundle.items.select(aspect.columns).to_dicts()) for name, aspect in bundle.aspects.items()
        }
        self._retriever = Retriever(self._catalogue, attributes, bundle.views, aspects)
        self._scorer = Scorer(self._schema, bundle.network(), self._catalogue)
        self._histories = Histories(bundle, store, outlasts=self.rows.outlasts_store)
        self._aggregates = RequestAggregates(self._schema.aggregates, self._scorer, self.rows)
        self.embeddings = EmbeddingClient(
            self._schema,
            self._catalogue.admission,
            self.rows.read_rows,
            version=bundle.canonical,
            of_csv=of_csv,
        )
        # Cursors of `refresh`. One refresh runs at a time.
        self._items = Feed(store, bundle.id, record.ITEM)
        self._admissions = Feed(store, bundle.id, record.ADMITTED)
        self._refreshing = threading.Lock()
        self._renew_at = 0.0
        self.unreadable: set[str] = set()
        # Guards catalogue and index. The network does not run under this lock.
        self._lock = threading.RLock()
        self.refresh()

    @property
    def ranks_items(self) -> bool:
        """True if the bundle has items. A bundle that was trained on events alone has none."""
        return self.items > 0

    @property
    def has_clock(self) -> bool:
        """True if the events have times, False if they have positions or nothing."""
        return self.bundle.dataset.events.time is not None

    @property
    def items(self) -> int:
        """Number of items that can be ranked."""
        return len(self._catalogue.item_numbers) - len(self._catalogue.deleted)

    @property
    def item_types(self) -> dict[str, pl.DataType]:
        """Types of the item columns that item messages may set, by column."""
        return self._catalogue.item_types

    def check_ready(self) -> None:
        """Checks that requests can be answered.

        Raises:
            StoreError: The store does not answer, or does not have the bundle.
        """
        require_loaded(self._store, self.bundle)

    def refresh(self) -> int:
        """Applies the stream's changes of items and admissions since the last call. Returns the number of items.

        Raises:
            StoreError: The store does not answer, or no longer has the bundle.
        """
        with self._refreshing:
            self._require_loaded()
            for chunk in self._admissions.read():
                for _, payload in chunk:
                    keys = record.decode_admitted(payload)
                    with self._lock:
                        self._catalogue.admission.admit(keys)
            count = 0
            for chunk in self._items.read():
                count += len(chunk)
                for start in range(0, len(chunk), _AT_ONCE):
                    self._apply(dict(chunk[start : start + _AT_ONCE]))
            return count

    def _require_loaded(self) -> None:
        """Checks that the store has the bundle, and extends its time if another server has released it."""
        try:
            require_loaded(self._store, self.bundle)
        except StoreError:
            self._histories.emptied = True
            raise
        self._histories.emptied = False
        if time.monotonic() >= self._renew_at:
            self._store.renew(self.bundle.id, least_s=_LEASE_S)
            self._renew_at = time.monotonic() + _LEASE_S / 6

    def rank(
        self,
        user: str,
        candidates: Sequence[str] | None,
        k: int,
        context: Mapping[str, Any] | None = None,
        *,
        wanted: Filter | None = None,
        explain: bool = False,
        at: int | None = None,
        meant: Meant = NOTHING,
    ) -> RankingAnswer:
        """Ranks candidates for a user.

        Args:
            user: Id of the user.
            candidates: Item ids, repeats are ignored. None: retrieval chooses the candidates.
            k: Largest number of items to return.
            context: Values of the events' own columns, by column. Absent columns are null.
            wanted: Condition that retrieved candidates must meet.
            explain: True returns reasons for the returned items.
            at: Time as of which aggregates are answered, microseconds since 1970. Default: right after the newest event
                of the stream. Expressions over the events' clock read this time, by default the present time.
            meant: Concepts that retrieval avoids, and those that no retrieved candidate may carry.

        Raises:
            StoreError: The bundle has no items, or the store does not answer.
            EventError: `context` or `wanted` names a column that the dataset does not have, or a value has a wrong
                type.
        """
        if not self.ranks_items:
            raise StoreError(f"bundle {self.bundle.id} was trained on events without items, so it ranks no items")
        if at is not None and not self.has_clock:
            raise EventError(f"at: the dataset {self.bundle.dataset.name} has no clock; leave at out")
        now_us = time.time_ns() // 1_000 if at is None else at
        event = context_frame(self.bundle, context or {}, at_us=now_us)
        events = Entities(self._schema, "event", event, self._catalogue.admission)
        if candidates is not None:
            self._learn([name for name in candidates if name not in self._catalogue.item_numbers])
            names = list(dict.fromkeys(candidates))
            with self._lock:
                items = np.array([self._number(name) for name in names], dtype=np.int64)
                asked = self._aggregates.of(user, items)
        with trace.span("history"):
            stored = self._histories.read(user, asked.ids if candidates is not None else ())
        if candidates is None:
            with self._lock:
                names, items = self._retrieved(stored.history, k, wanted, meant)
                asked = self._aggregates.of(user, items)
            if asked.ids:
                stored = self._histories.read(user, asked.ids)
        columns, as_of = self._aggregates.answer(asked, stored, at)
        with self._lock:
            trace.note(candidates=len(items), retrieved=candidates is None)
            known_user = stored.history is not None or user in self._catalogue.user_numbers
            history = self._visited(stored.history)
            lookups = self._scorer.lookups(user, items, history, events, columns) if len(items) else None
        scores, order, reasons = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), []
        if lookups is not None:
            vectors = self.rows.read_rows(lookups.rows)
            scores = self._scorer.score(lookups, vectors)
            order = np.argsort(-scores, kind="stable")[:k]
            reasons = self._scorer.explain(lookups, vectors, order) if explain else []
        return RankingAnswer(
            bundle=self.bundle.id,
            items=[(names[index], float(scores[index])) for index in order],
            known_user=known_user,
            unknown_items=[
                name for name, item in zip(names, items.tolist(), strict=True) if item == self._default_item
            ],
            retrieved=candidates is None,
            stale=stored.stale,
            reasons=reasons,
            as_of=as_of,
        )

    def _retrieved(
        self, stored: bytes | None, k: int, wanted: Filter | None, meant: Meant
    ) -> tuple[list[str], NDArray[np.int64]]:
        """Returns ids and numbers of the items nearest to what the user liked."""
        history = self._visited(stored)
        taste = self._meaning.steered(self._retriever.taste(history), meant.avoid)
        allowed = self._meaning.excluding(meant.without, wanted)
        items, *_ = self._retriever.search(taste, max(_RETRIEVED, k), allowed, without=history)
        return [self._catalogue.item_ids[number] for number in items.tolist()], items

    def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int,
        wanted: Filter | None = None,
        view: str | None = None,
        meant: Meant = NOTHING,
    ) -> RetrievalAnswer:
        """Finds the items nearest to an item, to a user's liked items, or to a text.

        Args:
            item, user, text: Exactly one of the three.
            k: Largest number of items to return.
            wanted: Condition that the items must meet.
            view: One of `views`. Default: for an item `similar`, if the bundle has that view, otherwise `base`.
            meant: Aspect in which items are near, concepts to avoid or to exclude, and the wish for an explanation.

        Raises:
            EventError: The item, the view, the aspect or a concept is unknown, the bundle has no encoder for the text,
                or the filter does not fit.
            StoreError: The store does not answer.
        """
        chosen = view or (self._similar_view if item is not None else BASE)
        if chosen not in self.views:
            raise EventError(f"view: bundle {self.bundle.id} has no view {view!r}; choose of {', '.join(self.views)}")
        if meant.aspect is not None and meant.aspect not in self._retriever.aspects:
            known = ", ".join(self._retriever.aspects) or "none; declare [items.aspects] and run again"
            raise EventError(f"aspect: bundle {self.bundle.id} has no aspect {meant.aspect!r}; choose of {known}")
        if wanted is not None:
            wanted.check_size()
        allowed = self._meaning.excluding(meant.without, wanted)
        stored = None
        if user is not None:
            with trace.span("history"):
                stored = self._histories.read(user).history
        vector = self._encoded(text) if text is not None else None
        if item is not None and item not in self._catalogue.item_numbers:
            self._learn([item])
        with self._lock:
            without = self._visited(stored)
            if item is not None:
                if self._number(item) == self._default_item:
                    raise EventError(f"item: {item!r} is unknown, or was deleted")
                without = np.array([self._number(item)], dtype=np.int64)
            query = vector if text is not None else self._retriever.taste(without)
            steered = self._meaning.steered(query, meant.avoid)
            if meant.aspect is not None:
                asked = without if steered is None or text is None else steered
                found = self._retriever.search_aspect(meant.aspect, asked, k, allowed, without=without)
            else:
                found = self._retriever.search(steered, k, allowed, without=without, view=chosen)
            numbers, scores, plan = found
            names = [self._catalogue.item_ids[number] for number in numbers.tolist()]
            vectors = self._catalogue.vectors[numbers] if meant.explain else None
        shared = [] if vectors is None or query is None else self._shared(query, vectors, names, item)
        ranked = list(zip(names, scores.tolist(), strict=True))
        return RetrievalAnswer(self.bundle.id, ranked, plan, chosen, meant.aspect, shared)

    def _shared(
        self, query: NDArray[np.float32], vectors: NDArray[np.float32], names: Sequence[str], item: str | None
    ) -> list[list[SharedConcept]]:
        """Returns the concepts that each answer shares most with the query."""
        asking = self._declared([item]) if item is not None else []
        return [
            self._meaning.shared(query, vector, [declared, *asking])
            for declared, vector in zip(self._declared(names), vectors, strict=True)
        ]

    def _declared(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Returns the columns of items as the store or the bundle has them, the store first.

        While the store is away, a server that answers without it reads the bundle alone.
        """
        found: list[Mapping[str, Any]] = []
        try:
            records = self._store.read_records(self.bundle.id, record.ITEM, names)
        except StoreError:
            if not self.rows.outlasts_store:
                raise
            records = [None] * len(names)
        for name, data in zip(names, records, strict=True):
            number = self._catalogue.item_numbers.get(name, self._published)
            published = self.bundle.items.row(number, named=True) if number < self._published else {}
            stored = {} if data in (None, record.TOMBSTONE) else record.decode_item(data).features
            found.append(published if data is None else stored)
        return found

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views of the items' vectors, `base` first."""
        return self._retriever.views

    @property
    def _similar_view(self) -> str:
        return SIMILAR if SIMILAR in self.views else BASE

    def item(self, name: str) -> ItemView | None:
        """Returns an item as the store or the bundle has it, the store first. None if it is unknown or deleted."""
        stored = self._store.read_records(self.bundle.id, record.ITEM, [name])[0]
        if stored is not None:
            if stored == record.TOMBSTONE:
                return None
            return stored_view(self.bundle.id, name, record.decode_item(stored), self._attributes)
        number = self._catalogue.item_numbers.get(name)
        if number is None or number >= self._published or name in self._catalogue.deleted:
            return None
        return published_view(self.bundle, number, self._attributes)

    def aggregates(self, user: str, item: str, *, at: int | None = None) -> tuple[list[Reading], AsOf | None]:
        """Returns the aggregates that a ranking of one item for one user reads, and the time as of which they are.

        Args:
            user: Id of the user. An unknown user has no event.
            item: Id of the item. An unknown item has no event.
            at: As in `rank`.

        Raises:
            StoreError: The store does not answer.
        """
        self._learn([item] if item not in self._catalogue.item_numbers else [])
        with self._lock:
            asked = self._aggregates.of(user, np.array([self._number(item)], dtype=np.int64))
        columns, as_of = self._aggregates.answer(asked, self._histories.read(user, asked.ids), at)
        return ([] if columns is None else readings(self._schema.aggregates, columns[0])), as_of

    def similar(self, item: str, count: int) -> list[tuple[str, float]]:
        """Returns the items whose content is nearest to an item's content, with their cosine similarity.

        The vectors are of the view `similar`, if the bundle has that view, otherwise of `base`.

        Args:
            item: Id of a known item.
            count: Largest number of items to return.
        """
        with self._lock:
            nearest = self._retriever.similar(self._catalogue.item_numbers[item], count, self._similar_view)
            return [(self._catalogue.item_ids[number], score) for number, score in nearest]

    def _visited(self, stored: bytes | None) -> NDArray[np.int64]:
        """Returns the numbers of the last items of a stored history that are in the catalogue, oldest first."""
        numbers = self._catalogue.item_numbers
        visited = record.decode_history(stored).items if stored else []
        liked = [numbers[name] for name in visited if name in numbers][-self._schema.history_length :]
        return np.array(liked, dtype=np.int64)

    def _encoded(self, text: str) -> NDArray[np.float32]:
        encoder = self.bundle.encoder
        if encoder is None:
            raise EventError(f"text: bundle {self.bundle.id} has no encoder; ask by item or user")
        with trace.span("encode"):
            vector: NDArray[np.float32] = encoder.encode([text])[0]
        return vector

    def _number(self, item: str) -> int:
        """Returns the number of an item. An unknown or deleted item has the number of the item without values."""
        known = item not in self._catalogue.deleted
        return self._catalogue.item_numbers.get(item, self._default_item) if known else self._default_item

    def _learn(self, unknown: Sequence[str]) -> None:
        """Reads unknown candidates from the store, since the stream may have added them after the last refresh."""
        if not unknown or self._histories.unavailable:
            return
        try:
            payloads = self._store.read_records(self.bundle.id, record.ITEM, unknown)
            self._apply({name: data for name, data in zip(unknown, payloads, strict=True) if data is not None})
        except StoreError:
            if not self.rows.outlasts_store:
                raise

    def _apply(self, payloads: Mapping[str, bytes]) -> None:
        """Applies records of items. An unreadable record is skipped and logged, and all others are applied."""
        try:
            self._put(payloads)
        except (StoreError, BundleError):
            raise
        except Exception as error:
            # A library may raise any error at a value that another process wrote.
            if len(payloads) > 1:
                for name, data in payloads.items():
                    self._apply({name: data})
                return
            (name,) = payloads
            if name not in self.unreadable:
                self.unreadable.add(name)
                _LOGGER.error("item %r is left out, its record cannot be read: %s", name, error)
        else:
            self.unreadable.difference_update(payloads)

    def _put(self, payloads: Mapping[str, bytes]) -> None:
        items = {name: record.decode_item(data) for name, data in payloads.items() if data != record.TOMBSTONE}
        with self._lock:
            self._catalogue.put_items(items)
            self._catalogue.remove_items([name for name in payloads if name not in items])
            numbers = [self._catalogue.item_numbers[name] for name in payloads]
            rows = [items[name].features if name in items else {} for name in payloads]
            meant = self._meaning.columns(self._catalogue.vectors[np.array(numbers, dtype=np.int64)], rows)
            self._retriever.update(numbers, [row | more for row, more in zip(rows, meant, strict=True)])
