"""Ranking: one user, many candidates, one gather from the online store, one pass through the network.

A `RankService` is bound to one bundle from its first lookup to its last: rows, histories and items are read under the
bundle's id, and the answer names it.

Shape letters: n candidates, K lookups, D dim.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.error import DatasetError, EventError, StoreError
from features.history import Jagged
from features.source import Table
from features.table import features as shape_features
from models import record
from models.bundle import Bundle
from models.catalogue import Catalogue
from models.lookup import Assembler, Batch, Entities, Examples
from models.schema import Feature, Schema
from models.table.reference import pool
from serving.embeddings import EmbeddingClient
from serving.load import require_loaded
from serving.retrieve import Retriever
from serving.rows import RowReader, StoreRows
from serving.store import OnlineStore

MAX_CANDIDATES = 2_000
_RETRIEVED = 200


@dataclass(frozen=True)
class Ranking:
    """An answer.

    Attributes:
        bundle: id of the bundle that answered.
        items: (item id, probability), best first.
        known_user: False when neither the bundle nor the stream knows the user.
        unknown_items: candidates nobody knows; they were scored without item features.
        retrieved: whether the candidates were found by vector.
    """

    bundle: str
    items: list[tuple[str, float]]
    known_user: bool
    unknown_items: list[str]
    retrieved: bool


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
        self._network = bundle.network()
        self._catalogue = Catalogue(bundle)
        self._default_item = self._catalogue.add_default_item()
        self._retriever = Retriever(self._catalogue)
        self.embeddings = EmbeddingClient(self._schema, self._catalogue.admission, self.rows)
        self._seen_changes = self._seen_admissions = 0
        self._lock = threading.RLock()
        self._item_features = tuple(self._schema.of("item"))
        self._shared_features = tuple(feature for feature in self._schema.features if feature.of != "item")
        self._places = _places(self._schema.features, self._shared_features, self._item_features, self._schema)
        # Changes are counted before the items are read: what comes between is taken in twice, not missed.
        self._seen_changes = len(store.record_ids(bundle.id, record.CHANGED, 0))
        self._take_in(store.record_ids(bundle.id, record.ITEM, 0))
        self.refresh()

    @property
    def ranks_items(self) -> bool:
        """Whether the bundle knows items at all; one trained on events alone does not."""
        return self.items > 0

    @property
    def items(self) -> int:
        """How many items can be ranked."""
        return len(self._catalogue.item_numbers) - len(self._catalogue.deleted)

    def refresh(self) -> int:
        """Takes in what the stream has done to items and admissions since the last call; returns how many items."""
        with self._lock:
            batches = self._store.record_ids(self.bundle.id, record.ADMITTED, self._seen_admissions)
            for payload in self._store.read_records(self.bundle.id, record.ADMITTED, batches):
                if payload is not None:
                    self._catalogue.admission.admit(record.decode_admitted(payload))
            self._seen_admissions += len(batches)
            batches = self._store.record_ids(self.bundle.id, record.CHANGED, self._seen_changes)
            payloads = self._store.read_records(self.bundle.id, record.CHANGED, batches)
            changed = dict.fromkeys(
                name for data in payloads if data is not None for name in record.decode_changed(data)
            )
            self._take_in(list(changed))
            self._seen_changes += len(batches)
            return len(changed)

    def rank(
        self, user: str, candidates: Sequence[str] | None, k: int, context: Mapping[str, Any] | None = None
    ) -> Ranking:
        """Scores candidates for a user, or what retrieval finds where none are given.

        Args:
            candidates: item ids; of one that comes twice the first counts.
            k: how many to return at most.
            context: values of the events' own columns, null where absent.

        Raises:
            StoreError: the bundle ranks no items, or the store does not answer.
            EventError: `context` names a column the dataset has not, or its value is of a wrong type.
        """
        if not self.ranks_items:
            raise StoreError(f"bundle {self.bundle.id} was trained on events without items, so it ranks none")
        events = Entities(self._schema, "event", self._context_frame(context or {}), self._catalogue.admission)
        stored = self._store.read_records(self.bundle.id, record.HISTORY, [user])[0]
        visited = record.decode_history(stored).items if stored else []
        if candidates is not None:
            self._learn([name for name in candidates if name not in self._catalogue.item_numbers])
        with self._lock:
            numbers = self._catalogue.item_numbers
            liked = [numbers[name] for name in visited if name in numbers][-self._schema.history_length :]
            history = np.array(liked, dtype=np.int64)
            if candidates is None:
                items = self._retriever.nearest(history, max(_RETRIEVED, k))
                names = [self._catalogue.item_ids[number] for number in items.tolist()]
            else:
                names = list(dict.fromkeys(candidates))
                items = np.array([self._number(name) for name in names], dtype=np.int64)
            known_user = stored is not None or user in self._catalogue.user_numbers
            scores = self._score(user, items, history, events)
        order = np.argsort(-scores, kind="stable")[:k]
        return Ranking(
            bundle=self.bundle.id,
            items=[(names[place], float(scores[place])) for place in order],
            known_user=known_user,
            unknown_items=[name for name in names if self._number(name) == self._default_item],
            retrieved=candidates is None,
        )

    def similar(self, item: str, count: int) -> list[tuple[str, float]]:
        """The items whose content is nearest to an item's, with their cosine similarity."""
        with self._lock:
            found = self._retriever.similar(self._catalogue.item_numbers[item], count)
        return [(self._catalogue.item_ids[number], score) for number, score in found]

    def _score(
        self, user: str, items: NDArray[np.int64], history: NDArray[np.int64], events: Entities
    ) -> NDArray[np.float32]:
        if not len(items):
            return np.zeros(0, dtype=np.float32)
        catalogue = self._catalogue
        users, number = catalogue.users, catalogue.user_numbers.get(user)
        if number is None:
            users, number = Entities(self._schema, "user", catalogue.user_frame([user]), catalogue.admission), 0
        assembler = Assembler(self._schema, users, catalogue.items, events, catalogue.vectors)
        every = _examples(number, items, history)
        # A user's own lookups are the same for every candidate: gathered and pooled once.
        shared = assembler.batch(_examples(number, items[:1], history), self._shared_features)
        own = assembler.batch(every, self._item_features)
        rows, place = np.unique(np.concatenate([shared.values, own.values]), return_inverse=True)
        vectors = torch.from_numpy(self.rows.read_rows(rows))
        local = torch.from_numpy(place)
        parts = torch.cat(
            [
                pool(vectors, _relocated(shared, local[: len(shared.values)])).expand(len(items), -1),
                pool(vectors, _relocated(own, local[len(shared.values) :])),
            ],
            dim=1,
        )
        with torch.no_grad():
            logits = self._network(parts[:, self._places], own)
        found: NDArray[np.float32] = torch.sigmoid(logits).numpy()
        return found

    def _number(self, item: str) -> int:
        """The item's number; of one that nobody knows, or that was deleted, the number of the item without anything."""
        known = item not in self._catalogue.deleted
        return self._catalogue.item_numbers.get(item, self._default_item) if known else self._default_item

    def _context_frame(self, context: Mapping[str, Any]) -> pl.DataFrame:
        events = self.bundle.dataset.events
        unknown = [name for name in context if name not in (*events.categorical, *events.numeric)]
        if unknown:
            valid = ", ".join((*events.categorical, *events.numeric)) or "none"
            raise EventError(f"context: unknown column {unknown[0]!r}; the dataset's event columns are: {valid}")
        row: dict[str, Any] = {name: [context.get(name)] for name in (*events.categorical, *events.numeric)}
        if not row:
            return pl.DataFrame({"nothing": [0]})
        try:
            frame = pl.DataFrame(row)
            return pl.DataFrame(shape_features(Table("context", frame, tuple(row), (Path("request"),), (1,)), events))
        except (DatasetError, pl.exceptions.PolarsError, TypeError, OverflowError) as error:
            raise EventError(f"context: {error}") from error

    def _learn(self, unknown: Sequence[str]) -> None:
        """Looks unknown candidates up in the store: the stream may have added them since the last refresh."""
        if unknown:
            with self._lock:
                self._take_in(unknown)

    def _take_in(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        read = self._store.read_records(self.bundle.id, record.ITEM, ids)
        payloads = {name: data for name, data in zip(ids, read, strict=True) if data is not None}
        found = {name: record.decode_item(data) for name, data in payloads.items() if data != record.TOMBSTONE}
        self._catalogue.put_items(found)
        self._catalogue.remove_items([name for name in payloads if name not in found])
        if payloads:
            self._retriever.refresh()


def _examples(user: int, items: NDArray[np.int64], history: NDArray[np.int64]) -> Examples:
    same = np.zeros(len(items), dtype=np.int64)
    one = Jagged(history, np.array([0, len(history)], dtype=np.int64))
    return Examples(same + user, items, one.take(same), np.zeros(0, dtype=np.float32), same)


def _relocated(batch: Batch, values: torch.Tensor) -> Batch:
    return replace(batch, values=values)


def _places(
    features: Sequence[Feature], shared: Sequence[Feature], own: Sequence[Feature], schema: Schema
) -> torch.Tensor:
    """For each column of the network's pooled input, where it stands in [shared, own]."""
    widths = {feature.name: schema.slots(feature) * feature.chunks * schema.dim for feature in features}
    starts: dict[str, int] = {}
    position = 0
    for feature in (*shared, *own):
        starts[feature.name] = position
        position += widths[feature.name]
    ranges = [torch.arange(starts[f.name], starts[f.name] + widths[f.name]) for f in features]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
