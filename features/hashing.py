"""The hash contract: maps a categorical value to its rows of the unified table.

The contract is one frozen, versioned function: the same offline, in the stream and in the ranker. A table must be read
with the `HashSpec` it was trained with. The golden file `tests/golden/hashing.json` holds its values forever.

Version 1, for chunk j of a feature with salt s, over a table of R rows (R < 2**32):

    f       = xxh3_64(utf8(value))                       value fingerprint, once per value
    k_sj    = xxh3_64(utf8(s + "\\x1f" + str(j)))         chunk key
    h       = splitmix64(f XOR k_sj)                     finaliser of Steele, Lea & Flood (OOPSLA 2014)
    row     = (h >> 32) * R >> 32                        multiply-shift range reduction (Lemire, 2019)

Feature multiplexing (several salted lookups per feature into one table): Coleman et al., NeurIPS 2023.
Shape letters: N values, c chunks, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from features.errors import BundleError

VERSION = 1
_CHUNK_SEPARATOR = "\x1f"


def fingerprint(values: Sequence[str]) -> NDArray[np.uint64]:
    """Hashes values to (N,) uint64. This part of the contract does not depend on a feature or a table."""
    digest = xxhash.xxh3_64_intdigest
    return np.fromiter((digest(value.encode()) for value in values), dtype=np.uint64, count=len(values))


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes (N,) uint64 so that every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def value_keys(salt: str, fingerprints: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Returns keys (N,) uint64 of a feature's values, equal for equal salt and value."""
    with np.errstate(over="ignore"):
        return splitmix64(fingerprints ^ fingerprint([salt])[0])


def chunk_keys(salt: str, chunks: int) -> NDArray[np.uint64]:
    """Returns the keys (c,) uint64 of a feature's chunks, k_sj above."""
    return fingerprint([f"{salt}{_CHUNK_SEPARATOR}{chunk}" for chunk in range(chunks)])


@dataclass(frozen=True)
class HashSpec:
    """Parameters a table must be read with.

    Attributes:
        rows: R, rows of the table, 1 ≤ R < 2**32.
        version: Version of this contract; another version is refused.
    """

    rows: int
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise BundleError(f"hash contract version {self.version}: this release reads version {VERSION} only")
        if not 1 <= self.rows < 2**32:
            raise ValueError(f"rows: expected 1 <= rows < 2**32, got {self.rows}")

    def lookup(self, salt: str, chunks: int, fingerprints: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Returns the rows, (N, c) int64 in [0, R), of values given as fingerprints (N,) uint64."""
        keys = chunk_keys(salt, chunks)
        with np.errstate(over="ignore"):
            mixed = splitmix64(fingerprints[:, None] ^ keys[None, :])
        return (((mixed >> np.uint64(32)) * np.uint64(self.rows)) >> np.uint64(32)).astype(np.int64)
