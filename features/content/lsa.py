"""Latent semantic analysis: TF-IDF and a truncated SVD, fitted on the catalogue itself.

This is the default encoder. It needs no download, trains in seconds, and its vectors carry what Semantic IDs need. Its
terms are those of `features.content.terms`; an encoder that was saved under an older rule keeps the terms of that rule.
Deerwester et al., "Indexing by Latent Semantic Analysis" (1990); randomised SVD by Halko et al. (2011).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import svd_flip

from features.content import terms as token
from features.content.encoder import DESCRIPTION, content_id, unit
from features.content.svd import right_vectors
from features.errors import BundleError, DatasetError
from features.threads import one_thread

_MAX_TERMS = 50_000
_SMALL_CATALOGUE = 200


class LsaEncoder:
    """TF-IDF weights of known terms, projected on D singular directions, scaled to unit length.

    Args:
        terms: (T,) vocabulary in column order.
        idf: (T,) float64 inverse document frequencies.
        components: (D, T) float32 right singular vectors.
        version: Version of the rule that splits a text into terms. Version 1 knows only words between spaces.
    """

    def __init__(
        self,
        terms: Sequence[str],
        idf: NDArray[np.float64],
        components: NDArray[np.float32],
        version: int = token.VERSION,
    ) -> None:
        self._version = version
        self._terms = list(terms)
        self._idf = idf
        self._components = components
        self._projection = np.ascontiguousarray(components.T.astype(np.float64))
        self._tfidf = _vectorizer(min_df=1, version=version)
        self._tfidf.vocabulary = {term: column for column, term in enumerate(self._terms)}
        self._tfidf.idf_ = idf
        rule = [] if version == 1 else [f"tokens-{version}".encode()]
        self._id = content_id("lsa", "\n".join(self._terms).encode(), idf.tobytes(), components.tobytes(), *rule)

    @property
    def id(self) -> str:
        return self._id

    @property
    def dim(self) -> int:
        return int(self._components.shape[0])

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        # Sparse times dense adds up row by row, so a text's vector has the same bits in any batch.
        return unit(np.asarray(sparse.csr_matrix(self._tfidf.transform(texts)) @ self._projection))

    def save(self, directory: Path) -> None:
        save_file({"idf": self._idf, "components": self._components}, directory / "lsa.safetensors")
        rule = {} if self._version == 1 else {"tokens": self._version}
        (directory / DESCRIPTION).write_bytes(
            msgspec.json.encode({"kind": "lsa", "id": self._id, "terms": self._terms} | rule)
        )


def _vectorizer(*, min_df: int, version: int) -> TfidfVectorizer:
    rule: dict[str, Any] = {"stop_words": "english"} if version == 1 else {"analyzer": token.tokens}
    return TfidfVectorizer(sublinear_tf=True, max_features=_MAX_TERMS, min_df=min_df, **rule)


def fit(texts: Sequence[str], *, dim: int, seed: int, model: str | None = None) -> LsaEncoder:
    """Fits on a catalogue's texts. D is `dim`, or the largest width that the catalogue allows.

    Raises:
        DatasetError: No text holds a usable word, or `model` is given (this encoder takes none).
    """
    if model is not None:
        raise DatasetError(f"encoder model {model!r}: the lsa encoder is fitted on the catalogue and takes no model")
    if not any(map(token.tokens, texts)):
        raise DatasetError(f"[items] text: the {len(texts)} texts hold no usable word; name other columns as text")
    vectorizer = _vectorizer(min_df=1 if len(texts) < _SMALL_CATALOGUE else 2, version=token.VERSION)
    try:
        matrix = vectorizer.fit_transform(texts)
    except ValueError:
        # No two texts share a term.
        vectorizer = _vectorizer(min_df=1, version=token.VERSION)
        matrix = vectorizer.fit_transform(texts)
    width = max(1, min(dim, min(matrix.shape) - 1))
    with one_thread():
        components = svd_flip(None, right_vectors(matrix, width, seed=seed), u_based_decision=False)[1]
    return LsaEncoder(
        list(vectorizer.get_feature_names_out()),
        np.ascontiguousarray(vectorizer.idf_, dtype=np.float64),
        np.ascontiguousarray(components, dtype=np.float32),
    )


def load(directory: Path) -> LsaEncoder:
    description = msgspec.json.decode((directory / DESCRIPTION).read_bytes())
    tensors = load_file(directory / "lsa.safetensors")
    version = description.get("tokens", 1)
    if version not in (1, token.VERSION):
        raise BundleError(
            f"{directory}: terms of version {version}, this release knows 1 to {token.VERSION}; update it"
        )
    encoder = LsaEncoder(description["terms"], tensors["idf"], tensors["components"], version)
    if encoder.id != description["id"]:
        raise BundleError(
            f"{directory}: holds encoder {encoder.id}, expected {description['id']}; fetch or fit it again"
        )
    return encoder
