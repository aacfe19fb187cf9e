"""Candidates by content: the items nearest to an item, to a user's liked items, or to a text, that match a filter.

The retriever follows the catalogue: new, changed and deleted items take effect at once. Without anything to search by,
the most popular items of training are the fallback.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from features import tracing as trace
from features.content.chain import BASE, View
from features.content.encoder import unit
from features.value.filter import Filter
from models.bundle.catalogue import Catalogue
from models.encoder.meaning.aspects import Aspect
from models.table.column_rows import Growable
from serving.retrieval.filter import Attributes
from serving.retrieval.index import VectorIndex
from serving.retrieval.matches import Matches
from serving.retrieval.rows import Floats, Ints, RowKind
from serving.retrieval.search_plan import POPULAR, SearchPlan

_LOGGER = logging.getLogger(__name__)
_REMEMBERED = 128
# Vectors that a new index copies while puts are blocked.
_AT_ONCE = 64
# Changes that are kept for filters to evaluate: this many, or as many as there are items.
_LEAST_CHANGES = 4_096


class Searcher:
    """Vectors and attributes by number, searched for the nearest that match a filter.

    Matches of a filter are remembered, since the same filters recur. When items change, a remembered filter evaluates
    only those items at its next use.

    Args:
        vectors: (N, D) float32; a zero row is not found.
        attributes: Attributes of the same numbers. Several searchers may share them.
        kind: Format of the index's rows.
    """

    def __init__(self, vectors: Floats, attributes: Attributes, *, kind: RowKind = "float32") -> None:
        self.attributes = attributes
        self.index = VectorIndex(vectors, kind=kind)
        self._lock = threading.Lock()
        # By filter: its matches, and the number of changes after which they were counted.
        self._remembered: OrderedDict[str, tuple[Matches, int]] = OrderedDict()
        self._changed = Growable(np.zeros(0, dtype=np.int64))
        self._putting = threading.Lock()
        # Numbers that were put while a new index is built beside this one.
        self._meanwhile: list[Ints] | None = None
        self._builder: threading.Thread | None = None

    def put(self, numbers: Ints, vectors: Floats, rows: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Adds numbers (M,) with vectors (M, D), or changes existing ones.

        Args:
            rows: M rows of attributes; None if another searcher has put them.
        """
        if rows is not None:
            self.attributes.put(numbers.tolist(), rows)
        with self._putting:
            self.index.put(numbers, vectors)
            if self._meanwhile is not None:
                self._meanwhile.append(numbers)
            elif self.index.outgrown:
                self._meanwhile = []
                self._builder = threading.Thread(target=self._rebuild, args=(self.index,), name="index", daemon=True)
                self._builder.start()
        with self._lock:
            self._changed.extend(numbers)
            if len(self._changed.array) > max(_LEAST_CHANGES, self.index.rows):
                self._changed = Growable(np.zeros(0, dtype=np.int64))
                self._remembered.clear()

    def settle(self) -> None:
        """Waits for an index that is being built."""
        if (builder := self._builder) is not None:
            builder.join()

    def _rebuild(self, index: VectorIndex) -> None:
        """Builds an index of the present vectors beside the one that answers, brings it up to date, and swaps."""
        try:
            fresh = index.rebuilt()
            while True:
                with self._putting:
                    changed = np.unique(np.concatenate([np.zeros(0, np.int64), *(self._meanwhile or ())]))
                    self._meanwhile = []
                    if len(changed) <= _AT_ONCE:
                        fresh.put(changed, index.vectors(changed))
                        self.index, self._meanwhile = fresh, None
                        return
                for start in range(0, len(changed), _AT_ONCE):
                    part = changed[start : start + _AT_ONCE]
                    fresh.put(part, index.vectors(part))
        except Exception:
            # The edge of a thread: the existing index continues, and the next put tries again.
            _LOGGER.exception("a new index could not be built")
            with self._putting:
                self._meanwhile = None

    def forget(self) -> None:
        """Removes remembered matches of filters; the next search evaluates all items again."""
        with self._lock:
            self._remembered.clear()

    def search(self, query: Floats, k: int, wanted: Filter | None = None) -> tuple[Ints, Floats, SearchPlan]:
        """Returns the k nearest to a query (D,), best first.

        The results are numbers (≤ k,), inner products (≤ k,), and the plan.

        Raises:
            EventError: The filter does not fit the columns.
        """
        index = self.index
        if wanted is None:
            return index.search(query, k)
        matches = self._known_matches(index, wanted)
        if matches is None:
            share = self.attributes.share(wanted)
            result = index.search_after(query, k, share, lambda numbers: self.attributes.matches(wanted, numbers))
            if result is not None:
                return result
            with self._lock:
                changes = self._changed
                after = len(changes.array)
            matches = index.matches(self.attributes.mask(wanted, index.rows))
            self._remember(wanted, matches, changes, after)
        return index.search(query, k, matches)

    def _known_matches(self, index: VectorIndex, wanted: Filter) -> Matches | None:
        """Returns the remembered matches of a filter, after items that changed since are evaluated again."""
        with self._lock:
            known = self._remembered.get(wanted.key)
            if known is None:
                return None
            self._remembered.move_to_end(wanted.key)
            matches, after = known
            changes = self._changed
            changed, now = np.unique(changes.array[after:]), len(changes.array)
        if len(changed):
            matches = index.rejudged(matches, changed, self.attributes.matches(wanted, changed))
            self._remember(wanted, matches, changes, now)
        return matches

    def _remember(self, wanted: Filter, matches: Matches, changes: Growable[np.int64], after: int) -> None:
        with self._lock:
            if changes is not self._changed:
                return
            self._remembered[wanted.key] = matches, after
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)


