"""Tokens of many texts at once, as flat arrays: each distinct word is tokenised once, as the tokenizer would in place.

A WordPiece tokenizer reads a text word by word, so the tokens of a text are those of its words between the special
tokens. Words of a catalogue repeat, and a gather costs a twentieth of tokenising. Other tokenizers read whole texts.

Shape letters: N texts, n tokens or words in all, m distinct words.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Numbers of the tokens (n,), text after text, and the lengths (N,) of the texts."""
_SPACE = " "


def tokens_of(tokenizer: Any, texts: Sequence[str], most: int) -> Tokens:
    """Returns the tokens of texts, special tokens among them, at most `most` for each text.

    Args:
        tokenizer: Tokenizer of the transformers library, of the fast kind.
        texts: N texts.
        most: Most tokens of a text.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    if not _reads_words(backend):
        backend.enable_truncation(max_length=most)
        return _flat(backend.encode_batch_fast(list(texts)))
    backend.no_truncation()
    return _by_word(backend, texts, most)


def _reads_words(backend: Any) -> bool:
    kinds = [type(one).__name__ for one in (backend.model, backend.pre_tokenizer, backend.normalizer)]
    added = backend.get_added_tokens_decoder().values()
    return kinds == ["WordPiece", "BertPreTokenizer", "BertNormalizer"] and all(_SPACE not in str(one) for one in added)


def _by_word(backend: Any, texts: Sequence[str], most: int) -> Tokens:
    words = pl.Series(texts, dtype=pl.String).str.split(_SPACE)
    counts = words.list.len().to_numpy().astype(np.int64)
    flat = words.explode()
    distinct = flat.unique()
    codes = flat.cast(pl.Enum(distinct)).to_physical().to_numpy()
    ids, lengths = _flat(backend.encode_batch_fast(distinct.to_list(), add_special_tokens=False))
    before, after = _special(backend)
    # Tokens of a text up to each of its words, to cut it where the model's room ends.
    of_word = lengths[codes]
    ends = np.cumsum(of_word)
    text_ends = np.concatenate([[0], ends])[np.cumsum(counts)]
    starts = np.concatenate([[0], text_ends[:-1]])
    whole = text_ends - starts
    kept = np.minimum(whole, most - len(before) - len(after))
    read = ids[_ranges((np.cumsum(lengths) - lengths)[codes], of_word)]
    total = kept + len(before) + len(after)
    first = np.cumsum(total) - total
    found = np.empty(int(total.sum()), dtype=np.int32)
    for place, one in enumerate(before):
        found[first + place] = one
    found[_ranges(first + len(before), kept)] = read if (kept == whole).all() else read[_ranges(starts, kept)]
    for place, one in enumerate(after):
        found[first + len(before) + kept + place] = one
    return found, total


def _special(backend: Any) -> tuple[list[int], list[int]]:
    """Returns the special tokens before and after a text."""
    inner = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    before = next(place for place in range(len(whole)) if whole[place : place + len(inner)] == inner)
    return whole[:before], whole[before + len(inner) :]


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the places of all elements of lists that begin at `starts` (M,) and have `lengths` (M,)."""
    ends = np.cumsum(lengths)
    found: NDArray[np.int64] = np.repeat(starts - ends + lengths, lengths) + np.arange(int(lengths.sum()))
    return found


def _flat(encoded: Sequence[Any]) -> Tokens:
    read = [one.ids for one in encoded]
    lengths = np.fromiter(map(len, read), dtype=np.int64, count=len(read))
    return np.fromiter(chain.from_iterable(read), dtype=np.int32, count=int(lengths.sum())), lengths
