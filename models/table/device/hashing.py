"""The hash contract in int64 tensors, so that a device maps values to rows from their fingerprints.

torch has no unsigned arithmetic: products wrap in int64 as in uint64, and a logical shift is an arithmetic one without
the bits that it fills in. `features.hashing` is the readable twin, with equal rows for every fingerprint.

Shape letters: N values, c chunks, R rows.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.hashing import HashSpec, chunk_keys


def signed(value: int) -> int:
    """Returns the int64 number with the bits of a uint64 number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 numbers right as if they were uint64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """Mixes int64 numbers as `features.hashing.splitmix64` mixes uint64."""
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ shifted(x, 31)


def rows_of(prints: Tensor, keys: Tensor, rows: int) -> Tensor:
    """Returns the rows of values by the contract.

    Args:
        prints: Fingerprints, int64 with the bits of uint64, of any shape.
        keys: Keys of the chunks, likewise, of a shape that `prints` broadcasts with.
        rows: R.
    """
    mixed = shifted(splitmix64(prints ^ keys), 32)
    return shifted(mixed * rows, 32)


def lookup(spec: HashSpec, salt: str, chunks: int, prints: Tensor) -> Tensor:
    """Returns the rows, (N, c) int64, of values given as fingerprints (N,), on their device; as `HashSpec.lookup`."""
    keys = torch.from_numpy(chunk_keys(salt, chunks).view(np.int64)).to(prints.device)
    return rows_of(prints.unsqueeze(1), keys, spec.rows)


def exact_lookup(vocabulary: NDArray[np.uint64], prints: Tensor, start: int, stride: int, chunks: int) -> Tensor:
    """Returns the rows, (N, c) int64, of the values of an exact feature; -1 for a value that it does not know.

    Args:
        vocabulary: Fingerprints of the values with rows of their own, in the order of their rows.
        prints: Fingerprints (N,), int64 with the bits of uint64.
        start, stride: As `Schema.exact_region` returns them.
        chunks: c.
    """
    known = vocabulary.view(np.int64)
    order = np.argsort(known)
    ordered = torch.from_numpy(known[order]).to(prints.device)
    place = torch.searchsorted(ordered, prints).clamp(max=len(ordered) - 1)
    number = torch.from_numpy(order).to(prints.device)[place]
    rows = start + number.unsqueeze(1) * stride + torch.arange(chunks, device=prints.device)
    return torch.where((ordered[place] == prints).unsqueeze(1), rows, -1)
