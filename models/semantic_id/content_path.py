"""The one way from an item's text to what the ranker learns of it: text → vector → codes → tokens.

Batch jobs walk it shard by shard, one stage each; the stream, the gates and the drift report walk it at once here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import Encoder
from features.content.space_map import SpaceMap
from models.semantic_id.codebook.quantizer import Quantizer
from models.semantic_id.tokens import Tokenizer


class EncodedItems(NamedTuple):
    """Content of N items.

    Attributes:
        vectors: (N, D) float32; D is 0 without an encoder.
        codes: (N, Q) uint16; Q is 0 without a codebook.
        tokens: N lists of the table's values, coarse to fine; empty lists without a tokenizer.
    """

    vectors: NDArray[np.float32]
    codes: NDArray[np.uint16]
    tokens: list[list[str]]


@dataclass(frozen=True)
class ContentPath:
    """Encoder, codebook and tokenizer that were made for one another; each may be None, with all that follow it.

    Attributes:
        encoder, codebook, tokenizer: The parts.
        map: Map from the encoder's space to the space that the codebook reads. None: the codebook reads the encoder's.
    """

    encoder: Encoder | None
    codebook: Quantizer | None
    tokenizer: Tokenizer | None = None
    map: SpaceMap | None = None

    def encode(self, texts: Sequence[str]) -> EncodedItems:
        """Encodes N texts.

        Raises:
            DatasetError: the codebook does not fit the encoder, or the tokenizer does not fit the codebook.
        """
        count = len(texts)
        vectors, codes = np.zeros((count, 0), dtype=np.float32), np.zeros((count, 0), dtype=np.uint16)
        if self.encoder is not None:
            vectors = self.encoder.encode(texts)
            if self.codebook is not None:
                mapped = self.map.of(vectors, space=self.encoder.id) if self.map is not None else vectors
                codes = self.codebook.encode(mapped)
        if self.tokenizer is None or not codes.shape[1]:
            return EncodedItems(vectors, codes, [[] for _ in range(count)])
        return EncodedItems(vectors, codes, self.tokenizer.tokens(codes))
