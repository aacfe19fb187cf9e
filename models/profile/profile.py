"""Profile of training: the distribution of each feature and of the score, with which served ones are compared.

Each feature has up to four measures, and a measure has cells:

    values     numbers: below the smallest, ten bins of equal share, above the largest
               categories: the ten most frequent rows of the table, and the rest
    missing    present, missing
    unseen     values with a row of the table, values without: too rare in training, or not in the vocabulary
    length     number of values: 0, 1, 2, 3-4, 5-8, ..., more than 64

`values` and `unseen` are of examples with a value. A unit is a user: an example counts 1 / the user's examples, so that
a user with a thousand examples counts once. A category is known by its row, as a server reads it, so two values that
share a row are one.

Shape letters: E examples, U units, C cells, V values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError
from models.table.batch import Batch
from models.table.schema import Feature, Schema

FILE = "profile.json"
"""Name of the file in a bundle."""
VERSION = 1
SCORE = "score"
"""Name of the score among the features."""
BINS, TOP = 10, 10
LENGTH_EDGES = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
Measure = Literal["values", "missing", "unseen", "length"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class ProfileMeasure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Distribution of one measure of a feature.

    Attributes:
        feature: Name of the feature, or `score`.
        measure: Name of the measure.
        shares: (C,) share of each cell, a mean over units.
        units: Number of independent observations with the variance of the shares: Kish's effective number. 0: unknown.
        edges: (C - 1,) largest number of each cell but the last. Empty for categories.
        rows: (C - 1,) rows of the table of the most frequent categories. Empty for numbers.
        held: (C,) shares in the test part. Empty if unknown.
        held_units: Effective number of observations of `held`.
    """

    feature: str
    measure: Measure
    shares: list[float]
    units: float
    edges: list[float] = []
    rows: list[int] = []
    held: list[float] = []
    held_units: float = 0.0

    @property
    def name(self) -> str:
        """Name of feature and measure for messages, such as `item.format` and `item.format missing`."""
        return self.feature if self.measure == "values" else f"{self.feature} {self.measure}"

    @property
    def is_share(self) -> bool:
        """True for shares of missing or unseen values."""
        return self.measure in ("missing", "unseen")

    @property
    def ordered(self) -> bool:
        """True if the cells have an order."""
        return bool(self.edges)


class TrainingProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Profile of a bundle's training.

    Attributes:
        version: Version of this format.
        rows: Number of rows of the training part that the profile counts.
        users: Number of their units.
        held_rows: Number of rows of the test part, of which the score's shares are, too.
        measures: The measures.
    """

    version: int
    rows: int
    users: int
    held_rows: int
    measures: list[ProfileMeasure]


@dataclass(frozen=True)
class FeatureValues:
    """Values of one feature of E examples.

    Attributes:
        rows: (V,) rows of the table, example after example in any order. Empty for a number.
        example: (V,) example of each row.
        lengths: (E,) number of rows of each example.
        unread: (E,) number of values without a row. None if it is unknown.
        numbers: (E,) number, 0 if it is missing. None for a category.
    """

    rows: Ints
    example: Ints
    lengths: Ints
    unread: Ints | None
    numbers: Floats | None = None


@dataclass(frozen=True)
class Observations:
    """Cells of the examples that have a measure.

    Attributes:
        example: (N,) number of the example.
        cell: (N,) number of the cell.
        weight: (N,) weight. The weights of an example sum to 1.
    """

    example: Ints
    cell: Ints
    weight: Floats


def number_values(numbers: NDArray[np.floating]) -> FeatureValues:
    """Returns the values of a numeric feature, (E,); 0 is missing, as in the network's input."""
    nothing = np.zeros(0, dtype=np.int64)
    return FeatureValues(nothing, nothing, np.zeros(len(numbers), dtype=np.int64), None, numbers.astype(np.float64))


def category_values(
    schema: Schema, batch: Batch, features: Sequence[Feature], rows: Ints | None = None, *, unread: Ints | None
) -> Iterator[tuple[str, FeatureValues]]:
    """Yields the name and the values of each categorical feature of a batch.

    Args:
        schema: Schema of the features.
        batch: Lookups of the features.
        features: Features in the order of the batch.
        rows: Rows of which the batch's values are positions. None: the values are rows.
        unread: (E, features) number of values without a row. None if it is unknown.
    """
    lengths = batch.lengths.numpy().reshape(-1, batch.size)
    ends = np.concatenate([[0], np.cumsum(lengths.sum(axis=1))])
    values = batch.values.numpy()
    first, everyone = 0, np.arange(batch.size)
    for place, feature in enumerate(features):
        # A value reads as many rows as the feature has chunks, of which the first tells the value.
        lookups = range(first, first + schema.slots(feature) * feature.chunks, feature.chunks)
        first += schema.slots(feature) * feature.chunks
        found = np.concatenate([values[ends[number] : ends[number + 1]] for number in lookups])
        example = np.concatenate([np.repeat(everyone, lengths[number]) for number in lookups])
        counts = lengths[list(lookups)].sum(axis=0)
        without = None if unread is None else unread[:, place]
        yield feature.name, FeatureValues(found if rows is None else rows[found], example, counts, without)


