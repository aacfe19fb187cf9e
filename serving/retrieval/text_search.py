"""Text search by two channels: the vectors of a view, and the words of the items' texts.

Each channel orders items by scores of its own, and no score of one is compared with a score of the other. The lists
are fused by reciprocal ranks: Cormack et al., "Reciprocal Rank Fusion" (SIGIR 2009), equation 1, with k = 60. The
lexical list weighs ten times as much, with which the fused list finds as many phrases as BM25 alone.

Shape letters: D dim, k items.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from features import tracing as trace
from features.content.chain import BASE
from features.content.lexical import LEXICAL_WEIGHT, fuse_scores, term_ids
from features.value.filter import Filter
from serving.retrieval.filter import Attributes
from serving.retrieval.retriever import Retriever
from serving.retrieval.rows import Floats, Ints
from serving.retrieval.search_plan import SearchPlan
from serving.retrieval.words import WordIndex

CONTENT, LEXICAL = "content", "lexical"
CHANNELS = (CONTENT, LEXICAL)
"""Names of the channels."""
DEPTH = 100
"""Fewest items of each list that are fused."""


@dataclass(frozen=True)
class Hits:
    """Items found, best first.

    Attributes:
        numbers: (n,) items.
        scores: (n,) cosine of the content channel alone, BM25 of the lexical channel alone, or the sums of
            weighed reciprocal ranks of both.
        plan: Plan of the content channel, or of the words if vectors found nothing.
        ranks: Rank of each item in the list of each channel that found it, from 1, by channel.
    """

    numbers: Ints
    scores: Floats
    plan: SearchPlan
    ranks: Sequence[dict[str, int]] = field(default=())


class TextSearch:
    """Searches items by a text.

    Args:
        retriever: Searches by vectors.
        words: Searches by words; None if the items have no text.
        attributes: Attributes of the items, for filters.
        by_vector: True if the bundle's encoder reads texts; False if the items bring their vectors.
    """

    def __init__(
        self, retriever: Retriever, words: WordIndex | None, attributes: Attributes, *, by_vector: bool = True
    ) -> None:
        self._retriever, self._words, self._attributes = retriever, words, attributes
        self._by_vector = by_vector

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels that the items have."""
        content = (CONTENT,) if self._by_vector else ()
        return content if self._words is None else (*content, LEXICAL)

    @property
    def size_bytes(self) -> dict[str, int]:
        """Bytes of the index of words, by the name of its channel; empty without that channel."""
        return {} if self._words is None else {LEXICAL: self._words.size_bytes}

    def search(
        self,
        text: str,
        vector: Floats | None,
        k: int,
        wanted: Filter | None,
        *,
        channels: Sequence[str],
        view: str = BASE,
    ) -> Hits:
        """Returns the k best items for a text.

        Args:
            text: The query.
            vector: (D,) base vector of the query, for the content channel.
            k: Number of items.
            wanted: Filter that the items must match.
            channels: Names of the channels, one at least.
            view: View in which the content channel compares.
        """
        if LEXICAL not in channels or self._words is None:
            return _alone(CONTENT, *self._retriever.search(vector, k, wanted, view=view))
        depth = max(k, DEPTH)
        judge = None if wanted is None else lambda numbers: self._attributes.matches(wanted, numbers)
        with trace.span("words"):
            by_words, scores = self._words.search(term_ids(text), depth, judge)
        words_plan = SearchPlan("words", len(by_words) / max(self._words.size, 1), len(by_words))
        if CONTENT not in channels:
            return _alone(LEXICAL, by_words[:k], scores[:k].astype(np.float32), words_plan)
        by_vector, cosines, plan = self._retriever.search(vector, depth, wanted, view=view)
        if plan.method == "popular":
            # The most popular items answer no text; they are the fallback of a text that finds nothing.
            if not len(by_words):
                return Hits(by_vector[:k], cosines[:k], plan, [{} for _ in by_vector[:k]])
            by_vector, plan = by_vector[:0], words_plan
        numbers, sums = fuse_scores([by_vector, by_words], k, [1.0, LEXICAL_WEIGHT])
        ranks = [_places(CONTENT, by_vector), _places(LEXICAL, by_words)]
        found = [{name: place[number] for name, place in ranks if number in place} for number in numbers.tolist()]
        return Hits(numbers, sums.astype(np.float32), plan, found)


def _alone(channel: str, numbers: Ints, scores: Floats, plan: SearchPlan) -> Hits:
    ranked = plan.method != "popular"
    return Hits(numbers, scores, plan, [{channel: rank} if ranked else {} for rank in range(1, len(numbers) + 1)])


def _places(channel: str, numbers: Ints) -> tuple[str, dict[int, int]]:
    return channel, {number: rank for rank, number in enumerate(numbers.tolist(), 1)}
