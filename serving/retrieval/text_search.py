"""Text search by two channels: the vectors of a view, and the words of the items' texts.

Each channel is a list with scores of its own. The lists are fused by their ranks, see `serving.retrieval.fusion`. The
lexical list weighs ten times as much, with which the fused list finds as many phrases as BM25 alone.

Shape letters: D dim, k items.
"""

from collections.abc import Sequence

import numpy as np

from features import tracing as trace
from features.content.chain import BASE
from features.content.lexical import LEXICAL_WEIGHT, term_ids
from features.value.filter import Filter
from serving.retrieval.filter import Attributes
from serving.retrieval.fusion import DEPTH, Hits, RankedList, fuse_lists
from serving.retrieval.retriever import Retriever
from serving.retrieval.rows import Floats
from serving.retrieval.search_plan import SearchPlan
from serving.retrieval.words import WordIndex

CONTENT, LEXICAL = "content", "lexical"
CHANNELS = (CONTENT, LEXICAL)
"""Names of the channels."""


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
        by_words = LEXICAL in channels and self._words is not None
        depth = max(k, DEPTH) if by_words and CONTENT in channels else k
        lists = []
        if CONTENT in channels or not by_words:
            lists.append(RankedList(CONTENT, *self._retriever.search(vector, depth, wanted, view=view)))
        if by_words:
            lists.append(self._by_words(text, depth, wanted))
        return fuse_lists(lists, k)

    def _by_words(self, text: str, depth: int, wanted: Filter | None) -> RankedList:
        assert self._words is not None
        judge = None if wanted is None else lambda numbers: self._attributes.matches(wanted, numbers)
        with trace.span("words"):
            numbers, scores = self._words.search(term_ids(text), max(depth, DEPTH), judge)
        plan = SearchPlan("words", len(numbers) / max(self._words.size, 1), len(numbers))
        return RankedList(LEXICAL, numbers, scores.astype(np.float32), plan, LEXICAL_WEIGHT)
