"""Aspects: what two items share in one respect, such as people or era, as a space of its own.

An item's vector in an aspect comes from its columns where they are filled, and from a head on its content vector where
they are not. Both lie in one space, so items of both kinds find each other.

    columns ─▶ sum of the values' vectors ─▶ unit vector ◀─ head (a step of a view) ◀─ content vector

Shape letters: N items, D content dim, V values, E aspect dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from features.content.chain import View, load_view
from features.content.encoder import content_id, load_part, unit
from features.content.step import Affine
from features.errors import DatasetError

Floats = NDArray[np.float32]
Row = Mapping[str, Any]
WIDTH = 256
"""Most values of a vector in an aspect's space."""
_DESCRIPTION, _TENSORS = "aspect.json", "aspect.safetensors"
_PENALTY = 1.0
_LEAST_FILLED = 20
_BINS = 16  # of a column of numbers


@dataclass(frozen=True)
class Aspect:
    """Space of one aspect.

    Attributes:
        name: Name of the aspect.
        columns: Columns that decide it.
        head: View of content vectors (N, D) in the aspect's space.
        values: V values, each as "column=value".
        table: (V, E) float32 vector of each value, weighted by its rarity.
        bins: Centres and widths of the bins of each column of numbers: (B + 1,) float64, the width last. The bins'
            vectors follow those of the values in `table`.
    """

    name: str
    columns: tuple[str, ...]
    head: View
    values: tuple[str, ...]
    table: Floats
    bins: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        """Hash of everything that the aspect computes with."""
        numbers = [f"{column} ".encode() + bins.tobytes() for column, bins in sorted(self.bins.items())]
        named = "\n".join((*self.columns, *self.values)).encode()
        return content_id("aspect", self.head.id.encode(), named, self.table.tobytes(), *numbers)

    @property
    def dim(self) -> int:
        """E, the width of the aspect's space."""
        return int(self.table.shape[1])

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {value: row for row, value in enumerate(self.values)}

    def of(self, vectors: Floats, rows: Sequence[Row]) -> Floats:
        """Returns items in the aspect's space, (N, E) float32 unit vectors.

        An item with neither a column nor content is a zero row.

        Args:
            vectors: (N, D) content vectors.
            rows: N items' columns by name; a column may be absent, null, a value or a list of values.
        """
        found = self.by_columns(rows)
        empty = ~np.any(found, axis=1)
        if empty.any():
            found[empty] = self.head.of(vectors[empty])
        return found

    def by_columns(self, rows: Sequence[Row]) -> Floats:
        """Returns items by their columns alone, (N, E) float32; a zero row where no column holds a known value."""
        sums = np.zeros((len(rows), self.dim), dtype=np.float64)
        for number, row in enumerate(rows):
            for column in self.columns:
                if column in self.bins:
                    sums[number] += self._of_number(column, row.get(column))
                    continue
                known = {self._row_of.get(f"{column}={value}") for value in parts(row.get(column))}
                # Ascending: a float sum depends on its order.
                for place in sorted(place for place in known if place is not None):
                    sums[number] += self.table[place]
        return unit(sums)

    def _of_number(self, column: str, value: Any) -> NDArray[np.float64]:
        first = len(self.values) + sum(
            len(self.bins[name]) - 1 for name in self.columns[: self.columns.index(column)] if name in self.bins
        )
        weights = _soft_bins(value, self.bins[column])
        found: NDArray[np.float64] = (weights[:, None] * self.table[first : first + len(weights)]).sum(axis=0)
        return found

    def save(self, directory: Path) -> None:
        """Writes everything that `load_aspect` needs into an existing empty directory."""
        (directory / "head").mkdir()
        self.head.save(directory / "head")
        numbers = {f"bins.{column}": bins for column, bins in self.bins.items()}
        save_file({"table": np.ascontiguousarray(self.table), **numbers}, directory / _TENSORS)
        description = {"id": self.id, "name": self.name, "columns": self.columns, "values": self.values}
        (directory / _DESCRIPTION).write_bytes(msgspec.json.encode(description))


def load_aspect(directory: Path) -> Aspect:
    """Loads an aspect that `Aspect.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """

    def read(found: dict[str, Any]) -> Aspect:
        tensors = load_file(directory / _TENSORS)
        numbers = {name.removeprefix("bins."): bins for name, bins in tensors.items() if name.startswith("bins.")}
        head, columns, values = load_view(directory / "head"), tuple(found["columns"]), tuple(found["values"])
        return Aspect(found["name"], columns, head, values, tensors["table"], numbers)

    return load_part(directory, _DESCRIPTION, read, what="aspect", remedy="fit the aspect again")


def parts(value: Any) -> list[str]:
    """Returns the values in a cell of an aspect's column: those of a list, or of a text split at commas, ; and |."""
    if value is None:
        return []
    if isinstance(value, str):
        for separator in ";|":
            value = value.replace(separator, ",")
        value = value.split(",")
    elif not isinstance(value, (list, tuple, set)):
        value = [value]
    named = (str(part).strip() for part in value if part is not None)
    return [part for part in named if part]


