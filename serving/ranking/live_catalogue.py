"""The items of a bundle as a server has them: published, then changed by the stream, with their search indexes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content.lexical import term_ids, unpack_terms
from features.errors import BundleError, StoreError
from features.value.forgotten import Forgotten, ForgottenUsers
from models.bundle import record
from models.bundle.bundle import Bundle
from models.bundle.catalogue import Catalogue
from models.bundle.embedding import csv_sources
from serving.policy.item_codes import ItemCodes
from serving.policy.policies import POSITIVES
from serving.ranking.answer import ItemView, published_view, stored_view
from serving.ranking.histories import Histories
from serving.ranking.read_write_lock import ReadWriteLock
from serving.ranking.rows import RowReader
from serving.ranking.tower_index import TOWERS, TowerIndex
from serving.retrieval.filter import Attributes
from serving.retrieval.meaning import Meaning
from serving.retrieval.retriever import Retriever
from serving.retrieval.rows import RowKind
from serving.retrieval.text_search import TextSearch
from serving.retrieval.words import WordIndex
from serving.store.feed import Feed
from serving.store.protocol import OnlineStore
from serving.store.writer import position_of
from streaming.log.protocol import Offsets

# Number of items that are applied under the lock at a time, while requests wait.
_AT_ONCE = 64
_LOGGER = logging.getLogger(__name__)


class LiveCatalogue:
    """Items of one bundle by number, and the indexes that find them.

    Attributes:
        catalogue: Users and items.
        meaning: Concepts of the items.
        retriever: Indexes of the items' vectors.
        towers: Index of the items by the bundle's towers; None if the bundle has no towers.
        texts: Search of the items by texts.
        default_item: Number of the item without values, for unknown and deleted items.
        attributes: Filterable columns of the items.
        codes: Semantic IDs of the items; None if no policy compares them.
        lock: Guards catalogue and indexes: requests read, the stream's changes write.
        unreadable: Ids of the items whose record cannot be applied.
        position: First offset in each partition of the deltas' topic that the store lacked before the last refresh.
            Items, rows and histories that are read later hold all earlier deltas.

    Args:
        bundle: The bundle.
        store: Store with the stream's changes.
        histories: Says whether the store is unavailable.
        rows: Source of the table's rows. Says whether reads continue while the store is unavailable.
        deltas: Name of the deltas' topic. None: `position` stays empty.
        index: Format of the rows of the search indexes.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: OnlineStore,
        histories: Histories,
        rows: RowReader,
        *,
        deltas: str | None = None,
        index: RowKind = "float32",
    ) -> None:
        self._bundle, self._store, self._histories, self._outlasts = bundle, store, histories, rows.outlasts_store
        self.catalogue = Catalogue(bundle)
        self._published = len(self.catalogue.item_ids)
        self.default_item = self.catalogue.add_default_item()
        items = bundle.dataset.items
        filterable = items.filterable if items is not None else ()
        featured = (*items.categorical_features, *items.numeric_features) if items is not None else ()
        kept = items.attributes if items is not None else ()
        self._attributes = tuple(dict.fromkeys((*featured, *filterable, *kept)))
        self.meaning = Meaning(bundle.concepts, bundle.id)
        named = self.meaning.with_columns(bundle.items, self.catalogue.vectors[: bundle.items.height])
        of_csv = "item" in csv_sources(bundle.dataset)
        policies = bundle.dataset.policies.values()
        self._counts_positives = any(policy.new is not None for policy in policies)
        counted = (POSITIVES,) if self._counts_positives else ()
        self.attributes = Attributes(named, (*filterable, *self.meaning.filterable, *counted), of_csv=of_csv)
        compared = any(policy.diversity is not None and policy.diversity.by == "semantic-id" for policy in policies)
        self.codes = ItemCodes(bundle.items["semantic_codes"]) if compared else None
        aspects = {
            name: (aspect, bundle.items.select(aspect.columns).to_dicts()) for name, aspect in bundle.aspects.items()
        }
        self.retriever = Retriever(self.catalogue, self.attributes, bundle.views, aspects, kind=index)
        self.towers = (
            TowerIndex(bundle, bundle.towers, self.catalogue, self.attributes, rows, kind=index)
            if bundle.towers is not None
            else None
        )
        self._words = _published_words(bundle)
        self.texts = TextSearch(self.retriever, self._words, self.attributes, by_vector=bundle.reads_text)
        # Cursors of `refresh`.
        self._items = Feed(store, bundle.id, record.ITEM)
        self._admissions = Feed(store, bundle.id, record.ADMITTED)
        self._forgotten = Feed(store, bundle.id, record.FORGOTTEN)
        self.lock = ReadWriteLock()
        self.unreadable: set[str] = set()
        self._deltas = deltas
        self.position: Offsets = ()

    @property
    def index_bytes(self) -> dict[str, int]:
        """Bytes of each search index in memory, by the name of the view, the aspect, the channel or the source."""
        towers = {} if self.towers is None else {TOWERS: self.towers.size_bytes}
        return self.retriever.size_bytes | self.texts.size_bytes | towers

    @property
    def size(self) -> int:
        """Number of items that can be ranked."""
        return len(self.catalogue.item_numbers) - len(self.catalogue.deleted)

    def refresh(self) -> int:
        """Applies the stream's changes of items, admissions and users since the last call.

        Returns the number of items. One call runs at a time.

        Raises:
            StoreError: The store does not answer.
        """
        position = position_of(self._store, self._bundle.id, self._deltas) if self._deltas is not None else None
        for chunk in self._admissions.read():
            for _, payload in chunk:
                keys = record.decode_admitted(payload)
                with self.lock.writing():
                    self.catalogue.admission.admit(keys)
        for chunk in self._forgotten.read():
            self._forget(chunk)
        count = 0
        for chunk in self._items.read():
            count += len(chunk)
            for start in range(0, len(chunk), _AT_ONCE):
                self._apply(dict(chunk[start : start + _AT_ONCE]))
        self.position = position or ()
        return count

    def number(self, item: str) -> int:
        """Returns the number of an item. An unknown or deleted item has the number of the item without values."""
        known = item not in self.catalogue.deleted
        return self.catalogue.item_numbers.get(item, self.default_item) if known else self.default_item

    def numbers(self, items: Sequence[str]) -> NDArray[np.int64]:
        """Returns the numbers (N,) of items, as `number` does."""
        return np.array([self.number(name) for name in items], dtype=np.int64)

    def names(self, numbers: NDArray[np.int64]) -> list[str]:
        """Returns the ids of items by number (N,)."""
        return [self.catalogue.item_ids[number] for number in numbers.tolist()]

    def visited(self, stored: bytes | record.HistoryRecord | None) -> NDArray[np.int64]:
        """Returns the numbers of the last items of a stored history that are in the catalogue, oldest first."""
        numbers = self.catalogue.item_numbers
        decoded = record.decode_history(stored) if isinstance(stored, bytes) else stored
        visited = decoded.items if decoded else []
        liked = [numbers[name] for name in visited if name in numbers][-self._bundle.schema.history_length :]
        return np.array(liked, dtype=np.int64)

    def learn(self, names: Sequence[str]) -> None:
        """Reads items that the catalogue lacks from the store, since the stream may have added them meanwhile.

        Raises:
            StoreError: The store does not answer, and reads do not outlast the store.
        """
        unknown = [name for name in names if name not in self.catalogue.item_numbers]
        if not unknown or self._histories.unavailable:
            return
        try:
            payloads = self._store.read_records(self._bundle.id, record.ITEM, unknown)
            self._apply({name: data for name, data in zip(unknown, payloads, strict=True) if data is not None})
        except StoreError:
            if not self._outlasts:
                raise

    def declared(self, names: Sequence[str]) -> list[Mapping[str, Any]]:
        """Returns the columns of items as the store or the bundle has them, the store first.

        While the store is away, a server that answers without it reads the bundle alone.
        """
        found: list[Mapping[str, Any]] = []
        try:
            records = self._store.read_records(self._bundle.id, record.ITEM, names)
        except StoreError:
            if not self._outlasts:
                raise
            records = [None] * len(names)
        for name, data in zip(names, records, strict=True):
            number = self.catalogue.item_numbers.get(name, self._published)
            published = self._bundle.items.row(number, named=True) if number < self._published else {}
            stored = {} if data in (None, record.TOMBSTONE) else record.decode_item(data).features
            found.append(published if data is None else stored)
        return found

    def view(self, name: str) -> ItemView | None:
        """Returns an item as the store or the bundle has it, the store first. None if it is unknown or deleted."""
        stored = self._store.read_records(self._bundle.id, record.ITEM, [name])[0]
        if stored is not None:
            if stored == record.TOMBSTONE:
                return None
            return stored_view(self._bundle.id, name, record.decode_item(stored), self._attributes)
        number = self.catalogue.item_numbers.get(name)
        if number is None or number >= self._published or name in self.catalogue.deleted:
            return None
        return published_view(self._bundle, number, self._attributes)

    def _forget(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Removes forgotten users from the catalogue, and what the server remembers of them."""
        if not records:
            return
        users = ForgottenUsers()
        for name, payload in records:
            forgotten = record.decode_forgotten_record(payload)
            users.add(Forgotten(name, forgotten.salt, forgotten.at_us))
        # The catalogue of a server has the published users alone.
        names = users.named(list(self.catalogue.user_numbers))
        published = {*self._bundle.history["user_id"].to_list(), *self._bundle.labelled["user_id"].to_list()}
        self._histories.forget(list({*names, *users.named([*(published | {*self._histories.remembered()})])}))
        with self.lock.writing():
            self.catalogue.forget_users(names)

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
        self.catalogue.check_models(items)
        by_towers = None if self.towers is None else self.towers.vectors_of(list(payloads), items)
        with self.lock.writing():
            self.catalogue.put_items(items)
            self.catalogue.remove_items([name for name in payloads if name not in items])
            numbers = [self.catalogue.item_numbers[name] for name in payloads]
            changed = np.array(numbers, dtype=np.int64)
            rows = [items[name].features if name in items else {} for name in payloads]
            meant = self.meaning.columns(self.catalogue.vectors[changed], rows)
            counted = [self._positives(name) if name in items else {} for name in payloads]
            self.retriever.update(
                numbers, [row | more | own for row, more, own in zip(rows, meant, counted, strict=True)]
            )
            if self.towers is not None and by_towers is not None:
                self.towers.put(changed, by_towers)
            if self.codes is not None:
                self.codes.put(changed, [items[name].codes if name in items else [] for name in payloads])
            if self._words is not None:
                terms = [unpack_terms(items[name].terms if name in items else b"") for name in payloads]
                self._words.put(changed, terms)

    def _positives(self, item: str) -> dict[str, int]:
        """Returns the number of an item's positive events in training, as an attribute for a floor of new items."""
        if not self._counts_positives:
            return {}
        number = self.catalogue.item_numbers[item]
        return {POSITIVES: int(self.catalogue.popularity[number]) if number < self._published else 0}


def _published_words(bundle: Bundle) -> WordIndex | None:
    """Returns the index of the published texts' words; None if the items have no text."""
    if bundle.manifest.encoder is None or not bundle.dataset.has_text or "text" not in bundle.items.columns:
        return None
    return WordIndex(term_ids(text or "") for text in bundle.items["text"])