class Retriever:
    """Retriever of a catalogue's items, by their numbers.

    Each view and each aspect has an index of its own, since vectors of two spaces must never be compared.

    Args:
        catalogue: Catalogue of the items; its changes are passed to `update`.
        attributes: Attributes that filters evaluate.
        views: Views of the catalogue's vectors by name, beside the base space.
        aspects: Aspects by name, each with the columns of the catalogue's items, in the order of their numbers.
        kind: Format of the indexes' rows.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        attributes: Attributes,
        views: Mapping[str, View] | None = None,
        aspects: Mapping[str, tuple[Aspect, Sequence[Mapping[str, Any]]]] | None = None,
        *,
        kind: RowKind = "float32",
    ) -> None:
        self._aspects = {name: aspect for name, (aspect, _) in (aspects or {}).items()}
        self._in_aspect = {
            name: Searcher(aspect.of(catalogue.vectors[: len(rows)], rows), attributes, kind=kind)
            for name, (aspect, rows) in (aspects or {}).items()
        }
        self._catalogue = catalogue
        self._popular = np.argsort(-catalogue.popularity, kind="stable")
        self._attributes = attributes
        self._views = dict(views or {})
        self._searchers = {BASE: Searcher(catalogue.vectors, attributes, kind=kind)} | {
            name: Searcher(view.of(catalogue.vectors), attributes, kind=kind) for name, view in self._views.items()
        }
        self._deleted = np.zeros(0, dtype=np.int64)

    def update(self, numbers: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Applies changes of the catalogue: items by number, and their attributes, empty for a deleted item."""
        changed = np.array(numbers, dtype=np.int64)
        vectors = self._catalogue.vectors[changed]
        for name, searcher in self._searchers.items():
            searcher.put(changed, self._seen(vectors, name), rows if name == BASE else None)
        for name, searcher in self._in_aspect.items():
            searcher.put(changed, self._aspects[name].of(vectors, rows))
        deleted = sorted(self._catalogue.item_numbers[name] for name in self._catalogue.deleted)
        self._deleted = np.array(deleted, dtype=np.int64)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views, the base space first."""
        return tuple(self._searchers)

    def search(
        self,
        query: Floats | None,
        k: int,
        wanted: Filter | None = None,
        *,
        without: Ints | None = None,
        view: str = BASE,
    ) -> tuple[Ints, Floats, SearchPlan]:
        """Returns the k nearest items to a query (D,), best first; see `Searcher.search`.

        Args:
            query: Unit vector of the base space; for None or zero the most popular items are returned, with the score
                0.
            wanted: Filter that the items must match.
            without: Numbers to exclude.
            view: Space in which query and items are compared, one of `views`.
        """
        with trace.span("retrieve", k=k) as span:
            numbers, scores, plan = self._search(
                query, k, wanted, np.zeros(0, np.int64) if without is None else without, view
            )
            span.note(plan=plan.method)
            return numbers, scores, plan

    @property
    def size_bytes(self) -> dict[str, int]:
        """Bytes of each index, by the name of its view or aspect."""
        return {name: one.index.size_bytes for name, one in (self._searchers | self._in_aspect).items()}

    @property
    def aspects(self) -> tuple[str, ...]:
        """Names of the aspects."""
        return tuple(self._aspects)

    def search_aspect(
        self, aspect: str, asked: Floats | Ints, k: int, wanted: Filter | None = None, *, without: Ints
    ) -> tuple[Ints, Floats, SearchPlan]:
        """Returns the k items nearest in an aspect, as `search` does.

        Args:
            aspect: One of `aspects`.
            asked: Numbers of items, which ask by the mean of their vectors in the aspect, or a base vector (D,).
            k: Number of items.
            wanted: Filter that the items must match.
            without: Numbers to exclude.
        """
        searcher = self._in_aspect[aspect]
        if asked.dtype == np.float32:
            query = self._aspects[aspect].head.of(np.asarray(asked, dtype=np.float32)[None])[0]
        else:
            query = unit(searcher.index.vectors(np.asarray(asked, dtype=np.int64)).sum(axis=0, keepdims=True))[0]
        return self.search_in(searcher, query, k, wanted, without)

    def _search(
        self, query: Floats | None, k: int, wanted: Filter | None, excluded: Ints, view: str
    ) -> tuple[Ints, Floats, SearchPlan]:
        searcher = self._searchers[view]
        if query is None or not query.any() or not searcher.index.size:
            return self._most_popular(k, wanted, excluded)
        return self.search_in(searcher, self._seen(query[None], view)[0], k, wanted, excluded)

    def search_in(
        self, searcher: Searcher, query: Floats, k: int, wanted: Filter | None, excluded: Ints
    ) -> tuple[Ints, Floats, SearchPlan]:
        """Returns the k nearest to a query of a searcher's space, as `search` does."""
        if not query.any() or not searcher.index.size:
            return self._most_popular(k, wanted, excluded)
        numbers, scores, plan = searcher.search(query, k + len(excluded), wanted)
        if len(excluded):
            kept = ~np.isin(numbers, excluded)
            numbers, scores = numbers[kept], scores[kept]
        return numbers[:k], scores[:k], plan

    def similar(self, item: int, count: int, view: str = BASE) -> list[tuple[int, float]]:
        """Returns the `count` nearest other items of an item with content, with their cosine similarity in a view."""
        query = self._catalogue.vectors[item]
        if not query.any():
            return []
        numbers, scores, _ = self.search(query, count, without=np.array([item]), view=view)
        return list(zip(numbers.tolist(), scores.tolist(), strict=True))

    def taste(self, history: Ints) -> Floats | None:
        """Returns the direction of the mean vector of some items, (D,); None if there is none."""
        vectors = self._catalogue.vectors
        if not len(history) or not vectors.shape[1]:
            return None
        mean: Floats = vectors[history].mean(axis=0)
        length = float(np.linalg.norm(mean))
        return mean / np.float32(length) if length > 0 else None

    def _seen(self, vectors: Floats, view: str) -> Floats:
        """Returns base vectors (N, D) as a view has them, (N, E)."""
        return vectors if view == BASE else self._views[view].of(vectors)

    def _most_popular(self, k: int, wanted: Filter | None, excluded: Ints) -> tuple[Ints, Floats, SearchPlan]:
        numbers = self._popular[~np.isin(self._popular, np.concatenate([excluded, self._deleted]))]
        if wanted is not None:
            numbers = numbers[self._attributes.matches(wanted, numbers)]
        plan = SearchPlan(POPULAR, len(numbers) / max(len(self._popular), 1), len(numbers))
        return numbers[:k], np.zeros(len(numbers[:k]), dtype=np.float32), plan