def fit_aspect(
    name: str,
    columns: Sequence[str],
    vectors: Floats,
    rows: Sequence[Row],
    *,
    source: str,
    width: int = WIDTH,
    seed: int = 0,
) -> Aspect:
    """Fits the space of an aspect, and the head that leads into it from content vectors.

    The values' vectors are the singular vectors of the items' values weighted by rarity. The head is a ridge
    regression from the content vectors to the items' vectors by column.

    Args:
        name: Name of the aspect.
        columns: Columns that decide it. A column whose values are all numbers counts near numbers as alike.
        vectors: (N, D) content vectors.
        rows: N items' columns by name.
        source: Id of the encoder of the vectors.
        width: Most values of a vector in the aspect's space.
        seed: Seed of the singular vectors.

    Raises:
        DatasetError: Too few items with content have a value in a column.
    """
    bins = {column: found for column in columns if (found := _bins([row.get(column) for row in rows])) is not None}
    values, weights = _weights(rows, columns, bins)
    filled = np.flatnonzero((np.diff(weights.indptr) > 0) & np.any(vectors, axis=1))
    if len(filled) < _LEAST_FILLED:
        raise DatasetError(
            f"[items.aspects] {name}: {len(filled)} items with content have a value in {', '.join(columns)}, expected "
            f"{_LEAST_FILLED} at least; name columns that are filled"
        )
    table = _value_table(weights, width, seed)
    unfitted = Aspect(name, tuple(columns), View(name, source), tuple(values), table, bins)
    targets = unfitted.by_columns([rows[row] for row in filled.tolist()]).astype(np.float64)
    step = _ridge(vectors[filled].astype(np.float64), targets)
    return Aspect(name, tuple(columns), View(name, source, (step,)), tuple(values), table, bins)


def _ridge(inputs: NDArray[np.float64], targets: NDArray[np.float64]) -> Affine:
    source, target = inputs.mean(axis=0), targets.mean(axis=0)
    centred = inputs - source
    covariance = centred.T @ centred + _PENALTY * np.eye(inputs.shape[1])
    return Affine(matrix=np.linalg.solve(covariance, centred.T @ (targets - target)), source=source, target=target)


def _weights(
    rows: Sequence[Row], columns: Sequence[str], bins: Mapping[str, NDArray[np.float64]]
) -> tuple[list[str], Any]:
    """Returns the values, and (N, V + bins) sparse weights of each item's values, rare values more."""
    from scipy import sparse

    found = [
        sorted({f"{column}={value}" for column in columns if column not in bins for value in parts(row.get(column))})
        for row in rows
    ]
    values = sorted({value for item in found for value in item})
    place = {value: number for number, value in enumerate(values)}
    index = [place[value] for item in found for value in item]
    pointers = np.concatenate([[0], np.cumsum([len(item) for item in found])])
    counts = np.bincount(np.array(index, dtype=np.int64), minlength=len(values))
    rarity = np.log((1 + len(rows)) / (1 + counts)) + 1
    named = sparse.csr_matrix(
        (rarity[np.array(index, dtype=np.int64)], index, pointers), shape=(len(rows), len(values))
    )
    soft = [
        np.stack([_soft_bins(row.get(column), bins[column]) for row in rows]) for column in columns if column in bins
    ]
    return values, sparse.hstack([named, *map(sparse.csr_matrix, soft)], format="csr")


def _value_table(weights: Any, width: int, seed: int) -> Floats:
    """Returns the vector of each value times the value's rarity, (V, E) float32."""
    from sklearn.preprocessing import normalize
    from sklearn.utils.extmath import randomized_svd

    columns = weights.tocsc()
    counts = np.maximum(np.diff(columns.indptr), 1)
    rarity = np.asarray(columns.max(axis=0).todense()).ravel() if columns.nnz else counts * 0.0
    if weights.shape[1] <= width:
        alone: Floats = np.diag(rarity).astype(np.float32)
        return alone
    _, _, axes = randomized_svd(normalize(weights), min(width, weights.shape[0]), random_state=seed)
    table: Floats = (rarity[:, None] * axes.T).astype(np.float32)
    return table


def _bins(values: Sequence[Any]) -> NDArray[np.float64] | None:
    """Returns centres and width of the bins of a column of numbers; None if the column holds something else."""
    known = [value for value in values if value is not None]
    if not known or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        return None
    numbers = np.array(known, dtype=np.float64)
    low, high = np.quantile(numbers[np.isfinite(numbers)], [0.02, 0.98])
    count = min(_BINS, len(np.unique(numbers)))
    centres = np.linspace(low, high, count)
    return np.append(centres, (high - low) / max(count - 1, 1) or 1.0)


def _soft_bins(value: Any, bins: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the weight of each bin (B,) for a number: a bell around it, so that near numbers are alike."""
    centres, width = bins[:-1], float(bins[-1])
    if value is None or not np.isfinite(value):
        return np.zeros(len(centres))
    inside = float(np.clip(value, centres[0], centres[-1]))
    found: NDArray[np.float64] = np.exp(-np.square((centres - inside) / width))
    return found
