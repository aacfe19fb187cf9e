"""Columns of entities on a device: from the lookups of the host, or hashed there from fingerprints.

Shape letters: N entities, n values in all, m distinct values, c chunks.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.device import Device
from features.hashing import fingerprint, value_keys
from models.table.admission import Admission
from models.table.batch import Entities
from models.table.device import hashing
from models.table.device.source import Column, SourceRows
from models.table.schema import Feature, Numeric, Schema

_MOST_STDS = 10.0


def looked_up(entities: Entities, name: str, device: Device) -> Column:
    """Returns a column whose values the host has looked up."""
    codes, lengths, rows, known = entities.coded(name)
    single = bool((lengths == 1).all())
    return Column(
        device.put(codes),
        None if single else device.put(lengths),
        device.put(np.where(known[:, None], rows, -1)),
        max(int(lengths.max(initial=0)), 1),
        bool(known.all()),
    )


def hashed(
    schema: Schema,
    feature: Feature,
    codes: Tensor,
    lengths: Tensor | None,
    prints: Tensor,
    *,
    most: int,
    unknown: NDArray[np.bool_] | None,
) -> Column:
    """Returns a column whose values the device hashes.

    Args:
        schema: Schema of the feature.
        feature: Feature with the most chunks that reads the column.
        codes, lengths, most: As in `Column`.
        prints: (m,) int64 fingerprints of the distinct values, with the bits of uint64.
        unknown: (m,) True for values that are not admitted; None if all are.
    """
    if feature.exact:
        start, stride = schema.exact_region(feature.salt)
        vocabulary = fingerprint(feature.vocabulary)
        rows = hashing.exact_lookup(vocabulary, prints, start, stride, feature.chunks)
        return Column(codes, lengths, rows, most, known=False)
    rows = hashing.lookup(schema.hash_spec, feature.salt, feature.chunks, prints)
    if unknown is None or not unknown.any():
        return Column(codes, lengths, rows, most, known=True)
    mask = torch.from_numpy(unknown).to(rows.device).unsqueeze(1)
    return Column(codes, lengths, torch.where(mask, -1, rows), most, known=False)


def not_admitted(admission: Admission, feature: Feature, prints: NDArray[np.uint64]) -> NDArray[np.bool_] | None:
    """Returns, for values given as fingerprints (m,), whether they are not admitted; None if all are."""
    if feature.exact or not admission.threshold:
        return None
    return ~admission.admits(value_keys(feature.salt, prints))


def scaled(values: Tensor, numeric: Numeric, *, logarithm: bool) -> Tensor:
    """Returns a numeric feature (N,) float32 of its values, as `Numeric` says; a missing value becomes 0."""
    wide = values.double()
    narrow = (wide.sign() * wide.abs().log1p() if logarithm else wide).float()
    found = ((narrow - numeric.mean) / numeric.std).clamp(-_MOST_STDS, _MOST_STDS)
    return torch.where(values.isfinite(), found, 0.0)


class Dimensions:
    """Users and items of an assembler on a device, which all blocks of a training share.

    Args:
        schema: Schema of the assembler.
        users, items: Entities.
        vectors: (items, width) float32 content vectors, or None.
        device: Device.
    """

    def __init__(
        self, schema: Schema, users: Entities, items: Entities, vectors: NDArray[np.float32] | None, device: Device
    ) -> None:
        self.schema = schema
        numbered = list(enumerate(schema.features))
        self.sources: dict[str, SourceRows] = {}
        for name, entities in (("user", users), ("item", items)):
            own = [(number, one, looked_up(entities, one.column, device)) for number, one in numbered if one.of == name]
            self.sources[name] = SourceRows(entities.size, own, device.torch)
        past = [(number, one, looked_up(items, one.column, device)) for number, one in numbered if one.of == "history"]
        self.past = SourceRows(items.size, past, device.torch) if past else None
        self.content = device.put(vectors) if schema.content and vectors is not None else None
        self.numeric: dict[str, Tensor] = {}
        for one in schema.numeric:
            if one.of in ("user", "item"):
                entities = users if one.of == "user" else items
                self.numeric[one.name] = device.put(entities.numeric(one.name, np.arange(entities.size)))
