"""Tasks on the texts of items: search by a phrase, and by a passage beyond the first words of a long text.

Shape letters: N items, n queries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import Encoder
from features.content.passages import passages
from models.encoder.search import (
    Channel,
    PhraseQueries,
    by_best_chunk,
    by_matrix,
    by_words,
    fused,
    hits,
    phrase_queries,
    reciprocal_ranks,
    without_title,
)

Scores = NDArray[np.float64]
_SEARCHED, _LONG = 2_000, 300
_SKIPPED_WORDS, _QUERY_WORDS, _CHUNK_WORDS = 40, 12, 40
CHANCE = "random order"
"""Name of the control of both tasks."""


class TextTasks:
    """Queries on texts, drawn once for all encoders.

    Args:
        texts: N texts.
        seed: Seed of the draws.
    """

    def __init__(self, texts: Sequence[str], seed: int = 0) -> None:
        filled = [row for row, text in enumerate(texts) if text.strip()]
        order = np.random.default_rng([seed, 15]).permutation(filled).astype(np.int64)
        chosen = [texts[row] for row in np.sort(order[:_SEARCHED])]
        self.phrases = phrase_queries(chosen, np.arange(len(chosen)), seed=seed)
        self.windows = _windows([texts[row] for row in order], seed)

    def scores(self, encoder: Encoder) -> dict[str, Scores]:
        """Returns the scores of the queries of each task, (n,), by measure, for the vectors alone."""
        found = {"search": np.empty(0), "passages": np.empty(0)}
        if self.phrases.phrases:
            found["search"] = hits(by_matrix(encoder, encoder.encode(self.phrases.texts)), self.phrases)
        if self.windows.phrases:
            found["passages"] = reciprocal_ranks(by_matrix(encoder, encoder.encode(self.windows.texts)), self.windows)
        return found

    def search(self, encoder: Encoder) -> dict[str, Scores]:
        """Returns whether each phrase finds its item, (n,), by channel."""
        if not self.phrases.phrases:
            return {}
        vectors = by_matrix(encoder, encoder.encode(self.phrases.texts))
        words = by_words(self.phrases.texts)
        channels: dict[str, Channel] = {"vectors": vectors, "BM25": words, "fused": fused([vectors, words])}
        found = {name: hits(channel, self.phrases) for name, channel in channels.items()}
        return found | {CHANCE: np.full(len(self.phrases.phrases), min(1.0, 10 / len(self.phrases.texts)))}

    def passages(self, encoder: Encoder) -> dict[str, Scores]:
        """Returns the reciprocal rank of each window's item, (n,), by the way that the texts are encoded."""
        queries = self.windows
        if not queries.phrases:
            return {}
        chunks = [passages(text, _CHUNK_WORDS) for text in queries.texts]
        of = np.repeat(np.arange(len(chunks)), [len(parts) for parts in chunks])
        each = encoder.encode([part for parts in chunks for part in parts])
        ways: dict[str, Channel] = {
            "whole text": by_matrix(encoder, encoder.encode(queries.texts)),
            "best passage": by_best_chunk(encoder, each, of),
            "BM25": by_words(queries.texts),
        }
        found = {name: reciprocal_ranks(channel, queries) for name, channel in ways.items()}
        chance = float(np.mean(1 / np.arange(1, len(queries.texts) + 1)))
        return found | {CHANCE: np.full(len(queries.phrases), chance)}


class _Window(NamedTuple):
    text: str
    phrase: str


def _windows(texts: Sequence[str], seed: int) -> PhraseQueries:
    """Returns a window of words behind the first 40 of each long text, without the words of the title."""
    rng = np.random.default_rng([seed, 13])
    found: list[_Window] = []
    for text in texts:
        plain = (without_title(text) if "\n" in text else text).replace("\n", ". ")
        words = plain.split()
        if len(words) < _SKIPPED_WORDS + 2 * _QUERY_WORDS:
            continue
        start = int(rng.integers(_SKIPPED_WORDS, len(words) - _QUERY_WORDS))
        found.append(_Window(plain, " ".join(words[start : start + _QUERY_WORDS])))
        if len(found) == _LONG:
            break
    rows = np.arange(len(found), dtype=np.int64)
    return PhraseQueries(tuple(one.phrase for one in found), rows, tuple(one.text for one in found))
