"""Queries hold no word of their title, and a channel is judged by the item that a query was drawn from."""

import numpy as np

from features.content import lsa
from features.content.terms import tokens
from models.encoder.search import (
    PhraseQueries,
    by_vectors,
    by_words,
    fused,
    hit_rate,
    phrase_queries,
    reciprocal_rank,
)

NOUNS = ("robot", "ocean", "garden", "murder", "kitchen", "horse", "music", "war", "river", "engine", "castle", "king")
DRAWS = np.random.default_rng(0).integers(0, 12, (60, 14))
TEXTS = [f"{NOUNS[row % 12]} {row}\nshort\n" + " ".join(NOUNS[one] for one in own) for row, own in enumerate(DRAWS)]


def test_no_query_and_no_text_holds_a_word_of_the_items_title() -> None:
    queries = phrase_queries(TEXTS, np.arange(60), words=5)
    assert len(queries.phrases) > 50
    for phrase, item in zip(queries.phrases, queries.item, strict=True):
        title = TEXTS[item].split("\n")[0]
        assert not set(tokens(phrase)) & set(tokens(title))
        assert not set(tokens(queries.texts[item])) & set(tokens(title))
        assert phrase in queries.texts[item]
    again = phrase_queries(TEXTS, np.arange(60), words=5)
    assert again.phrases == queries.phrases
    assert phrase_queries(TEXTS, np.arange(60), words=5, seed=1).phrases != queries.phrases


def test_texts_without_a_body_are_not_asked() -> None:
    assert phrase_queries(["only a title", "", "title\nshort"], np.arange(3)).phrases == ()


def test_a_lost_channel_finds_less_and_fusion_keeps_what_one_channel_finds() -> None:
    queries = phrase_queries(TEXTS, np.arange(60), words=5)
    words = by_words(queries.texts)
    vectors = by_vectors(lsa.fit(list(queries.texts), dim=8, seed=0), queries.texts)
    found = {name: hit_rate(channel, queries) for name, channel in (("words", words), ("vectors", vectors))}
    assert 0 < found["vectors"] <= found["words"]
    assert hit_rate(fused([words, vectors]), queries) >= found["vectors"]
    assert hit_rate(lambda phrases: [np.arange(10)[::-1] for _ in phrases], queries) < 0.5


def test_the_rank_of_the_right_item_decides() -> None:
    queries = PhraseQueries(("a", "b", "c"), np.array([4, 5, 6]), ())

    def channel(phrases: object) -> list[np.ndarray]:
        return [np.array([4, 1]), np.array([1, 5]), np.array([1, 2])]

    assert reciprocal_rank(channel, queries) == (1 + 0.5 + 0) / 3
    assert hit_rate(channel, queries, 1) == 1 / 3
