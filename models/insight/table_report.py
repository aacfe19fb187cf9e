"""Reports on a bundle's table: collisions, readers' angles, norms, bytes, and which feature to widen.

Values that share rows do no harm if their readers are at right angles. Values of one feature that share all their rows
are one value to the ranker (Coleman et al., "Unified Embedding", NeurIPS 2023, section 4). Everything is computed from
the bundle alone. A bundle keeps no values of features of the events, so their figures are None.

Shape letters: R rows, D dim, N values, c chunks, K readers, F fields, E examples, B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from models.bundle.bundle import Bundle
from models.insight.collision import Collisions, collisions, total
from models.insight.reader import Angles, Readers, angles, readers
from models.ranker.network import DensePart
from models.table.admission import Admission
from models.table.column_rows import ColumnValues
from models.table.schema import Feature, Schema

_HOT, _SAMPLES = 5, 6
_HOT_SHARE = 0.01


@dataclass(frozen=True)
class FeatureInsight:
    """Figures of one feature of the schema.

    Attributes:
        lookups: Readers it has: its chunks, times the history's slots under attention.
        values: Distinct values that users, items and the vocabulary have under its salt; reading: those that read rows.
        norm: Mean ‖e‖ of the rows they read; reader: ‖A‖ of its readers together, in the MLP's first layer;
            None for a network without such a layer.
    """

    name: str
    of: str
    salt: str
    exact: bool
    chunks: int
    lookups: int
    values: int | None
    reading: int | None
    norm: float | None
    reader: float | None


@dataclass(frozen=True)
class Norms:
    """Norms ‖e‖ of `rows` rows, of which `dead` were never trained (their accumulator is 0); None for no rows."""

    rows: int
    dead: int
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class HotRow:
    """Outlier row by `why`, `values` or `accumulator`: number of values that read it, some as `salt=value`."""

    why: str
    row: int
    values: int
    accumulator: float
    norm: float
    samples: tuple[str, ...]


@dataclass(frozen=True)
class TableSizes:
    """Sizes in bytes. `one_row_per_value` is the size of weights without collisions, D floats for each known value."""

    weights: int
    accumulators: int
    sketch: int
    network: int
    total: int
    values: int
    weights_per_value: float | None
    one_row_per_value: int


@dataclass(frozen=True)
class Widening:
    """Estimated gain of another chunk for a hashed salt, without retraining; good for ranking salts only.

    Attributes:
        merged: Share of sightings whose value has exactly the rows of another value of the salt: one value to the
            ranker. Sightings are positives in training for items, one a value for users.
        crowded: Share whose value shares each of its rows with some value of the salt: none of its chunks is clean.
        resolved: crowded · (1 − q), where q of the sightings share a row in a chunk, on average over the chunks: the
            share to which another chunk, hashed alike, would give a clean row.
        reliance: √Σ (‖A‖ · mean ‖e‖)² over the salt's features, as a share of all hashed salts': the size of its part
            of the first layer's input. The estimate excludes the ranker's use of the input, collisions with other
            features, and the wider input that another chunk brings.
        gain: resolved · reliance.
    """

    salt: str
    chunks: int
    merged: float
    crowded: float
    resolved: float
    reliance: float
    gain: float


@dataclass(frozen=True)
class Insight:
    """All figures; `widening` has the largest gain first, `hot_share` is of all reads and of the rows' top 1 %."""

    bundle: str
    rows: int
    hashed_rows: int
    dim: int
    features: tuple[FeatureInsight, ...]
    collisions: tuple[Collisions, ...]
    total_within: Collisions
    total_between: Collisions
    mlp: Angles
    head: Angles
    hashed: Norms
    exact: Norms
    hot_share: float | None
    hot: tuple[HotRow, ...]
    sizes: TableSizes
    widening: tuple[Widening, ...]


@dataclass(frozen=True)
class _Salt:
    """Known values under one salt; `rows` (n, c), `seen` (n,) sightings and `names` belong to values that read rows."""

    salt: str
    exact: bool
    values: int
    names: list[str]
    rows: NDArray[np.int64]
    seen: NDArray[np.float64]


def insight(bundle: Bundle) -> Insight:
    """Reports on a bundle's table; all of `Insight` is plain data, `dataclasses.asdict` gives JSON."""
    schema, ranker = bundle.schema, bundle.ranker()
    admission = bundle.admission()
    salts = _salts(bundle, admission)
    weight, accumulator = ranker.table.weight.numpy(), ranker.table.accumulator.numpy()
    norms = np.linalg.norm(weight.astype(np.float64), axis=1)
    fresh = DensePart(schema, ranker.network.config, seed=0)
    of_mlp = readers(schema, ranker.network)
    features = tuple(_feature(schema, feature, salts.get(feature.salt), norms, of_mlp) for feature in schema.features)
    hashed = [one for one in salts.values() if not one.exact]
    found = collisions({one.salt: one.rows for one in hashed}, schema.hashed_rows)
    cut = schema.hashed_rows
    share, hot = _hot(list(salts.values()), accumulator, norms)
    values = sum(one.values for one in salts.values())
    parts = {
        "weights": weight.nbytes,
        "accumulators": accumulator.nbytes,
        "sketch": admission.published.cells.nbytes,
        "network": sum(one.nbytes for one in ranker.network.state_dict().values()),
    }
    return Insight(
        bundle=bundle.id,
        rows=schema.rows,
        hashed_rows=cut,
        dim=schema.dim,
        features=features,
        collisions=found,
        total_within=total(found, "within"),
        total_between=total(found, "between"),
        mlp=angles(of_mlp, readers(schema, fresh)),
        head=angles(readers(schema, ranker.network, head=True), readers(schema, fresh, head=True)),
        hashed=_norms(norms[:cut], accumulator[:cut]),
        exact=_norms(norms[cut:], accumulator[cut:]),
        hot_share=share,
        hot=hot,
        sizes=TableSizes(
            **parts,
            total=sum(parts.values()),
            values=values,
            weights_per_value=weight.nbytes / values if values else None,
            one_row_per_value=values * schema.dim * weight.itemsize,
        ),
        widening=_widening(hashed, features),
    )


