"""Splits texts into the terms that LSA weighs, in any script.

White space and punctuation separate words; vowel signs and accents stay in them (Hindi, Arabic, Hebrew). Chinese,
Japanese, Thai, Lao, Khmer, Burmese and Tibetan are written without spaces: a run of them gives its character bigrams,
as Lucene's CJKAnalyzer does, and trigrams. Each ideograph is a term too, since a single ideograph is often a word.
"""

import re
import sys
import unicodedata
from functools import cache

import polars as pl

VERSION = 2
# Scripts without spaces between words. A character of these blocks that is neither letter nor mark ends a run.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_ASCII_WORD = re.compile(r"\w\w+")
_GRAMS = (2, 3)


def tokens(text: str) -> list[str]:
    """Returns the terms of a text, in order and with repeats.

    Terms are words of two characters and more, without English stop words. A text without any such word gives its words
    of one character: a title "7" or "차" is better than none.
    """
    lower, stops = text.lower(), _stop_words()
    if lower.isascii():
        words = _ASCII_WORD.findall(lower)
    else:
        words = [term for run in _runs().findall(lower) for term in _terms(run)]
    found = [word for word in words if word not in stops]
    if found or not lower.strip():
        return found
    return [word for word in _runs().findall(lower) if len(word) == 1 and word not in stops]


def without_tokens(texts: pl.Series) -> pl.Series:
    """Returns whether each text has no term: (R,) Boolean of (R,) String."""
    # Nearly every text holds a word of ASCII; only the others are split one by one.
    pieces = texts.str.to_lowercase().str.extract_all(r"[a-z0-9_]{2,}")
    doubtful = ~pieces.list.eval(~pl.element().is_in(sorted(_stop_words()))).list.any().fill_null(value=False)
    found = [not tokens(text) for text in texts.filter(doubtful)]
    return doubtful.scatter(doubtful.arg_true(), pl.Series(found, dtype=pl.Boolean)) if found else doubtful


def _terms(run: str) -> list[str]:
    if not _unspaced().match(run):
        return [run] if len(run) > 1 else []
    grams = [run[start : start + size] for size in _GRAMS for start in range(len(run) - size + 1)]
    return _IDEOGRAPH.findall(run) + grams


@cache
def _stop_words() -> frozenset[str]:
    """Returns the English stop words. Their package takes a second to load, so it loads with the first text."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    return frozenset(ENGLISH_STOP_WORDS)


@cache
def _runs() -> re.Pattern[str]:
    """Returns the pattern of a run of letters, digits and marks: all of scripts without spaces, or none of them."""
    marks = _marks()
    return re.compile(rf"(?:(?=[{_UNSPACED}])[\w{marks}])+|(?:(?![{_UNSPACED}])[\w{marks}])+")


@cache
def _unspaced() -> re.Pattern[str]:
    return re.compile(f"[{_UNSPACED}]")


def _marks() -> str:
    """Returns every combining mark, as ranges of a character class; Python's \\w leaves them out."""
    places = [code for code in range(0x300, min(0x11FFF, sys.maxunicode)) if unicodedata.category(chr(code))[0] == "M"]
    ranges: list[list[int]] = []
    for code in places:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)
