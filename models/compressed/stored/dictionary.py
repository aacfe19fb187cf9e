"""The value dictionary, which a method must store to give each value an id of its own.

It takes eight bytes a value: the fingerprints, sorted within each field. A value's id is the index of its fingerprint.
A hash needs no dictionary, so methods with and without a dictionary are only comparable if its bytes are counted.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.compressed.fields import Fields


def dictionary_bytes(values: int, fields: Fields) -> int:
    """Returns the bytes of a dictionary of so many values."""
    return 8 * values + 4 * len(fields.names)


class Dictionary(nn.Module):
    """Dictionary of ids of chosen values, numbered through all fields.

    Args:
        fields: All values.
        chosen: (N,) bool, values that get an id.

    Attributes:
        fingerprints: (V,) uint64, stored: of the chosen values, field by field, ascending within each.
        sizes: (F,) int32, stored: number of values of each field in the dictionary.
        ids: (N,) int64 in [0, V), or -1 for a value without an id; recomputed from the stored tensors.
    """

    def __init__(self, fields: Fields, chosen: NDArray[np.bool_] | None = None) -> None:
        super().__init__()
        self._fields = fields
        offsets = fields.offsets
        chosen = np.ones(fields.values, dtype=bool) if chosen is None else chosen
        parts = [np.sort(fields.fingerprints[a:b][chosen[a:b]]) for a, b in pairwise(offsets)]
        self.fingerprints: Tensor
        self.sizes: Tensor
        self.ids: Tensor
        self.register_buffer("fingerprints", torch.from_numpy(np.concatenate(parts)))
        self.register_buffer("sizes", torch.tensor([len(part) for part in parts], dtype=torch.int32))
        self.register_buffer("ids", torch.empty(fields.values, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_find)
        _find(self, None)

    def __len__(self) -> int:
        return len(self.fingerprints)

    def find(self) -> None:
        """Looks all values up in the stored fingerprints."""
        prints, ends = self.fingerprints.numpy(), np.cumsum(self.sizes.numpy())
        offsets = self._fields.offsets
        found = np.full(self._fields.values, -1, dtype=np.int64)
        for f, end in enumerate(ends):
            held = prints[end - int(self.sizes[f]) : end]
            wanted = self._fields.fingerprints[offsets[f] : offsets[f + 1]]
            place = np.searchsorted(held, wanted)
            here = np.zeros(len(wanted), dtype=bool)
            inside = place < len(held)
            here[inside] = held[place[inside]] == wanted[inside]
            found[offsets[f] : offsets[f + 1]][here] = place[here] + end - len(held)
        self.ids.copy_(torch.from_numpy(found))


def _find(module: nn.Module, _: Any) -> None:
    assert isinstance(module, Dictionary)
    module.find()
