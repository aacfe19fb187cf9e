"""Rows of encoders that read texts: search by phrases, static tables, and passages of long texts."""

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.content import lsa, static
from features.content.encoder import Encoder, unit
from features.content.lexical import LEXICAL_WEIGHT
from features.content.passages import passages
from models.encoder.search import (
    Channel,
    PhraseQueries,
    by_best_chunk,
    by_matrix,
    by_words,
    fused,
    hit_rate,
    phrase_queries,
    reciprocal_rank,
    without_title,
)
from tessera.bench.encoder.shop import LSA, TRANSFORMER, Shop, transformer, transformer_directory

WORDS, THREE, SERVED = "BM25", "three channels", "lsa + BM25 as served"
STATIC, RANDOM_TABLE = "static", "random token table"
TRUNCATED, MEAN_OF_CHUNKS, BEST_CHUNK = "truncated", "mean of chunks", "best chunk"
DRAWN_CHUNK, WHOLE = "drawn chunk", "whole text"
_DIM, _QUERIES = 128, 1_000
_TIMED = 512
_CHUNK_WORDS = 40
_LONG_WORDS, _QUERY_WORDS = 120, 20
_MOST_LONG = 300


def text_search(shop: Shop) -> list[dict[str, Any]]:
    """Returns a row of each channel: hit@10 and MRR of phrases, with the titles' words taken out.

    All items are searched, and every encoder reads the texts without titles.
    """
    asked = np.random.default_rng([shop.seed, 10]).permutation(len(shop.texts))[:_QUERIES]
    queries = phrase_queries(shop.texts, np.sort(asked), seed=shop.seed)
    own = lsa.fit(list(queries.texts), dim=_DIM, seed=shop.seed)
    other = transformer()
    kept = shop.kept("minilm-untitled", lambda: other.encode(queries.texts))
    single: dict[str, Channel] = {
        LSA: by_matrix(own, own.encode(queries.texts)),
        TRANSFORMER: by_matrix(other, kept),
        WORDS: by_words(queries.texts),
    }
    channels = single | {
        f"{LSA} + {WORDS}": fused([single[LSA], single[WORDS]]),
        SERVED: fused([single[LSA], single[WORDS]], weights=[1.0, LEXICAL_WEIGHT]),
        THREE: fused(list(single.values())),
    }
    return [
        {
            "seed": shop.seed,
            "base": name,
            "variant": "search",
            "hit@10": hit_rate(channel, queries),
            "mrr": reciprocal_rank(channel, queries),
            "queries": len(queries.phrases),
        }
        for name, channel in channels.items()
    ]


def static_tables(shop: Shop) -> list[dict[str, Any]]:
    """Returns rows of a transformer, of the table distilled from it, and of a random table of the same tokens."""
    known = [shop.texts[row] for row in np.flatnonzero(~shop.new)]
    teacher = transformer()
    distilled = static.fit(known, dim=teacher.dim, seed=shop.seed, model=str(transformer_directory()))
    table = np.random.default_rng([shop.seed, 11]).normal(size=distilled.table.shape).astype(np.float32)
    lengths = np.linalg.norm(distilled.table, axis=1, keepdims=True)
    weighed = unit(table) * lengths
    encoders: dict[str, tuple[Encoder, NDArray[np.float32] | None]] = {
        TRANSFORMER: (teacher, shop.vectors(TRANSFORMER)),
        STATIC: (distilled, None),
        RANDOM_TABLE: (static.StaticEncoder(weighed, distilled.tokenizer), None),
    }
    return [
        {
            "seed": shop.seed,
            "base": name,
            "variant": "base",
            "recall@50": shop.recall(encoder.encode(shop.texts) if vectors is None else vectors),
            "items_per_s": _rate(encoder, shop.texts[:_TIMED] if name != TRANSFORMER else shop.texts[: _TIMED // 8]),
        }
        for name, (encoder, vectors) in encoders.items()
    ]


def _rate(encoder: Encoder, texts: list[str]) -> float:
    """Texts a second, tokenising counted; the better of two runs."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        encoder.encode(texts)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds)


def long_texts(shop: Shop) -> list[dict[str, Any]]:
    """Returns rows of ways to encode a long text: MRR of the item of a passage beyond the words that are truncated.

    Controls are a chunk that is drawn from each text, and the whole texts by LSA and by BM25.

    A query is a window of words behind those that a truncated text keeps, without the words of the title. Its borders
    are not those of a chunk. The item is searched among the other long texts.
    """
    longs = [text for text in shop.texts if len(without_title(text).split()) >= _LONG_WORDS]
    order = np.random.default_rng([shop.seed, 12]).permutation(len(longs))[:_MOST_LONG]
    texts = [without_title(longs[row]).replace("\n", ". ") for row in order]
    chunks = [passages(text, _CHUNK_WORDS) for text in texts]
    rng = np.random.default_rng([shop.seed, 13])
    starts = [int(rng.integers(_CHUNK_WORDS, len(text.split()) - _QUERY_WORDS)) for text in texts]
    windows = [text.split()[start : start + _QUERY_WORDS] for text, start in zip(texts, starts, strict=True)]
    phrases = tuple(" ".join(window) for window in windows)
    queries = PhraseQueries(phrases, np.arange(len(texts)), tuple(texts))
    encoder = transformer()
    of = np.repeat(np.arange(len(texts)), [len(parts) for parts in chunks])
    whole = shop.kept(f"chunks-{shop.seed}", lambda: encoder.encode([part for parts in chunks for part in parts]))
    sums = np.zeros((len(texts), whole.shape[1]))
    np.add.at(sums, of, whole)
    own = lsa.fit(texts, dim=_DIM, seed=shop.seed)
    truncated = [" ".join(text.split()[:_CHUNK_WORDS]) for text in texts]
    counts = np.bincount(of, minlength=len(texts))
    drawn = np.cumsum(counts) - counts + (rng.random(len(texts)) * counts).astype(np.int64)
    ways: dict[tuple[str, str], Channel] = {
        (TRANSFORMER, TRUNCATED): by_matrix(encoder, encoder.encode(truncated)),
        (TRANSFORMER, MEAN_OF_CHUNKS): by_matrix(encoder, unit(sums)),
        (TRANSFORMER, BEST_CHUNK): by_best_chunk(encoder, whole, of),
        (TRANSFORMER, DRAWN_CHUNK): by_matrix(encoder, whole[drawn]),
        (LSA, WHOLE): by_matrix(own, own.encode(texts)),
        (WORDS, WHOLE): by_words(texts),
    }
    return [
        {
            "seed": shop.seed,
            "base": base,
            "variant": way,
            "mrr": reciprocal_rank(channel, queries),
            "queries": len(phrases),
        }
        for (base, way), channel in ways.items()
    ]
