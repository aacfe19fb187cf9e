"""Static encoder: a table with a vector for each token, distilled from a transformer. No network runs when it encodes.

A text's vector is the weighted mean of its tokens' vectors. The weight of a token is a / (a + p), p its share of the
catalogue's tokens, so a frequent token weighs little. Arora et al., "A Simple but Tough-to-Beat Baseline for Sentence
Embeddings" (SIF, ICLR 2017), eq. 2. The table is centred in place of the paper's common component.

Shape letters: T tokens, N texts, D dim.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from features.content.encoder import DESCRIPTION, content_id, unit
from features.content.sentence import open_model
from features.errors import BundleError, DatasetError

_TABLE, _TOKENIZER = "static.safetensors", "tokenizer.json"
_SMOOTHING = 1e-3
_BATCH = 256
# Texts of a catalogue that are read for the shares of the tokens.
_COUNTED = 1 << 16


class StaticEncoder:
    """Encoder by a table of token vectors.

    Args:
        table: (T, D) float32 vector of each token, weighed already.
        tokenizer: The tokenizer, as the JSON of the `tokenizers` library.
    """

    def __init__(self, table: NDArray[np.float32], tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self.table = np.ascontiguousarray(table, dtype=np.float32)
        """(T, D) float32 vector of each token."""
        self.tokenizer = tokenizer
        """The tokenizer's JSON."""
        self._tokenizer: Any = Tokenizer.from_str(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._id = content_id("static", self.table.tobytes(), tokenizer.encode())

    @property
    def id(self) -> str:
        return self._id

    @property
    def dim(self) -> int:
        return int(self.table.shape[1])

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        sums = np.zeros((len(texts), self.dim))
        for start in range(0, len(texts), _BATCH):
            block = [text if text.strip() else "" for text in texts[start : start + _BATCH]]
            found = self._tokenizer.encode_batch_fast(block, add_special_tokens=False)
            for row, tokens in enumerate(found, start):
                # A sum of one text's tokens in their order: the same bits in any batch.
                sums[row] = self.table[tokens.ids].sum(axis=0, dtype=np.float64)
        return unit(sums)

    def save(self, directory: Path) -> None:
        save_file({"table": self.table}, directory / _TABLE)
        (directory / _TOKENIZER).write_text(self.tokenizer, encoding="utf-8")
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode({"kind": "static", "id": self._id}))


def fit(texts: Sequence[str], *, dim: int, seed: int, model: str | None = None) -> StaticEncoder:
    """Distils a table from a transformer, and weighs its tokens by a catalogue.

    Each token is encoded by itself. The first `dim` principal components of the table are kept.

    Args:
        texts: Texts of the catalogue.
        dim: D, at most the transformer's width.
        seed: No effect: nothing is drawn.
        model: Local directory or hub id of the transformer.

    Raises:
        DatasetError: No model is given, or the model cannot be opened.
    """
    if model is None:
        raise DatasetError("encoder static: no model given; set encoder_model in [run] to a transformer to distil")
    opened = open_model(model)
    tokenizer: Any = opened.tokenizer.backend_tokenizer
    words = [token.removeprefix("##") for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    vectors = np.asarray(opened.encode(words, batch_size=_BATCH, show_progress_bar=False), dtype=np.float64)
    return StaticEncoder(weighed(vectors, counts(texts, tokenizer, len(words)), dim), tokenizer.to_str())


def counts(texts: Sequence[str], tokenizer: Any, size: int) -> NDArray[np.int64]:
    """Returns how often each token (T,) occurs in texts, evenly chosen if there are more than 65,536."""
    found = np.zeros(size, dtype=np.int64)
    chosen = list(texts[:: max(1, len(texts) // _COUNTED)])
    for start in range(0, len(chosen), _BATCH):
        for tokens in tokenizer.encode_batch_fast(chosen[start : start + _BATCH], add_special_tokens=False):
            np.add.at(found, tokens.ids, 1)
    return found


def weighed(vectors: NDArray[np.floating], seen: NDArray[np.int64], dim: int) -> NDArray[np.float32]:
    """Returns the table (T, D): the first components of the vectors (T, E), times the weights of the tokens.

    Args:
        vectors: (T, E) vector of each token.
        seen: (T,) occurrences of each token.
        dim: D.
    """
    shares = seen / max(int(seen.sum()), 1)
    centred = vectors - vectors.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    components = centred @ axes[:, ::-1][:, : max(1, dim)]
    return np.asarray(components * (_SMOOTHING / (_SMOOTHING + shares))[:, None], dtype=np.float32)


def load(directory: Path) -> StaticEncoder:
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    table = load_file(directory / _TABLE)["table"]
    encoder = StaticEncoder(table, (directory / _TOKENIZER).read_text(encoding="utf-8"))
    if encoder.id != description["id"]:
        raise BundleError(
            f"{directory}: holds encoder {encoder.id}, expected {description['id']}; fetch or fit it again"
        )
    return encoder