def observed(measure: ProfileMeasure, values: FeatureValues) -> Observations | None:
    """Returns the cells of examples. None if the examples do not tell the measure."""
    if values.numbers is not None:
        present = values.numbers != 0
        if measure.measure == "missing":
            return _each(np.arange(len(present)), (~present).astype(np.int64))
        chosen = np.flatnonzero(present)
        return _each(chosen, np.searchsorted(measure.edges, values.numbers[chosen], side="left"))
    if measure.measure == "values":
        return Observations(values.example, _places(measure.rows, values.rows), 1 / values.lengths[values.example])
    if values.unread is None:
        return None
    held = values.lengths + values.unread
    if measure.measure == "missing":
        return _each(np.arange(len(held)), (held == 0).astype(np.int64))
    if measure.measure == "length":
        return _each(np.arange(len(held)), np.searchsorted(measure.edges, held, side="left"))
    some = np.flatnonzero(held)
    share = values.unread[some] / held[some]
    cells = np.repeat([0, 1], len(some))
    return Observations(np.tile(some, 2), cells, np.concatenate([1 - share, share]))


def unit_shares(found: Observations, units: Ints, count: int, cells: int) -> Floats:
    """Returns the shares (U, C) of the units that have an observation.

    Args:
        found: The observations.
        units: (E,) number of each example's unit.
        count: Number of units.
        cells: C, the number of cells.
    """
    keys = units[found.example] * cells + found.cell
    sums = np.bincount(keys, weights=found.weight, minlength=count * cells).reshape(count, cells)
    totals = sums.sum(axis=1)
    shares: Floats = sums[totals > 0] / totals[totals > 0, None]
    return shares


def effective(units: int, mean: Floats, variance: Floats, *, most: float) -> float:
    """Returns the number of independent observations whose mean varies as that of some units' shares.

    The first-order correction of Rao & Scott (Annals of Statistics 1984): the mean design effect over the cells.

    Args:
        units: Number of units.
        mean: (C,) mean of the units' shares.
        variance: (C,) variance of the units' shares.
        most: Largest answer, the number of examples.
    """
    total = float(variance.sum())
    # Shares that are all alike do not tell how they vary.
    return min(units * float((mean * (1 - mean)).sum()) / total, most) if total > 0 else float(units)


def read_profile(path: Path) -> TrainingProfile:
    """Reads a profile.

    Raises:
        BundleError: The file is no profile, or of a version that this release does not read.
    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=TrainingProfile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"profile {path}: {error}; write it again with `tessera skew --write-profile`") from error
    if found.version != VERSION:
        raise BundleError(f"profile {path}: version {found.version}, this release reads {VERSION}; write it again")
    for measure in found.measures:
        cells = len(measure.edges or measure.rows) + 1
        if len(measure.shares) != (2 if measure.is_share else cells):
            raise BundleError(f"profile {path}: {measure.name} has {len(measure.shares)} shares, expected {cells}")
    return found


def write_profile(profile: TrainingProfile, path: Path) -> None:
    """Writes a profile, one measure a line."""
    lines = [msgspec.json.encode(measure).decode() for measure in profile.measures]
    head = msgspec.json.encode(msgspec.structs.replace(profile, measures=[])).decode().removesuffix("]}")
    path.write_text(head + "\n " + ",\n ".join(lines) + "\n]}\n" if lines else head + "]}\n")


def _each(example: Ints, cell: Ints) -> Observations:
    return Observations(example, cell, np.ones(len(example)))


def _places(known: Sequence[int], rows: Ints) -> Ints:
    """Returns the place of each row (V,) among the known ones, their number if it is not among them."""
    if not known:
        return np.zeros(len(rows), dtype=np.int64)
    order = np.argsort(known)
    ascending = np.array(known, dtype=np.int64)[order]
    place = np.minimum(np.searchsorted(ascending, rows), len(known) - 1)
    return np.where(ascending[place] == rows, order[place], len(known))
