"""Matches a retrained codebook to its predecessor: new codes take the names of the old codes they replace.

A codebook names its codes by chance. After a retraining, an item's code changes although the item did not. Matching
renames new codes, node by node from the root, so that as many items as possible keep their old code (Hungarian
assignment on the items that a new and an old code share). The names of a level depend on the node above, so the
codebook itself cannot be permuted. `Relabelled` stores the names beside it and remains a function of the vector alone.

Shape letters: N items, Q levels, K codes a level, n nodes of one depth.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import scipy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.errors import BundleError, DatasetError
from models.semantic_id.codebook.quantizer import DESCRIPTION, Quantizer

KIND = "relabelled"
_NAMES, _BASE = "names.safetensors", "base"


@dataclass(frozen=True)
class Names:
    """Names of one level's codes.

    Attributes:
        nodes: (n,) int64, sorted: known nodes of the depth above as `number of their parent · K + code`; the root's
            level has one node, 0.
        names: (n, K) uint16: under a node, the name of each code; a permutation.
    """

    nodes: NDArray[np.int64]
    names: NDArray[np.uint16]


class Relabelled:
    """Quantizer that renames the codes of another quantizer.

    Args:
        base: Quantizer that codes the vectors.
        levels: Q tables; under a node that a table does not contain, codes keep the base's names.
    """

    def __init__(self, base: Quantizer, levels: tuple[Names, ...]) -> None:
        self.base = base
        self._levels = levels
        self._originals = tuple(np.argsort(level.names, axis=1).astype(np.uint16) for level in levels)

    @property
    def id(self) -> str:
        digest = hashlib.sha256(self.base.id.encode())
        for level in self._levels:
            digest.update(level.nodes.astype("<i8").tobytes() + level.names.astype("<u2").tobytes())
        return f"{self.base.id.rpartition('-')[0]}-{digest.hexdigest()[:12]}"

    @property
    def levels(self) -> int:
        return self.base.levels

    @property
    def codes(self) -> int:
        return self.base.codes

    def encode(self, vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Maps (N, D) float32 to codes (N, Q) uint16; errors are the base's."""
        return self.rename(self.base.encode(vectors))

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Maps codes (N, Q) back to vectors (N, D) float32."""
        return self.base.decode(self._walk(codes, self._originals, renamed=True))

    def rename(self, codes: NDArray[np.uint16]) -> NDArray[np.uint16]:
        """Returns the base's codes (N, Q) by their names."""
        return self._walk(codes, tuple(level.names for level in self._levels), renamed=False)

    def _walk(
        self, codes: NDArray[np.uint16], tables: tuple[NDArray[np.uint16], ...], *, renamed: bool
    ) -> NDArray[np.uint16]:
        given = np.asarray(codes)
        found = given.astype(np.uint16, copy=True)
        node = np.zeros(len(given), dtype=np.int64)
        for depth, (level, table) in enumerate(zip(self._levels, tables, strict=True)):
            place = _place(level.nodes, node)
            known = place >= 0
            found[known, depth] = table[place[known], given[known, depth]]
            original = found[:, depth] if renamed else given[:, depth]
            node = np.where(known, place * self.codes + original, -1)
        return found

    def save(self, directory: Path) -> None:
        """Writes everything `load` needs into an existing empty directory."""
        (directory / _BASE).mkdir()
        self.base.save(directory / _BASE)
        tensors = {f"nodes.{depth}": level.nodes for depth, level in enumerate(self._levels)}
        save_file(
            tensors | {f"names.{depth}": level.names for depth, level in enumerate(self._levels)}, directory / _NAMES
        )
        (directory / DESCRIPTION).write_bytes(msgspec.json.encode({"kind": KIND, "id": self.id}))


def load(directory: Path, load_base: Callable[[Path], Quantizer]) -> Relabelled:
    """Loads a codebook that `save` wrote.

    Raises:
        BundleError: A file is missing or cut short, or the names do not give the id they were saved under.
    """
    base = load_base(directory / _BASE)
    try:
        tensors = load_file(directory / _NAMES)
        levels = tuple(Names(tensors[f"nodes.{depth}"], tensors[f"names.{depth}"]) for depth in range(base.levels))
        expected = msgspec.json.decode((directory / DESCRIPTION).read_bytes())["id"]
    except (msgspec.DecodeError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise BundleError(f"{directory} does not hold a whole codebook: {error}; fetch or fit it again") from error
    found = Relabelled(base, levels)
    if found.id != expected:
        raise BundleError(f"{directory / _NAMES}: is codebook {found.id}, expected {expected}")
    return found


def match(new: Quantizer, codes: NDArray[np.uint16], old: NDArray[np.uint16]) -> Relabelled:
    """Renames the codes of a new codebook after the old ones.

    Args:
        new: Retrained codebook.
        codes: (N, Q) codes of the new codebook for items that both codebooks know.
        old: (N, Q) codes of the old codebook for the same items.

    Raises:
        DatasetError: The two differ in shape, or old codes are beyond K.
    """
    if codes.shape != old.shape or codes.shape[1] != new.levels or (old.size and old.max() >= new.codes):
        raise DatasetError(
            f"codes: matching needs the same items coded twice, by {new.levels} x {new.codes}; got {codes.shape} new "
            f"and {old.shape} old ones; refit with the old codebook's levels and codes"
        )
    levels: list[Names] = []
    node = np.zeros(len(codes), dtype=np.int64)
    # Items whose names so far are the old ones: only they can keep the codes that follow.
    kept = np.ones(len(codes), dtype=np.bool_)
    for depth in range(new.levels):
        nodes, place = np.unique(node, return_inverse=True)
        names = np.tile(np.arange(new.codes, dtype=np.uint16), (max(len(nodes), 1), 1))
        order = np.argsort(place, kind="stable")
        for number, members in enumerate(np.split(order, np.flatnonzero(np.diff(place[order])) + 1)):
            own = members[kept[members]]
            if len(own):
                names[number] = _assigned(codes[own, depth], old[own, depth], new.codes)
        levels.append(Names(nodes if len(nodes) else np.zeros(1, dtype=np.int64), names))
        kept &= names[place, codes[:, depth]] == old[:, depth]
        node = place * new.codes + codes[:, depth]
    return Relabelled(new, tuple(levels))


def _assigned(codes: NDArray[np.uint16], old: NDArray[np.uint16], count: int) -> NDArray[np.uint16]:
    """Names codes (K,) so that most items (n,) keep their code; codes without items take unused names."""
    mine, row = np.unique(codes, return_inverse=True)
    theirs, column = np.unique(old, return_inverse=True)
    shared = np.zeros((len(mine), len(theirs)), dtype=np.int64)
    np.add.at(shared, (row, column), 1)
    rows, columns = scipy.optimize.linear_sum_assignment(shared, maximize=True)
    names = np.full(count, count, dtype=np.int64)
    names[mine[rows]] = theirs[columns]
    free = np.setdiff1d(np.arange(count), theirs[columns], assume_unique=True)
    # A code whose own name is free keeps it.
    open_ = np.flatnonzero(names == count)
    same = np.intersect1d(open_, free, assume_unique=True)
    names[same] = same
    names[np.setdiff1d(open_, same, assume_unique=True)] = np.setdiff1d(free, same, assume_unique=True)
    return names.astype(np.uint16)


def _place(sorted_values: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the index of each wanted value, -1 if it is absent."""
    place = np.searchsorted(sorted_values, wanted)
    inside = np.minimum(place, len(sorted_values) - 1)
    return np.where(sorted_values[inside] == wanted, inside, -1)
