"""Ranking and retrieval: one user, many candidates, one gather from the online store, one pass through the network.

A `RankService` is bound to one bundle from its first lookup to its last: rows, histories and items are read under the
bundle's id, and the answer names it.

Shape letters: n candidates, M rows, D dim.
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
from features.errors import BundleError, EventError, StoreError
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.embedding import EmbeddingClient, csv_sources
from models.bundle.local import context_frame
from models.bundle.scorer import Scorer
from models.table.batch import Entities
from serving.ranking.answer import ItemView, RankingAnswer, RetrievalAnswer
from serving.ranking.histories import Histories
from serving.ranking.rows import RowReader, StoreRows
from serving.retrieval.filter import Attributes, Filter, attribute_json
from serving.retrieval.retriever import Retriever
from serving.store.feed import Feed
from serving.store.fill import require_loaded
from serving.store.protocol import OnlineStore

MAX_CANDIDATES, MAX_EXPLAINED = 2_000, 100
_RETRIEVED = 200
# Items that are taken in while rankings wait.
_AT_ONCE = 64
# How long a bundle that another server releases stays after the last server that answers from it.
_LEASE_S = 60.0
_LOGGER = logging.getLogger(__name__)


class RankService:
    """Serves one bundle.

    Args:
        bundle: with its network and catalogue.
        store: loaded with the bundle.
        rows: where rows are read; the store by default.
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
        featured = (*items.categorical, *items.numeric) if items is not None else ()
        self._attributes = tuple(dict.fromkeys((*featured, *filterable)))
        of_csv = csv_sources(bundle.dataset)
        attributes = Attributes(bundle.items, filterable, of_csv="item" in of_csv)
        self._retriever = Retriever(self._catalogue, attributes)
        self._scorer = Scorer(self._schema, bundle.network(), self._catalogue)
        self._histories = Histories(bundle, store, outlasts=self.rows.outlasts_store)
        self.embeddings = EmbeddingClient(
            self._schema,
            self._catalogue.admission,
            self.rows.read_rows,
            version=bundle.canonical,
            of_csv=of_csv,
        )
        # What refresh has read; one refresh at a time.
        self._items = Feed(store, bundle.id, record.ITEM)
        self._admissions = Feed(store, bundle.id, record.ADMITTED)
        self._refreshing = threading.Lock()
        self._renew_at = 0.0
        self.unreadable: set[str] = set()
        # Over catalogue and index; nothing waits for the network under it.
        self._lock = threading.RLock()
        self.refresh()

    @property
    def ranks_items(self) -> bool:
        """True if the bundle knows items at all; one trained on events alone does not."""
        return self.items > 0

    @property
    def items(self) -> int:
        """Number of items that can be ranked."""
        return len(self._catalogue.item_numbers) - len(self._catalogue.deleted)

    @property
    def item_types(self) -> dict[str, pl.DataType]:
        """The types of the item columns that the catalogue keeps."""
        return self._catalogue.item_types

    def check_ready(self) -> None:
        """Returns when requests can be answered.

        Raises:
            StoreError: the store does not answer, or does not hold the bundle.
        """
        require_loaded(self._store, self.bundle)

    def refresh(self) -> int:
        """Applies the stream's changes of items and admissions since the last call; returns the number of items.

        Raises:
            StoreError: the store does not answer, or no longer holds the bundle.
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
                    self._take_in(dict(chunk[start : start + _AT_ONCE]))
            return count

    def _require_loaded(self) -> None:
        """Notices that the store was emptied, and keeps the bundle where another server releases it."""
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
    ) -> RankingAnswer:
        """Scores candidates for a user, or what retrieval finds where none are given.

        Args:
            candidates: item ids; of one that comes twice the first counts.
            k: how many to return at most.
            context: values of the events' own columns, null where absent.
            wanted: what retrieved candidates must match.
            explain: give reasons with the items that are returned.

        Raises:
            StoreError: the bundle ranks no items, or the store does not answer.
            EventError: `context` or `wanted` names a column the dataset has not, or a value is of a wrong type.
        """
        if not self.ranks_items:
            raise StoreError(f"bundle {self.bundle.id} was trained on events without items, so it ranks none")
        events = Entities(self._schema, "event", context_frame(self.bundle, context or {}), self._catalogue.admission)
        with trace.span("history"):
            stored, stale = self._histories.read(user)
        if candidates is not None:
            self._learn([name for name in candidates if name not in self._catalogue.item_numbers])
        with self._lock:
            history = self._visited(stored)
            if candidates is None:
                items, *_ = self._retriever.search(
                    self._retriever.taste(history), max(_RETRIEVED, k), wanted, without=history
                )
                names = [self._catalogue.item_ids[number] for number in items.tolist()]
            else:
                names = list(dict.fromkeys(candidates))
                items = np.array([self._number(name) for name in names], dtype=np.int64)
            trace.note(candidates=len(items), retrieved=candidates is None)
            known_user = stored is not None or user in self._catalogue.user_numbers
            lookups = self._scorer.lookups(user, items, history, events) if len(items) else None
        scores, order, reasons = np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), []
        if lookups is not None:
            vectors = self.rows.read_rows(lookups.rows)
            scores = self._scorer.score(lookups, vectors)
            order = np.argsort(-scores, kind="stable")[:k]
            reasons = self._scorer.explain(lookups, vectors, order) if explain else []
        return RankingAnswer(
            bundle=self.bundle.id,
            items=[(names[place], float(scores[place])) for place in order],
            known_user=known_user,
            unknown_items=[
                name for name, item in zip(names, items.tolist(), strict=True) if item == self._default_item
            ],
            retrieved=candidates is None,
            stale=stale,
            reasons=reasons,
        )

    def retrieve(
        self,
        *,
        item: str | None = None,
        user: str | None = None,
        text: str | None = None,
        k: int,
        wanted: Filter | None = None,
    ) -> RetrievalAnswer:
        """Finds the items nearest to an item, to what a user liked, or to a text; one of the three is given.

        Raises:
            EventError: nobody knows the item, the bundle has no encoder for the text, or the filter does not fit.
            StoreError: the store does not answer.
        """
        if wanted is not None:
            wanted.check_size()
        stored = None
        if user is not None:
            with trace.span("history"):
                stored = self._histories.read(user)[0]
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
            numbers, scores, plan = self._retriever.search(query, k, wanted, without=without)
            names = [self._catalogue.item_ids[number] for number in numbers.tolist()]
        return RetrievalAnswer(self.bundle.id, list(zip(names, scores.tolist(), strict=True)), plan)

    def item(self, name: str) -> ItemView | None:
        """An item as the store knows it, or else the bundle; None when nobody does, or it was deleted."""
        stored = self._store.read_records(self.bundle.id, record.ITEM, [name])[0]
        if stored is not None:
            if stored == record.TOMBSTONE:
                return None
            found = record.decode_item(stored)
            return ItemView(
                self.bundle.id,
                name,
                found.encoder,
                found.codebook,
                found.codes,
                found.content().tolist(),
                {name: attribute_json(found.features.get(name)) for name in self._attributes},
            )
        number = self._catalogue.item_numbers.get(name)
        if number is None or number >= self._published or name in self._catalogue.deleted:
            return None
        row = self.bundle.items.row(number, named=True)
        manifest = self.bundle.manifest
        codes = row.get("semantic_codes")
        return ItemView(
            self.bundle.id,
            name,
            manifest.encoder or "",
            manifest.codebook or "",
            list(codes) if codes is not None else [],
            list(row.get("content_vector") or []),
            {name: attribute_json(row.get(name)) for name in self._attributes},
        )

    def similar(self, item: str, count: int) -> list[tuple[str, float]]:
        """The items whose content is nearest to an item's, with their cosine similarity."""
        with self._lock:
            found = self._retriever.similar(self._catalogue.item_numbers[item], count)
            return [(self._catalogue.item_ids[number], score) for number, score in found]

    def _visited(self, stored: bytes | None) -> NDArray[np.int64]:
        """The numbers of the last items of a stored history that are in the catalogue."""
        numbers = self._catalogue.item_numbers
        visited = record.decode_history(stored).items if stored else []
        liked = [numbers[name] for name in visited if name in numbers][-self._schema.history_length :]
        return np.array(liked, dtype=np.int64)

    def _encoded(self, text: str) -> NDArray[np.float32]:
        encoder = self.bundle.encoder
        if encoder is None:
            raise EventError(f"text: bundle {self.bundle.id} has no encoder; ask by item or user")
        with trace.span("encode"):
            found: NDArray[np.float32] = encoder.encode([text])[0]
        return found

    def _number(self, item: str) -> int:
        """The item's number; of one that nobody knows, or that was deleted, the number of the item without anything."""
        known = item not in self._catalogue.deleted
        return self._catalogue.item_numbers.get(item, self._default_item) if known else self._default_item

    def _learn(self, unknown: Sequence[str]) -> None:
        """Looks unknown candidates up in the store: the stream may have added them since the last refresh."""
        if not unknown or self._histories.away:
            return
        try:
            read = self._store.read_records(self.bundle.id, record.ITEM, unknown)
            self._take_in({name: data for name, data in zip(unknown, read, strict=True) if data is not None})
        except StoreError:
            if not self.rows.outlasts_store:
                raise

    def _take_in(self, payloads: Mapping[str, bytes]) -> None:
        """Applies records of items; an unreadable record is skipped, and the others are applied."""
        try:
            self._put(payloads)
        except (StoreError, BundleError):
            raise
        except Exception as error:
            # What a library makes of a value that another process wrote is not known beforehand.
            if len(payloads) > 1:
                for name, data in payloads.items():
                    self._take_in({name: data})
                return
            (name,) = payloads
            if name not in self.unreadable:
                self.unreadable.add(name)
                _LOGGER.error("item %r is left out, its record cannot be read: %s", name, error)
        else:
            self.unreadable.difference_update(payloads)

    def _put(self, payloads: Mapping[str, bytes]) -> None:
        found = {name: record.decode_item(data) for name, data in payloads.items() if data != record.TOMBSTONE}
        with self._lock:
            self._catalogue.put_items(found)
            self._catalogue.remove_items([name for name in payloads if name not in found])
            numbers = [self._catalogue.item_numbers[name] for name in payloads]
            self._retriever.update(numbers, [found[name].features if name in found else {} for name in payloads])