def _salts(bundle: Bundle, admission: Admission) -> dict[str, _Salt]:
    """Maps each salt to the values of users, items and vocabularies; salts of hashed features of events have none."""
    schema = bundle.schema
    widest: dict[str, Feature] = {}
    for feature in schema.features:
        if feature.salt not in widest or feature.chunks > widest[feature.salt].chunks:
            widest[feature.salt] = feature
    seen: dict[str, dict[str, float]] = {f.salt: dict.fromkeys(f.vocabulary, 0.0) for f in widest.values() if f.exact}
    sources: tuple[tuple[Literal["user", "item"], pl.DataFrame], ...] = (("user", bundle.users), ("item", bundle.items))
    for of, table in sources:
        weight_of = pl.col("train_positives") if "train_positives" in table.columns else pl.lit(1)
        for column, feature in schema.columns(of).items():
            counted = table.select(value=column, weight=weight_of.cast(pl.Float64))
            if table[column].dtype == pl.List:
                counted = counted.explode("value")
            own = seen.setdefault(feature.salt, {})
            for value, weight in counted.drop_nulls("value").group_by("value").sum().sort("value").iter_rows():
                own[value] = own.get(value, 0.0) + weight
    found = {}
    for salt, own in seen.items():
        column_values = ColumnValues(pl.Series(list(own), dtype=pl.String), schema, widest[salt], admission)
        rows, reads = column_values.rows(np.arange(len(own), dtype=np.int64))
        names = [name for name, one in zip(own, reads, strict=True) if one]
        weights_read = np.array([own[name] for name in names], dtype=np.float64)
        found[salt] = _Salt(salt, widest[salt].exact, len(own), names, rows, weights_read)
    return found


def _feature(
    schema: Schema, feature: Feature, salt: _Salt | None, norms: NDArray[np.float64], of_mlp: Readers
) -> FeatureInsight:
    names = [f"{feature.name}#{chunk}" for chunk in range(feature.chunks)]
    read = [of_mlp[name] for name in names if name in of_mlp]
    used = salt is not None and len(salt.rows) > 0
    return FeatureInsight(
        name=feature.name,
        of=feature.of,
        salt=feature.salt,
        exact=feature.exact,
        chunks=feature.chunks,
        lookups=feature.chunks * schema.slots(feature),
        values=salt.values if salt else None,
        reading=len(salt.rows) if salt else None,
        norm=float(norms[salt.rows[:, : feature.chunks]].mean()) if salt and used else None,
        reader=float(np.sqrt(sum((one**2).sum() for one in read))) if read else None,
    )


def _norms(norms: NDArray[np.float64], accumulator: NDArray[np.float32]) -> Norms:
    if not len(norms):
        return Norms(0, 0, None, None, None, None)
    p50, p90, p99 = (float(one) for one in np.percentile(norms, (50, 90, 99)))
    return Norms(len(norms), int((accumulator == 0).sum()), float(norms.mean()), p50, p90, p99)


def _hot(
    salts: Sequence[_Salt], accumulator: NDArray[np.float32], norms: NDArray[np.float64]
) -> tuple[float | None, tuple[HotRow, ...]]:
    """Returns the share of the reads, one a value and chunk, that the rows' top 1 % takes; and the outlier rows."""
    reads = sum((np.bincount(one.rows.ravel(), minlength=len(norms)) for one in salts), np.zeros(len(norms), np.int64))
    top = max(1, int(len(norms) * _HOT_SHARE))
    share = float(np.sort(reads)[-top:].sum() / reads.sum()) if reads.sum() else None
    found = []
    for why, score in (("values", reads), ("accumulator", accumulator)):
        for row in np.argsort(-score, kind="stable")[:_HOT].tolist():
            by = [(salt, number) for salt in salts for number in np.flatnonzero((salt.rows == row).any(axis=1))]
            shown = tuple(f"{salt.salt}={salt.names[number]}" for salt, number in by[:_SAMPLES])
            found.append(HotRow(why, row, len(by), float(accumulator[row]), float(norms[row]), shown))
    return share, tuple(found)


def _widening(salts: Sequence[_Salt], features: Sequence[FeatureInsight]) -> tuple[Widening, ...]:
    size = {
        one.salt: sum(
            (1.0 if f.reader is None else f.reader) ** 2 * (f.norm or 0.0) ** 2 for f in features if f.salt == one.salt
        )
        ** 0.5
        for one in salts
    }
    whole = sum(size.values()) or 1.0
    found = []
    for one in salts:
        seen = one.seen if one.seen.sum() else np.ones(len(one.seen))
        share = seen / max(float(seen.sum()), 1.0)
        shared = np.stack([_repeated(column[:, None]) for column in one.rows.T], axis=1)
        crowded = float(share[shared.all(axis=1)].sum())
        resolved = crowded * (1 - float((share @ shared).mean()))
        reliance, merged = size[one.salt] / whole, float(share[_repeated(one.rows)].sum())
        chunks = one.rows.shape[1]
        found.append(Widening(one.salt, chunks, merged, crowded, resolved, reliance, resolved * reliance))
    return tuple(sorted(found, key=lambda one: -one.gain))


def _repeated(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Returns (N,) which rows of (N, c) occur more than once."""
    _, inverse, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    found: NDArray[np.bool_] = count[inverse.ravel()] > 1
    return found
