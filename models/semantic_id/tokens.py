"""Tokens of a Semantic ID: the values under which it reads rows of the unified table.

    prefix        5   5.17   5.17.3     prefix n-gram ("Enhancing Embedding Representation Stability", 2025)
    unigram       1:5   2:17   3:3      a token for each level (Singh et al., RecSys 2024)
    bigram        1:5.17   3:3          two levels a token, side by side (same)
    all-bigrams   1:5.17   2:17.3       two levels a token, overlapping
    pieces        1:5.17.3              the spans that SentencePiece learnt from impressed items (Singh et al.)

A token names the level it starts at and the codes it spans, so no two spans share a token. All tokens are values of one
multi-valued feature. The hash contract maps them to the table that every feature shares, and their rows are summed.

Shape letters: N items, Q levels, K codes per level.
"""

import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec
import numpy as np
import polars as pl
import sentencepiece
from numpy.typing import NDArray

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook.quantizer import prefix_tokens

Scheme = Literal["prefix", "unigram", "bigram", "all-bigrams", "pieces"]
SCHEMES: tuple[str, ...] = get_args(Scheme)
DESCRIPTION = "tokens.json"
_MODEL = "tokens.model"
# SentencePiece reads text: each (level, code) is a character of a private plane, which is not normalised.
_FIRST_CHARACTER = 0xF0000
_MOST_CHARACTERS = 0xFFFC
# Reserved pieces: unknown, the end of `_sentences`, and one spare.
_SPECIAL_PIECES = 3
_SENTENCES = 200_000


@dataclass(frozen=True)
class Tokenizer:
    """Tokenizer from codes to tokens; the same in batch, in the stream and in serving.

    Attributes:
        scheme: Scheme of the tokens; the module describes each.
        levels, codes: Q and K of the codebook whose codes are tokenized.
        model: SentencePiece's model, for `pieces`.
    """

    scheme: Scheme
    levels: int
    codes: int
    model: bytes = b""

    @property
    def id(self) -> str:
        """`SCHEME-HASH` of everything that decides the tokens."""
        digest = hashlib.sha256(f"{self.levels} {self.codes} ".encode() + self.model).hexdigest()
        return f"{self.scheme}-{digest[:12]}"

    def tokens(self, codes: NDArray[np.uint16]) -> list[list[str]]:
        """Turns codes (N, Q) into each item's tokens, coarse to fine.

        Raises:
            DatasetError: The codes have another shape, or exceed K.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.levels or (codes.size and codes.max() >= self.codes):
            raise DatasetError(
                f"codes: expected (N, {self.levels}) below {self.codes} for tokens {self.id}, got {codes.shape}"
                f"{f' up to {codes.max()}' if codes.size else ''}; encode the items with the codebook of these tokens"
            )
        if self.scheme == "prefix":
            return prefix_tokens(codes)
        if self.scheme == "pieces":
            return self._pieces(codes)
        width, step = {"unigram": (1, 1), "bigram": (2, 2), "all-bigrams": (2, 1)}[self.scheme]
        # All overlapping bigrams start before the last level; a single level at the end is a token of its own.
        last = self.levels - 1 if self.scheme == "all-bigrams" and self.levels > 1 else self.levels
        spans = [(start, min(start + width, self.levels)) for start in range(0, last, step)]
        return [[_span(row, start, stop) for start, stop in spans] for row in codes.tolist()]

    def column(self, codes: pl.Series) -> pl.Series:
        """Makes codes (N,) of arrays or lists a column of lists of tokens (N,); null where the codes are null."""
        coded = codes.is_not_null()
        known = codes.filter(coded)
        tokens = self.tokens(known.to_numpy().reshape(len(known), -1)) if len(known) else []
        found: list[list[str] | None] = [None] * len(codes)
        for row, own in zip(coded.arg_true().to_list(), tokens, strict=True):
            found[row] = own
        return pl.Series(found, dtype=pl.List(pl.String))

    def save(self, directory: Path) -> None:
        """Writes everything `load_tokenizer` needs into an existing directory."""
        if self.model:
            (directory / _MODEL).write_bytes(self.model)
        described = {"id": self.id, "scheme": self.scheme, "levels": self.levels, "codes": self.codes}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(described))

    def _pieces(self, codes: NDArray[np.uint16]) -> list[list[str]]:
        processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        names = [self._named(processor.id_to_piece(number)) for number in range(processor.get_piece_size())]
        return [[names[number] for number in found] for found in processor.encode(_spelt(codes, self.codes))]

    def _named(self, piece: str) -> str:
        numbers = [ord(character) - _FIRST_CHARACTER for character in piece]
        if any(number < 0 for number in numbers):
            return piece  # a reserved piece of SentencePiece, which no item has
        start, own = numbers[0] // self.codes, [number % self.codes for number in numbers]
        return f"{start + 1}:" + ".".join(map(str, own))


def fit_tokenizer(
    scheme: Scheme,
    levels: int,
    codes: int,
    items: NDArray[np.uint16],
    impressions: NDArray[np.int64],
    *,
    pieces: int | None = None,
) -> Tokenizer:
    """Makes a tokenizer. Only `pieces` learns from data.

    Args:
        items: (N, Q) codes of the catalogue.
        impressions: (N,) how often training showed each item; an item that was never shown contributes nothing.
        pieces: Size of SentencePiece's vocabulary, the rows that Semantic IDs may use; by default one for each (level,
            code) and as many again.

    Raises:
        DatasetError: The scheme is unknown, there are no impressions, or the vocabulary lacks room for each (level,
            code).
    """
    if scheme not in SCHEMES:
        raise DatasetError(f"tokens: {scheme!r} is unknown; there are: {', '.join(SCHEMES)}")
    if scheme != "pieces":
        return Tokenizer(scheme, levels, codes)
    alphabet = levels * codes
    if alphabet > _MOST_CHARACTERS:
        raise DatasetError(
            f"tokens: pieces take {_MOST_CHARACTERS} codes in all levels at most, got {levels} x {codes}; "
            "use the scheme prefix"
        )
    least = alphabet + _SPECIAL_PIECES
    if pieces is not None and pieces < least:
        raise DatasetError(
            f"tokens: {pieces} pieces have no room for each of {levels} x {codes} codes; give {least} at least, or use "
            "the scheme prefix"
        )
    shown = impressions > 0
    if not shown.any():
        raise DatasetError("tokens: no item with codes was shown in training; SentencePiece has nothing to learn from")
    sentences = _sentences(items[shown], impressions[shown], codes)
    return Tokenizer(scheme, levels, codes, _trained(sentences, levels, pieces or least + alphabet))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Loads a tokenizer that `save` wrote.

    Raises:
        BundleError: A file is missing or was altered.
    """
    path = directory / DESCRIPTION
    try:
        described = msgspec.json.decode(path.read_bytes())
        scheme = described["scheme"]
        model = (directory / _MODEL).read_bytes() if scheme == "pieces" else b""
        found = Tokenizer(scheme, described["levels"], described["codes"], model)
    except (msgspec.DecodeError, LookupError, TypeError, OSError) as error:
        raise BundleError(f"{path} does not describe tokens: {error}; fetch or make them again") from error
    if scheme not in SCHEMES or found.id != described["id"]:
        raise BundleError(f"{path}: the tokens are {found.id}, expected {described['id']}; fetch them again")
    return found


