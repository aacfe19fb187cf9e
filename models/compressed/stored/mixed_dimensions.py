"""Mixed dimensions: the larger a field, the narrower its rows (Ginart et al., ISIT 2021).

    d_f = D · (N_f / N_min)^(-α), rounded, within [1, D]        e(v) = P_f · E_f[v]

A field of full width needs no projection. Stored: tables, projections and the dictionary. The knob is α.
"""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.compressed.fields import Fields
from models.compressed.method import FLOAT_BYTES, EmbeddingMethod, largest, seeded, uniform
from models.compressed.stored.dictionary import Dictionary, dictionary_bytes

_STEPS = 4_000  # steps of α, from 4 down to 0


class MixedDimensions(EmbeddingMethod):
    """Table and projection for each field.

    Args:
        widths: (F,) widths of the fields' rows.
    """

    name = "mixed-dimensions"

    def __init__(self, fields: Fields, dim: int, widths: NDArray[np.int64], *, seed: int) -> None:
        super().__init__()
        generator = seeded(seed)
        self.dictionary = Dictionary(fields)
        self.starts = [int(start) for start in fields.offsets[:-1]]
        self.tables, self.projections = nn.ParameterList(), nn.ParameterDict()
        for f, (size, width) in enumerate(zip(fields.sizes, widths, strict=True)):
            self.tables.append(uniform((int(size), int(width)), generator))
            if width < dim:
                start = torch.randn(int(width), dim, generator=generator) / float(width) ** 0.5
                self.projections[str(f)] = nn.Parameter(start)

    @classmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        def bytes_at(step: int) -> int:
            widths = _widths(fields, dim, step)
            projected = widths[widths < dim].sum() * dim
            floats = int((fields.sizes * widths).sum() + projected)
            return floats * FLOAT_BYTES + dictionary_bytes(fields.values, fields)

        step = largest(cls.name, range(_STEPS + 1), bytes_at, budget)
        return cls(fields, dim, _widths(fields, dim, step), seed=seed)

    def forward(self, codes: Tensor) -> Tensor:
        ids = self.dictionary.ids[codes]
        found = []
        for f, (table, start) in enumerate(zip(self.tables, self.starts, strict=True)):
            rows = functional.embedding(ids[:, f] - start, table)
            found.append(rows @ self.projections[str(f)] if str(f) in self.projections else rows)
        return torch.stack(found, dim=1)


def _widths(fields: Fields, dim: int, step: int) -> NDArray[np.int64]:
    alpha = 4 * (1 - step / _STEPS)
    exact = dim * (fields.sizes / fields.sizes.min()) ** -alpha
    widths: NDArray[np.int64] = np.clip(np.round(exact), 1, dim).astype(np.int64)
    return widths
