"""Blocks of examples in files that a device reads as they are: numbers of values and their fingerprints, no strings.

A block of a frame holds the values of the events' own columns as strings. To map them to rows costs a processor longer
than a GPU's whole epoch. A packed block holds each distinct value's fingerprint once, and the number of its value for
each example. So it serves any table: the device hashes the fingerprints under the table's salts and rows.

Files are safetensors. The whole file is one copy to the device, where its tensors are views.
Shape letters: E examples, n values in all, m distinct values, V visits in all, C columns of the position path.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from features.durable import write_file
from features.errors import DatasetError
from features.hashing import fingerprint
from models.table.batch import Examples
from models.table.column_rows import coded
from models.table.placement import placement_cells
from models.table.schema import Schema

_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "F32": torch.float32, "F64": torch.float64}
_UNKNOWN = 2
_READERS, _PIECE = 8, 1 << 24


def pack(schema: Schema, block: pl.DataFrame, examples: Examples, path: Path) -> None:
    """Writes a block with the columns that a schema reads, whole or not at all.

    Args:
        schema: Schema; the file serves every schema that reads the same columns.
        block: Examples of the block with the events' own columns.
        examples: The same examples as columns.
        path: File to write.
    """
    arrays: dict[str, NDArray[Any]] = {
        "user": examples.user.astype(np.int32),
        "item": examples.item.astype(np.int32),
        "label": packed_labels(examples.targets),
    }
    if "history" in {one.of for one in schema.features} | {one.of for one in schema.numeric}:
        arrays["visits"] = np.diff(examples.history.offsets).astype(np.int32)
        arrays["history"] = examples.history.values.astype(np.int32)
    most: dict[str, str] = {}
    for name in schema.columns("event"):
        codes, lengths, distinct = coded(block[name])
        arrays[f"codes.{name}"] = codes
        arrays[f"prints.{name}"] = fingerprint(distinct.to_list()).view(np.int64)
        if (lengths != 1).any():
            arrays[f"lengths.{name}"] = lengths.astype(np.int32)
        most[name] = str(max(int(lengths.max(initial=0)), 1))
    for one in schema.numeric:
        if one.of == "event":
            wide = block[one.column].cast(pl.Float64).fill_null(np.nan).to_numpy()
            narrow = block.schema[one.column] == pl.Float32
            arrays[f"numeric.{one.column}"] = wide.astype(np.float32) if narrow else wide
    if examples.aggregates is not None:
        for place, name in enumerate(schema.aggregates.columns):
            arrays[f"aggregate.{name}"] = examples.aggregates[:, place]
    cells = placement_cells(schema.placement, block)
    if cells is not None:
        arrays["placement"] = cells
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_file(path, lambda aside: save_file(arrays, aside, metadata=most))


def packed_labels(labels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Returns labels (E,) or (E, T) as bytes; an unknown label is 2."""
    return np.where(np.isnan(labels), np.float32(_UNKNOWN), labels).astype(np.uint8)


def unpacked_labels(packed: Tensor) -> Tensor:
    """Returns what `packed_labels` was given, as float32."""
    labels = packed.float()
    return torch.where(labels == _UNKNOWN, torch.full_like(labels, torch.nan), labels)


@dataclass(frozen=True)
class PackedBlock:
    """File of one block.

    Attributes:
        path: File.
        size: Bytes of the file.
        places: Type, shape and first byte of each tensor, by name.
        most: Most values of an example, by column.
    """

    path: Path
    size: int
    places: Mapping[str, tuple[torch.dtype, tuple[int, ...], int]]
    most: Mapping[str, int]

    @property
    def height(self) -> int:
        """E, the number of examples."""
        return self.places["label"][1][0]

    def read(self, into: Tensor) -> None:
        """Reads the file into memory of the processor, (size,) uint8, piece by piece in several threads.

        Raises:
            DatasetError: The file is shorter than when it was opened.
        """
        view = memoryview(into.numpy())  # type: ignore[arg-type]
        file = os.open(self.path, os.O_RDONLY)

        def piece(start: int) -> None:
            end = min(start + _PIECE, self.size)
            while start < end:
                count = os.preadv(file, [view[start:end]], start)
                if not count:
                    raise DatasetError(
                        f"{self.path}: ends after {start:,} bytes; delete it, the next run packs it again"
                    )
                start += count

        try:
            starts = range(0, self.size, _PIECE)
            if len(starts) == 1:
                piece(0)
                return
            with ThreadPoolExecutor(min(_READERS, len(starts))) as readers:
                list(readers.map(piece, starts))
        finally:
            os.close(file)

    def tensors(self, held: Tensor) -> dict[str, Tensor]:
        """Returns the tensors of a file whose bytes (size,) lie on a device, as views."""
        found = {}
        for name, (dtype, shape, start) in self.places.items():
            end = start + int(np.prod(shape)) * dtype.itemsize
            found[name] = held[start:end].view(dtype).view(shape)
        return found

    def prints(self, column: str) -> NDArray[np.uint64]:
        """Reads the fingerprints (m,) of a column's distinct values alone."""
        _, shape, start = self.places[f"prints.{column}"]
        return np.fromfile(self.path, dtype=np.uint64, count=shape[0], offset=start)


def open_packed(path: Path) -> PackedBlock:
    """Reads the description of a packed block.

    Raises:
        DatasetError: The file holds no packed block.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            described = json.loads(file.read(length))
        most = {name: int(value) for name, value in described.pop("__metadata__", {}).items()}
        places = {
            name: (_DTYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
            for name, one in described.items()
        }
        size = max(8 + length + one["data_offsets"][1] for one in described.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DatasetError(
            f"{path}: holds no packed block ({error}); delete it, the next run packs it again"
        ) from error
    return PackedBlock(path, size, places, most)
