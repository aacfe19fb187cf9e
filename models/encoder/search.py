"""Text queries whose right answer is known, and the share of them that a search answers.

A query is a phrase of an item's own text. The words of the item's title are taken out of both, or the title alone would
answer it.

Shape letters: N items, D dim, n queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import Encoder
from features.content.lexical import LexicalIndex, fuse
from features.content.terms import tokens
from models.encoder.measure import nearest

_LEAST_TERMS = 3
FOUND = 10
"""Places of a list in which the right item counts as found."""
_DEPTH = 100


@dataclass(frozen=True)
class PhraseQueries:
    """Queries and the texts to search.

    Attributes:
        phrases: n queries.
        item: (n,) int64 item that each query is a phrase of.
        texts: N texts without the words of the titles.
    """

    phrases: tuple[str, ...]
    item: NDArray[np.int64]
    texts: tuple[str, ...]


def phrase_queries(texts: Sequence[str], asked: NDArray[np.integer], *, words: int = 6, seed: int = 0) -> PhraseQueries:
    """Draws a phrase from the text of each asked item.

    The title is the first line of a text; a text without a second line is not asked. A phrase lies in the longest line.

    Args:
        texts: N texts.
        asked: (m,) items to ask for.
        words: Words of a phrase.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng([seed, 9])
    plain = [without_title(text) for text in texts]
    phrases, items = [], []
    for row in np.asarray(asked).tolist():
        longest = max(plain[row].split("\n"), key=len, default="").split()
        if "\n" not in texts[row] or len(longest) < words:
            continue
        start = int(rng.integers(len(longest) - words + 1))
        phrase = " ".join(longest[start : start + words])
        if len(tokens(phrase)) >= _LEAST_TERMS:
            phrases.append(phrase)
            items.append(row)
    return PhraseQueries(tuple(phrases), np.array(items, dtype=np.int64), tuple(plain))


def without_title(text: str) -> str:
    """Returns the lines below the title, without the title's terms."""
    title, _, rest = text.partition("\n")
    terms = set(tokens(title))
    if not terms:
        return rest
    return "\n".join(
        " ".join(word for word in line.split() if terms.isdisjoint(tokens(word))) for line in rest.split("\n")
    )


Channel = Callable[[Sequence[str]], list[NDArray[np.int64]]]
"""Search of queries: returns the items of each, best first."""


def by_vectors(encoder: Encoder, texts: Sequence[str], depth: int = _DEPTH) -> Channel:
    """Returns the channel of an encoder's vectors."""
    return by_matrix(encoder, encoder.encode(texts), depth)


def by_matrix(encoder: Encoder, vectors: NDArray[np.float32], depth: int = _DEPTH) -> Channel:
    """Returns the channel of an encoder whose vectors (N, D) of the texts are known."""
    among = np.any(vectors, axis=1)

    def search(phrases: Sequence[str]) -> list[NDArray[np.int64]]:
        return list(nearest(encoder.encode(phrases), vectors, among, depth))

    return search


def by_words(texts: Sequence[str], depth: int = _DEPTH) -> Channel:
    """Returns the lexical channel."""
    index = LexicalIndex(texts)
    return lambda phrases: [index.search(phrase, depth) for phrase in phrases]


def fused(channels: Sequence[Channel], depth: int = _DEPTH, weights: Sequence[float] = ()) -> Channel:
    """Returns the channel of several channels' lists, fused by reciprocal ranks; see `fuse_scores`."""

    def search(phrases: Sequence[str]) -> list[NDArray[np.int64]]:
        each = [channel(phrases) for channel in channels]
        return [fuse(lists, depth, weights) for lists in zip(*each, strict=True)]

    return search


def by_best_chunk(encoder: Encoder, chunks: NDArray[np.float32], of: NDArray[np.int64]) -> Channel:
    """Returns the channel that places a text by its best chunk.

    Args:
        encoder: Encoder of the queries.
        chunks: (M, D) unit vectors of the chunks.
        of: (M,) text of each chunk.
    """
    by_chunk = by_matrix(encoder, chunks, len(chunks))

    def search(phrases: Sequence[str]) -> list[NDArray[np.int64]]:
        # The first chunk of a text in a list is its best.
        return [of[found][np.sort(np.unique(of[found], return_index=True)[1])] for found in by_chunk(phrases)]

    return search


def hit_rate(channel: Channel, queries: PhraseQueries, count: int = FOUND) -> float:
    """Returns the share of the queries whose item is among the first `count`."""
    found = hits(channel, queries, count)
    return float(found.mean()) if len(found) else 0.0


def hits(channel: Channel, queries: PhraseQueries, count: int = FOUND) -> NDArray[np.float64]:
    """Returns 1 for each query (n,) whose item is among the first `count`, and 0 for the others."""
    lists = channel(queries.phrases)
    found = [item in rows[:count] for item, rows in zip(queries.item.tolist(), lists, strict=True)]
    return np.array(found, dtype=np.float64)


def reciprocal_rank(channel: Channel, queries: PhraseQueries) -> float:
    """Returns the mean of 1 / rank of each query's item, 0 where the channel does not find the item."""
    found = reciprocal_ranks(channel, queries)
    return float(found.mean()) if len(found) else 0.0


def reciprocal_ranks(channel: Channel, queries: PhraseQueries) -> NDArray[np.float64]:
    """Returns 1 / rank of each query's item, (n,); 0 where the channel does not find the item."""
    ranks = [np.flatnonzero(found == item) for item, found in zip(queries.item, channel(queries.phrases), strict=True)]
    return np.array([1 / (1 + place[0]) if len(place) else 0.0 for place in ranks], dtype=np.float64)
