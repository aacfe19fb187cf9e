"""The residual quantizer: a protocol from vectors to short hierarchical codes, and checks that all quantizers share.

Shape letters: N items, D dim of a content vector, Q levels, K codes per level.
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from features.errors import DatasetError

MAX_CODES = 256
DESCRIPTION, TENSORS = "codebook.json", "codebook.safetensors"


class Quantizer(Protocol):
    """Frozen codebook: the same vector gets the same codes in any batch, in batch jobs and in the stream."""

    @property
    def id(self) -> str:
        """`NAME-HASH` of everything the codebook computes with; codes of two ids are never mixed."""
        ...

    @property
    def levels(self) -> int:
        """Q, the number of codes in a Semantic ID."""
        ...

    @property
    def codes(self) -> int:
        """K, the number of codes on each level."""
        ...

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Maps (N, D) float32 to codes (N, Q) uint16, coarse to fine."""
        ...

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Maps codes (N, Q) back to vectors (N, D) float32."""
        ...

    def save(self, directory: Path) -> None:
        """Writes everything a load needs into an existing empty directory."""
        ...


def refuse_not_finite(vectors: NDArray[np.float32]) -> None:
    """Refuses vectors (N, D) that hold NaN or infinite values.

    Raises:
        DatasetError: A value is NaN or infinite; names the first such row.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise DatasetError(f"vectors: row {row} holds NaN or infinite values; fix the encoder's output")


def refuse_width(vectors: NDArray[np.float32], dim: int, codebook: str) -> NDArray[np.float32]:
    """Returns the vectors as (N, dim) float32.

    Raises:
        DatasetError: The vectors have another shape.
    """
    found = np.asarray(vectors)
    if found.ndim != 2 or found.shape[1] != dim:
        raise DatasetError(f"vectors: expected (N, {dim}) for codebook {codebook}, got {found.shape}")
    return found.astype(np.float32, copy=False)


def default_codes(items: int) -> int:
    """Chooses K for a catalogue: the power of two nearest to sqrt(items), from 8 to 256.

    Two levels then separate about as many groups as there are items. More codes would give deep levels codes of one
    item each, from which a ranker cannot generalise.
    """
    return int(2 ** np.clip(np.round(np.log2(max(items, 1)) / 2), 3, np.log2(MAX_CODES)))


def recommended_shape(items: int) -> tuple[int, int]:
    """Chooses levels and codes for a catalogue size: `default_codes`, and one level more than separates the items.

    The last level is for items that the levels before do not separate; on 3,883 items it is the third of 64 codes. Up
    to a quarter of a level may be missing: neighbours share a node then, which is the purpose of a Semantic ID.
    """
    codes = default_codes(items)
    return 1 + max(1, math.ceil(math.log(max(items, 2)) / math.log(codes) - 0.25)), codes


def prefix_tokens(codes: NDArray[np.uint16]) -> list[list[str]]:
    """Turns codes (N, Q) into each item's prefixes, `["5", "5.17", "5.17.3"]`: its values in the unified table.

    Prefixes of different depth never collide, since they hold a different number of dots. Prefix n-gram, Singh et al.
    (RecSys 2024) and "Enhancing Embedding Representation Stability" (arXiv 2504.02137).
    """
    texts = [[str(code) for code in row] for row in codes.tolist()]
    return [[".".join(row[: depth + 1]) for depth in range(len(row))] for row in texts]
