"""Bit codes: a vector as the signs of its projections, packed eight to a byte.

Codes are searched in two ways. Two codes are compared by Hamming distance. A float query is compared with codes
without rounding the query (asymmetric), which finds more at the same bytes. Either gives a shortlist, which the float
or int8 vectors put in order.

Shape letters: N vectors, D dim, B bits, W = B / 8 bytes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.content.encoder import content_id, load_part
from features.content.step import Centre, Floats, Rotate, load_step, save_steps
from features.errors import DatasetError

Codes = NDArray[np.uint8]
DESCRIPTION = "bits.json"
_LEVELS = 127


@dataclass(frozen=True)
class BitCode:
    """Function from vectors of one space to packed bits.

    Attributes:
        source: Id of the space whose vectors are coded.
        centre: Subtracts the catalogue's mean (D,).
        turn: Rotates to B projections; B is a multiple of 8.
    """

    source: str
    centre: Centre
    turn: Rotate

    def __post_init__(self) -> None:
        if self.turn.dim % 8:
            raise DatasetError(
                f"bits: expected a multiple of 8, got {self.turn.dim}; choose {-(-self.turn.dim // 8) * 8}"
            )

    @cached_property
    def id(self) -> str:
        """Hash of the space and of the projection, `bits-HASH`."""
        return content_id("bits", self.source.encode(), self.centre.id.encode(), self.turn.id.encode())

    @property
    def bits(self) -> int:
        """B, the bits of a code."""
        return self.turn.dim

    def code(self, vectors: NDArray[np.float32], *, space: str) -> Codes:
        """Returns the codes (N, W) uint8 of vectors (N, D). The first bit is the highest of the first byte.

        Raises:
            DatasetError: The vectors belong to another space, or have another width.
        """
        self._refuse_other(space)
        return np.packbits(self.turn(self.centre(vectors)) > 0, axis=1)

    def query(self, vectors: NDArray[np.float32], *, space: str) -> NDArray[np.float32]:
        """Returns the projections (N, B) of float queries (N, D), for `asymmetric`.

        A query is not centred: x · (mean + d) differs from x · d by the same number for every item d.

        Raises:
            DatasetError: The vectors belong to another space, or have another width.
        """
        self._refuse_other(space)
        return self.turn(vectors).astype(np.float32)

    def _refuse_other(self, space: str) -> None:
        if space != self.source:
            raise DatasetError(f"bits {self.id} code vectors of {self.source}, got vectors of {space}; fit bits for it")

    def save(self, directory: Path) -> None:
        """Writes everything that `load_bits` needs into an existing empty directory."""
        steps = save_steps((self.centre, self.turn), directory)
        description = {"id": self.id, "source": self.source, "steps": steps}
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode(description))


def load_bits(directory: Path) -> BitCode:
    """Loads a bit code that `BitCode.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """

    def read(found: dict[str, Any]) -> BitCode:
        centre, turn = (load_step(directory / name) for name in found["steps"])
        if not isinstance(centre, Centre) or not isinstance(turn, Rotate):
            raise TypeError(f"steps of kind {centre.kind} and {turn.kind}")
        return BitCode(found["source"], centre, turn)

    return load_part(directory, DESCRIPTION, read, what="bit code", remedy="fit it again")


def hamming(query: Codes, codes: Codes) -> NDArray[np.int64]:
    """Returns the number of bits (N,) in which codes (N, W) differ from one code (W,).

    For signs s in {-1, 1}: s(query) · s(code) = B - 2 · hamming.
    """
    distances: NDArray[np.int64] = np.bitwise_count(codes ^ query).sum(axis=1, dtype=np.int64)
    return distances


def asymmetric(query: NDArray[np.float32], codes: Codes) -> NDArray[np.float32]:
    """Returns the products (N,) of a float query (B,) with the signs of codes (N, W).

    A table holds the products of each byte's 256 values, so an item costs W look-ups.
    """
    signs = 2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) - 1.0
    table = (query.reshape(-1, 8).astype(np.float64) @ signs.T).astype(np.float32)
    found = np.zeros(len(codes), dtype=np.float32)
    for byte in range(codes.shape[1]):
        found += table[byte].take(codes[:, byte])
    return found


def signs(codes: Codes) -> NDArray[np.int8]:
    """Returns the signs (N, B) of codes (N, W), -1 or 1; products with them are the slow twins of this module."""
    return 2 * np.unpackbits(codes, axis=1).astype(np.int8) - 1


@dataclass(frozen=True)
class Int8Rows:
    """Vectors in a quarter of their bytes: int8 values and one scale a row, D + 4 bytes.

    Attributes:
        values: (N, D) int8.
        scales: (N,) float32; a row is `values` times its scale. The error of a value is at most half its scale.
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> "Int8Rows":
        """Rounds vectors (N, D)."""
        scales = (np.abs(vectors).max(axis=1, initial=0.0) / _LEVELS).astype(np.float32)
        values = np.rint(vectors / np.where(scales > 0, scales, 1.0)[:, None])
        return cls(np.clip(values, -_LEVELS, _LEVELS).astype(np.int8), scales)

    def rows(self, numbers: NDArray[np.int64]) -> Floats:
        """Returns the vectors (M, D) float64 of row numbers (M,)."""
        return self.values[numbers].astype(np.float64) * self.scales[numbers, None]


def rerank(
    query: NDArray[np.float32], shortlist: NDArray[np.int64], rows: "NDArray[np.float32] | Int8Rows", k: int
) -> NDArray[np.int64]:
    """Returns the k numbers of a shortlist (S,) whose vectors have the largest product with the query (D,), best first.

    Args:
        query: (D,) float query in the space of the rows.
        shortlist: (S,) row numbers.
        rows: All vectors, float32 (N, D) or int8.
        k: Most numbers to return.
    """
    found = rows.rows(shortlist) if isinstance(rows, Int8Rows) else rows[shortlist]
    return shortlist[np.argsort(-(found @ query), kind="stable")[:k]]