def prefix_numbers(codes: NDArray[np.uint16], codes_per_level: int) -> NDArray[np.generic]:
    """Numbers the prefixes of codes (N, Q): (N, Q), by Horner's rule over K = `codes_per_level`.

        J_0 = 0,   J_i = K · J_{i-1} + c_i + 1,   number of depth i = J_i - 1 = Σ_{t ≤ i} K^{i-t} (c_t + 1) - 1

    The + 1 separates prefixes of different depth (arXiv 2504.02137). Numbers are int64 if they fit, else Python's
    integers: eight levels of 2,048 codes need 89 bits.
    """
    wide = np.asarray(codes).astype(object if _bits(codes.shape[1], codes_per_level) > 63 else np.int64)
    found = np.zeros_like(wide)
    reached = np.zeros(len(wide), dtype=wide.dtype)
    for level in range(wide.shape[1]):
        reached = codes_per_level * reached + wide[:, level] + 1
        found[:, level] = reached - 1
    return found


def _bits(levels: int, codes: int) -> int:
    most: int = sum(codes**depth for depth in range(1, levels + 1))
    return most.bit_length()


def _span(row: Sequence[int], start: int, stop: int) -> str:
    return f"{start + 1}:" + ".".join(map(str, row[start:stop]))


def _spelt(codes: NDArray[np.uint16], per_level: int) -> list[str]:
    """Returns a character for each (level, code)."""
    numbers = codes.astype("<u4") + _FIRST_CHARACTER + np.arange(codes.shape[1], dtype="<u4") * per_level
    return [row.tobytes().decode("utf-32-le") for row in np.ascontiguousarray(numbers, dtype="<u4")]


def _sentences(codes: NDArray[np.uint16], counts: NDArray[np.int64], per_level: int) -> Iterator[str]:
    """Yields each code as often as it was shown, scaled down to `_SENTENCES` in all.

    SentencePiece counts equal sentences as one, and merges only spans that two different sentences hold. So a code that
    should become one piece also appears once before an end token that no other sentence has. A sentence of each single
    character gives every character a piece, even if no item has it.
    """
    distinct, place = np.unique(codes, axis=0, return_inverse=True)
    often = np.bincount(place.ravel(), weights=counts)
    times = np.maximum(1, np.round(often * min(1.0, _SENTENCES / often.sum()))).astype(np.int64)
    end = _FIRST_CHARACTER + codes.shape[1] * per_level
    yield from map(chr, range(_FIRST_CHARACTER, end))
    for text, count in zip(_spelt(distinct, per_level), times.tolist(), strict=True):
        yield from itertools.repeat(text, count)
        yield text + chr(end)


def _trained(sentences: Iterator[str], levels: int, pieces: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_whitespace=False,
        split_by_unicode_script=False,
        split_by_number=False,
        max_sentencepiece_length=levels,
        bos_id=-1,
        eos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()
