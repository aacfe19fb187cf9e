"""Rows of the table in files: one file of all rows, or a directory of files, each of one range of rows.

    table.safetensors              all rows: weight (R, D) float32, accumulator (R,) float32
    table/rows-00000.safetensors   rows of the first range, in the same form; the next range is in the next file

A training in one process writes one file. A training in N processes writes N files, each process its own rows, so no
process ever holds the table whole. Both forms are read by any number of processes.

Shape letters: R rows, D dim, N ranges, V values.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from features.errors import BundleError
from models.table.batch import Batch
from models.table.reference import pool
from models.table.schema import Schema

ONE_FILE, RANGES = "table.safetensors", "table"
"""Name of the file of all rows, and of the directory of the ranges' files."""


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a table, from `low` up to and without `high`."""

    low: int
    high: int

    def __len__(self) -> int:
        return self.high - self.low


def row_ranges(rows: int, count: int) -> list[RowRange]:
    """Returns the ranges of `rows` rows over `count` processes, as TorchRec cuts them: R / N each, rounded up.

    The last ranges may be shorter, or empty.
    """
    height = -(-rows // count)
    return [RowRange(min(rows, place * height), min(rows, (place + 1) * height)) for place in range(count)]


def write_range(directory: Path, number: int, weight: Tensor, accumulator: Tensor) -> None:
    """Writes the file of one range below an existing directory."""
    (directory / RANGES).mkdir(exist_ok=True)
    tensors = {"weight": weight.contiguous(), "accumulator": accumulator.contiguous()}
    save_file(tensors, directory / RANGES / f"rows-{number:05d}.safetensors")


def write_rows(directory: Path, weight: Tensor, accumulator: Tensor, *, ranges: int = 1) -> None:
    """Writes a table (R, D) and its optimizer state (R,) below an existing directory.

    Args:
        directory: Directory that gets the file, or the directory of files.
        weight: Rows.
        accumulator: State of row-wise Adagrad.
        ranges: Number of files.
    """
    if ranges == 1:
        save_file({"weight": weight, "accumulator": accumulator}, directory / ONE_FILE)
        return
    for number, own in enumerate(row_ranges(len(weight), ranges)):
        write_range(directory, number, weight[own.low : own.high], accumulator[own.low : own.high])


def row_files(directory: Path) -> list[Path]:
    """Returns the files of the rows below a directory, in the order of the rows. Empty if there are none."""
    one = directory / ONE_FILE
    return [one] if one.is_file() else sorted((directory / RANGES).glob("rows-*.safetensors"))


def copy_rows(source: Path, destination: Path) -> None:
    """Copies the files of the rows from one directory to another, file by file, without reading them as a table."""
    for path in row_files(source):
        target = destination / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def load_rows(directory: Path, schema: Schema, table: Mapping[str, Tensor], own: RowRange | None = None) -> None:
    """Reads rows into a table, file by file, whatever the ranges of the files.

    Args:
        directory: Directory with the file, or with the directory of files.
        schema: Schema of R rows and D dim.
        table: `weight` (r, D) and, if it is wanted, `accumulator` (r,) to write to; r = R without `own`.
        own: Range of the rows to read. Default: all rows.

    Raises:
        BundleError: The files are missing, or do not hold R rows.
    """
    wanted = own or RowRange(0, schema.rows)
    for path, held in _places(directory, schema):
        low, high = max(wanted.low, held.low), min(wanted.high, held.high)
        if low < high:
            with safe_open(path, "pt") as file:
                for name, target in table.items():
                    rows = file.get_slice(name)[low - held.low : high - held.low]
                    target[low - wanted.low : high - wanted.low] = rows


def read_weight(directory: Path) -> NDArray[np.float32]:
    """Reads the rows (R, D) as one array. The pages of one file are read when they are used.

    Raises:
        BundleError: There are no files of rows, or they vanish meanwhile.
    """
    try:
        parts = [load_file(path)["weight"] for path in row_files(directory)]
    except FileNotFoundError as error:
        raise BundleError(
            f"{directory}: the files of the table vanished while they were read; fetch it again"
        ) from error
    if not parts:
        raise BundleError(f"{directory}: neither {ONE_FILE} nor files of {RANGES}/; fetch the bundle again")
    weight: NDArray[np.float32] = (parts[0] if len(parts) == 1 else torch.cat(parts)).numpy()
    return weight


class FileTable(nn.Module):
    """Table that reads rows from files and never trains. A batch reads the pages of its own rows alone.

    Args:
        directory: Directory with the file, or with the directory of files.
        schema: Schema of R rows and D dim.

    Raises:
        BundleError: The files are missing, or do not hold R rows.
    """

    def __init__(self, directory: Path, schema: Schema) -> None:
        super().__init__()
        files = _places(directory, schema)
        # Not buffers: a module's state is what it owns, and these pages belong to the files.
        self._parts: Sequence[Tensor] = [load_file(path)["weight"] for path, _ in files]
        self._starts = np.array([held.low for _, held in files], dtype=np.int64)
        self._dim = schema.dim

    def forward(self, batch: Batch) -> Tensor:
        distinct, place = np.unique(batch.values.numpy(), return_inverse=True)
        return pool(self.rows(distinct), replace(batch, values=torch.from_numpy(place.astype(np.int64))))

    def rows(self, distinct: NDArray[np.int64]) -> Tensor:
        """Reads rows (m, D) by distinct ascending numbers (m,)."""
        rows = torch.empty(len(distinct), self._dim)
        ends = [*np.searchsorted(distinct, self._starts[1:]).tolist(), len(distinct)]
        begin = 0
        for part, start, end in zip(self._parts, self._starts.tolist(), ends, strict=True):
            rows[begin:end] = part[torch.from_numpy(distinct[begin:end] - start)]
            begin = end
        return rows

    def step(self) -> None:
        """Does nothing: the rows do not change."""


def _places(directory: Path, schema: Schema) -> list[tuple[Path, RowRange]]:
    """Returns each file and the range of rows it holds. Raises BundleError if together they are not R rows."""
    found: list[tuple[Path, RowRange]] = []
    low = 0
    for path in row_files(directory):
        with safe_open(path, "pt") as file:
            height, dim = file.get_slice("weight").get_shape()
        if dim != schema.dim:
            raise BundleError(f"{path}: its rows have {dim} numbers, the schema's {schema.dim}; fetch the files again")
        found.append((path, RowRange(low, low + height)))
        low += height
    if low != schema.rows:
        raise BundleError(f"{directory}: its files hold {low:,} rows, the schema {schema.rows:,}; fetch them again")
    return found
