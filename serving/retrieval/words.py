"""The live lexical index: BM25 over the terms of items that the stream adds, changes and deletes.

A score is computed when a query asks, from the counts of that moment. An index that followed a stream therefore gives
the bits of an index built again. A changed item costs its own terms; a query costs the postings of its terms. The bulk
of the postings lies in sorted arrays, six bytes each. Changed items lie in a small dictionary beside them, and a
thread merges both into new arrays when an eighth of the items has changed.

Robertson & Zaragoza, "The Probabilistic Relevance Framework" (2009), with Lucene's idf; the slow twin is
`features.content.lexical.LexicalIndex`.

Shape letters: N items, T terms of a text, V distinct terms, P postings, M found items.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.content.lexical import LENGTH_WEIGHT, SATURATION
from models.table.column_rows import Growable

Ints = NDArray[np.int64]
Terms = NDArray[np.uint32]

_LOGGER = logging.getLogger(__name__)
_LEAST_FRESH, _FRESH_SHARE = 1_024, 8
# Candidates that a filter judges at a time, best first.
_JUDGED = 1_024


@dataclass(frozen=True)
class _Postings:
    """Postings in arrays: terms (V,) ascending, the start of each in numbers (P,) and counts (P,)."""

    terms: Terms
    starts: Ints
    numbers: NDArray[np.int32]
    counts: NDArray[np.uint16]

    @classmethod
    def of(cls, terms: Terms, numbers: NDArray[np.int32], counts: NDArray[np.uint16]) -> "_Postings":
        """Sorts P postings by term, then by item."""
        order = np.lexsort((numbers, terms))
        distinct, starts = np.unique(terms[order], return_index=True)
        return cls(distinct, np.append(starts, len(terms)).astype(np.int64), numbers[order], counts[order])

    def find(self, term: int) -> slice:
        """Returns the postings of a term."""
        place = int(np.searchsorted(self.terms, term))
        known = place < len(self.terms) and int(self.terms[place]) == term
        return slice(int(self.starts[place]), int(self.starts[place + 1])) if known else slice(0, 0)


class WordIndex:
    """BM25 index of items by number. Items may be added, changed and removed during searches.

    Args:
        texts: Terms of the items 0..N-1, as `term_ids` returns them; no term means that no word finds the item.
    """

    def __init__(self, texts: Iterable[Terms]) -> None:
        counted = [_counted(terms) for terms in texts]
        self._lock = threading.Lock()
        self._lengths = Growable(np.array([counts.sum(dtype=np.int64) for _, counts in counted], dtype=np.int64))
        self._base = _postings(enumerate(counted))
        # Items whose postings in the arrays are no longer valid.
        self._stale: Growable[np.bool_] = Growable(np.zeros(len(counted), dtype=bool))
        self._fresh: dict[int, tuple[Terms, NDArray[np.uint16]]] = {}
        self._fresh_of: dict[int, dict[int, int]] = {}
        self._putting = threading.Lock()
        self._changed: set[int] | None = None
        self._builder: threading.Thread | None = None

    @property
    def size(self) -> int:
        """Number of items that words can find."""
        return int(np.count_nonzero(self._lengths.array))

    @property
    def size_bytes(self) -> int:
        """Bytes of the postings in arrays and of the lengths; changed items come on top until they are merged."""
        base = self._base
        return int(base.terms.nbytes + base.starts.nbytes + base.numbers.nbytes + base.counts.nbytes) + int(
            self._lengths.array.nbytes
        )

    def put(self, numbers: Ints, texts: Sequence[Terms]) -> None:
        """Gives items (M,) new terms, or new items their first; an item without terms is no longer found."""
        counted = [_counted(terms) for terms in texts]
        with self._putting:
            with self._lock:
                self._make_room(int(numbers.max(initial=-1)) + 1)
                for number, (terms, counts) in zip(numbers.tolist(), counted, strict=True):
                    self._replace(number, terms, counts)
            if self._changed is not None:
                self._changed.update(numbers.tolist())
            elif len(self._fresh) > max(_LEAST_FRESH, self.size // _FRESH_SHARE):
                self._changed = set()
                self._builder = threading.Thread(target=self._rebuild, name="words", daemon=True)
                self._builder.start()

    def settle(self) -> None:
        """Waits for arrays that are being built."""
        if (builder := self._builder) is not None:
            builder.join()

    def search(
        self,
        query: Terms,
        k: int,
        judge: Callable[[Ints], NDArray[np.bool_]] | None = None,
    ) -> tuple[Ints, NDArray[np.float64]]:
        """Returns the k items with the best scores above 0, best first; equal scores in the order of the numbers.

        Args:
            query: Terms of the query, as `term_ids` returns them; a repeated term counts as often.
            k: Most items to return.
            judge: Returns which items (M,) a filter lets through; None lets all through.

        Returns:
            Numbers (≤ k,) and BM25 scores (≤ k,).
        """
        numbers, scores = self._scored(query)
        order = np.lexsort((numbers, -scores))
        if judge is None:
            return numbers[order[:k]], scores[order[:k]]
        kept: list[Ints] = []
        for start in range(0, len(order), _JUDGED):
            part = order[start : start + _JUDGED]
            kept.append(part[judge(numbers[part])])
            if sum(map(len, kept)) >= k:
                break
        chosen = np.concatenate([np.zeros(0, dtype=np.int64), *kept])[:k]
        return numbers[chosen], scores[chosen]

    def _scored(self, query: Terms) -> tuple[Ints, NDArray[np.float64]]:
        """Returns all items with a score above 0, (M,), and their scores."""
        terms, repeats = np.unique(query, return_counts=True)
        found: list[Ints] = [np.zeros(0, dtype=np.int64)]
        parts: list[NDArray[np.float64]] = [np.zeros(0)]
        with self._lock:
            lengths = self._lengths.array
            size = int(np.count_nonzero(lengths))
            mean = float(lengths.sum()) / max(size, 1)
            for term, repeat in zip(terms.tolist(), repeats.tolist(), strict=True):
                numbers, counts = self._of_term(term)
                weight = np.log1p((size - len(numbers) + 0.5) / (len(numbers) + 0.5))
                norm = SATURATION * (1 - LENGTH_WEIGHT + LENGTH_WEIGHT * lengths[numbers] / mean) if mean else 1.0
                found.append(numbers)
                parts.append(repeat * weight * (counts / (counts + norm)))
        distinct, place = np.unique(np.concatenate(found), return_inverse=True)
        # Sums run in the order of the terms, so they do not depend on where a posting lies.
        sums: NDArray[np.float64] = np.bincount(place, np.concatenate(parts), len(distinct)).astype(np.float64)
        return distinct, sums

    def _of_term(self, term: int) -> tuple[Ints, NDArray[np.float64]]:
        """Returns the items of a term and its counts in them."""
        base = self._base
        where = base.find(term)
        numbers, counts = base.numbers[where].astype(np.int64), base.counts[where].astype(np.float64)
        valid = ~self._stale.array[numbers]
        fresh = self._fresh_of.get(term, {})
        own = np.fromiter(fresh, dtype=np.int64, count=len(fresh))
        own_counts = np.fromiter(fresh.values(), dtype=np.float64, count=len(fresh))
        return np.concatenate([numbers[valid], own]), np.concatenate([counts[valid], own_counts])

    def _make_room(self, size: int) -> None:
        more = size - len(self._lengths.array)
        if more > 0:
            self._lengths.extend(np.zeros(more, dtype=np.int64))
            self._stale.extend(np.ones(more, dtype=bool))

    def _replace(self, number: int, terms: Terms, counts: NDArray[np.uint16]) -> None:
        self._drop_fresh(number)
        self._stale.array[number] = True
        self._lengths.array[number] = counts.sum(dtype=np.int64)
        # An item without terms stays here until the arrays without its postings are built.
        self._fresh[number] = (terms, counts)
        for term, count in zip(terms.tolist(), counts.tolist(), strict=True):
            self._fresh_of.setdefault(term, {})[number] = count

    def _drop_fresh(self, number: int) -> None:
        for term in self._fresh.pop(number, (np.zeros(0, dtype=np.uint32),))[0].tolist():
            of_term = self._fresh_of[term]
            del of_term[number]
            if not of_term:
                del self._fresh_of[term]

    def _rebuild(self) -> None:
        """Merges the changed items into new arrays beside those that answer, and swaps."""
        try:
            with self._lock:
                base, stale, fresh = self._base, self._stale.array.copy(), dict(self._fresh)
            merged = _merged(base, stale, fresh)
            with self._putting:
                again = self._changed or set()
                with self._lock:
                    self._base = merged
                    self._stale.array[np.fromiter(fresh, dtype=np.int64, count=len(fresh))] = False
                    newer = {number: self._fresh[number] for number in again}
                    self._fresh, self._fresh_of = {}, {}
                    for number, (terms, counts) in newer.items():
                        self._replace(number, terms, counts)
                self._changed = None
        except Exception:
            # The edge of a thread: the existing arrays continue, and the next put tries again.
            _LOGGER.exception("new postings could not be built")
            with self._putting:
                self._changed = None


def _counted(terms: Terms) -> tuple[Terms, NDArray[np.uint16]]:
    distinct, counts = np.unique(terms, return_counts=True)
    return distinct.astype(np.uint32), counts.astype(np.uint16)


def _postings(items: Iterable[tuple[int, tuple[Terms, NDArray[np.uint16]]]]) -> _Postings:
    """Returns the postings of items, each a number with its distinct terms and their counts."""
    terms: list[Terms] = [np.zeros(0, dtype=np.uint32)]
    counts: list[NDArray[np.uint16]] = [np.zeros(0, dtype=np.uint16)]
    numbers: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    for number, (own, count) in items:
        terms.append(own)
        counts.append(count)
        numbers.append(np.full(len(own), number, dtype=np.int32))
    return _Postings.of(np.concatenate(terms), np.concatenate(numbers), np.concatenate(counts))


def _merged(
    base: _Postings, stale: NDArray[np.bool_], fresh: Mapping[int, tuple[Terms, NDArray[np.uint16]]]
) -> _Postings:
    valid = ~stale[base.numbers]
    more = _postings(fresh.items())
    terms = np.concatenate([np.repeat(one.terms, np.diff(one.starts)) for one in (base, more)])
    kept = np.concatenate([valid, np.ones(len(more.numbers), dtype=bool)])
    return _Postings.of(
        terms[kept],
        np.concatenate([base.numbers, more.numbers])[kept],
        np.concatenate([base.counts, more.counts])[kept],
    )
