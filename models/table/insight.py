"""What a bundle's table holds and how it is read: collisions, readers' angles, norms, bytes, and what to widen.

Values that share rows do no harm where their readers stand at right angles; values of one feature that share all of
their rows are one value to the ranker (Coleman et al., "Unified Embedding", NeurIPS 2023, section 4). Everything is
computed from the bundle alone. Of features of the events a bundle keeps no values: what is said of them is None.

Shape letters: R rows, D dim, N values, c chunks, K readers, F fields, E examples, B batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Literal

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.determinism import one_thread
from models.admission import Admission
from models.bundle import Bundle
from models.evaluate import quality
from models.ranker import DensePart
from models.schema import Feature, Schema
from models.table.fields import Fields, Part
from models.table.layout import rows_of
from models.values import ColumnValues

Readers = Mapping[str, NDArray[np.float64]]
_HOT, _SAMPLES = 5, 6
_HOT_SHARE = 0.01
_START, _EPSILON = 0.05, 1e-8


@dataclass(frozen=True)
class FeatureInsight:
    """One feature of the schema.

    Attributes:
        lookups: readers it has: its chunks, times the history's slots under attention.
        values: distinct ones that users, items and the vocabulary name under its salt; reading: those that read rows.
        norm: mean ‖e‖ of the rows they read; reader: ‖A‖ of its readers together, in the MLP's first layer.
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
    reader: float


@dataclass(frozen=True)
class Collisions:
    """Pairs of hashed values on one row, beside what R rows and a uniform hash let expect.

    Of each pair's indicator the mean is p = 1/R, and any two are independent, so that over n pairs

        expected = n p,   deviation = √(n p (1 − p)),   z = (pairs − expected) / deviation.

    n is C(N, 2) for a lookup with itself and N_s · N_t for two lookups; `fully` has p = R⁻ᶜ.

    Attributes:
        of: `salt#chunk` of one lookup, `salt` for `fully`, `salt × salt` over all pairs of their different lookups.
        kind: `within` a lookup, `between` lookups, or `fully`: the same rows in all chunks of one feature.
    """

    of: str
    kind: str
    pairs: int
    expected: float
    deviation: float
    z: float


@dataclass(frozen=True)
class Angles:
    """The angles between readers, in degrees; 0 reads the same direction, 90 is blind to what the other reads.

    A reader is the (h, D) block A of a layer's weight that reads one lookup. With G = AᵀA

        angle = arccos √(tr(G_s G_t) / (‖G_s‖ ‖G_t‖)),   leakage = ‖A_s A_tᵀ‖ / (‖A_s‖ ‖A_t‖)   (Frobenius norms).

    tr(G_s G_t) = ‖A_s A_tᵀ‖²: both measure how much of a gradient that s writes to a row t reads back (part 3 of the
    paper's decomposition), and for vectors both are |cos|. Leakage of a matrix with itself is below 1, √(1/D) if it
    reads all directions alike; the angle is 0 there, and 90 where the directions read are disjoint.

    Attributes:
        degrees, leakage: (K, K); mean, smallest: over pairs of different readers, `pair` being the closest.
        start_mean: mean angle of a fresh network of this shape, seed 0.
    """

    readers: tuple[str, ...]
    degrees: list[list[float]]
    leakage: list[list[float]]
    mean: float | None
    smallest: float | None
    pair: tuple[str, str] | None
    start_mean: float | None


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
    """A row that stands out by `why`, `values` or `accumulator`: values that read it, some as `salt=value`."""

    why: str
    row: int
    values: int
    accumulator: float
    norm: float
    samples: tuple[str, ...]


@dataclass(frozen=True)
class Sizes:
    """Bytes. `one_row_per_value` is what weights without collisions take, D floats for each known value."""

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
    """What another chunk of a hashed salt would resolve: an estimate without retraining, good for ranking alone.

    Attributes:
        merged: share of sightings whose value has the very rows of another value of the salt: one value to the ranker.
            Sightings are positives in training for items, one a value for users.
        crowded: share whose value shares each of its rows with some value of the salt: none of its chunks is clean.
        resolved: crowded · (1 − q), where q of the sightings share a row in a chunk, on average over the chunks: what
            another chunk, hashed alike, would give a clean one to.
        reliance: √Σ (‖A‖ · mean ‖e‖)² over the salt's features, as a share of all hashed salts': how large its part of
            the first layer's input is. What the ranker makes of it, collisions with other features, and the wider
            input that another chunk brings are not in the estimate.
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
    """All of it; `widening` has the largest gain first, `hot_share` is of all reads and of the rows' top 1 %."""

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
    sizes: Sizes
    widening: tuple[Widening, ...]


@dataclass(frozen=True)
class _Salt:
    """Known values under one salt; `rows` (n, c), `seen` (n,) sightings and `names` are of those that read rows."""

    salt: str
    exact: bool
    values: int
    names: list[str]
    rows: NDArray[np.int64]
    seen: NDArray[np.float64]


def insight(bundle: Bundle) -> Insight:
    """Looks into a bundle's table; all of `Insight` is plain data, `dataclasses.asdict` gives JSON."""
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
        total_within=_total(found, "within"),
        total_between=_total(found, "between"),
        mlp=angles(of_mlp, readers(schema, fresh)),
        head=angles(readers(schema, ranker.network, head=True), readers(schema, fresh, head=True)),
        hashed=_norms(norms[:cut], accumulator[:cut]),
        exact=_norms(norms[cut:], accumulator[cut:]),
        hot_share=share,
        hot=hot,
        sizes=Sizes(
            **parts,
            total=sum(parts.values()),
            values=values,
            weights_per_value=weight.nbytes / values if values else None,
            one_row_per_value=values * schema.dim * weight.itemsize,
        ),
        widening=_widening(hashed, features),
    )


def _salts(bundle: Bundle, admission: Admission) -> dict[str, _Salt]:
    """By salt what the users, the items and the vocabularies name; salts of hashed features of events have none."""
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


def collisions(rows: Mapping[str, NDArray[np.int64]], table_rows: int) -> tuple[Collisions, ...]:
    """Counts the colliding pairs of the values of some salts, within and between lookups.

    Args:
        rows: by salt, the rows (N, c) in [0, R) of its distinct values.
        table_rows: R.
    """
    found: list[Collisions] = []
    for salt, own in rows.items():
        trials = len(own) * (len(own) - 1) // 2
        for chunk, column in enumerate(own.T):
            pairs = _pairs(column[:, None])
            found += [_judged(f"{salt}#{chunk}", "within", pairs, trials, table_rows)]
        found.append(_judged(salt, "fully", _pairs(own), trials, table_rows ** own.shape[1]))
    counts = {salt: [np.bincount(chunk, minlength=table_rows) for chunk in own.T] for salt, own in rows.items()}
    for one, two in combinations_with_replacement(rows, 2):
        together = combinations(counts[one], 2) if one == two else ((a, b) for a in counts[one] for b in counts[two])
        shared = [int(a @ b) for a, b in together]
        if shared:
            of = len(shared) * len(rows[one]) * len(rows[two])
            found.append(_judged(f"{one} × {two}", "between", sum(shared), of, table_rows))
    return tuple(found)


def _judged(of: str, kind: str, pairs: int, trials: int, cells: int) -> Collisions:
    expected, deviation = trials / cells, (trials / cells * (1 - 1 / cells)) ** 0.5
    return Collisions(of, kind, pairs, expected, deviation, (pairs - expected) / deviation if deviation else 0.0)


def _pairs(rows: NDArray[np.int64]) -> int:
    """Pairs of equal rows of (N, c)."""
    count = np.unique(rows, axis=0, return_counts=True)[1]
    return int((count * (count - 1) // 2).sum())


def _total(found: Sequence[Collisions], kind: str) -> Collisions:
    own = [one for one in found if one.kind == kind]
    pairs, expected = sum(one.pairs for one in own), sum(one.expected for one in own)
    deviation = sum(one.deviation**2 for one in own) ** 0.5
    return Collisions("all", kind, pairs, expected, deviation, (pairs - expected) / deviation if deviation else 0.0)


def readers(schema: Schema, network: DensePart, *, head: bool = False) -> dict[str, NDArray[np.float64]]:
    """By `feature#chunk` what reads it: (h, D) of the MLP's first layer, or (1, D) of the linear head's first order.

    Under attention all slots of the history are read by one reader, behind their weighted sum.
    """
    name = "network.head.weight" if head else "network.mlp._mlp.0._linear.weight"
    weight = network.state_dict()[name].numpy().astype(np.float64)
    plain = [feature for feature in schema.features if feature.pooling != "attention"]
    attended = [feature for feature in schema.features if feature.pooling == "attention"]
    found: dict[str, NDArray[np.float64]] = {}
    for feature in plain + attended:
        for chunk in range(feature.chunks):
            start = len(found) * schema.dim
            found[f"{feature.name}#{chunk}"] = weight[:, start : start + schema.dim]
    return found


def angles(read: Readers, start: Readers | None = None) -> Angles:
    """The angles between readers (h, D), and their mean at the start."""
    degrees, leakage = _angles(list(read.values()))
    one, two = np.triu_indices(len(read), 1)
    pairs = degrees[one, two]
    names, closest = tuple(read), int(np.argmin(pairs)) if len(pairs) else None
    before = None if start is None or not len(pairs) else float(_angles(list(start.values()))[0][one, two].mean())
    return Angles(
        readers=names,
        degrees=degrees.tolist(),
        leakage=leakage.tolist(),
        mean=float(pairs.mean()) if len(pairs) else None,
        smallest=None if closest is None else float(pairs[closest]),
        pair=None if closest is None else (names[one[closest]], names[two[closest]]),
        start_mean=before,
    )


def _angles(read: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K, K) degrees and leakage; a reader that is all zero stands at 90 degrees to every other."""
    count = len(read)
    grams = np.stack([one.T @ one for one in read]).reshape(count, -1) if read else np.zeros((0, 1))
    energy = np.array([float((one**2).sum()) for one in read])
    overlap = np.maximum(grams @ grams.T, 0)  # ‖A_s A_tᵀ‖²
    size = np.maximum(np.linalg.norm(grams, axis=1), 1e-300)
    cosine = np.sqrt(np.clip(overlap / size[:, None] / size[None, :], 0, 1))
    degrees = np.degrees(np.arccos(cosine))
    np.fill_diagonal(degrees, 0.0)
    energy = np.maximum(energy, 1e-300)
    return degrees, np.sqrt(overlap / energy[:, None] / energy[None, :])


def _feature(
    schema: Schema, feature: Feature, salt: _Salt | None, norms: NDArray[np.float64], of_mlp: Readers
) -> FeatureInsight:
    read = [of_mlp[f"{feature.name}#{chunk}"] for chunk in range(feature.chunks)]
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
        reader=float(np.sqrt(sum((one**2).sum() for one in read))),
    )


def _norms(norms: NDArray[np.float64], accumulator: NDArray[np.float32]) -> Norms:
    if not len(norms):
        return Norms(0, 0, None, None, None, None)
    p50, p90, p99 = (float(one) for one in np.percentile(norms, (50, 90, 99)))
    return Norms(len(norms), int((accumulator == 0).sum()), float(norms.mean()), p50, p90, p99)


def _hot(
    salts: Sequence[_Salt], accumulator: NDArray[np.float32], norms: NDArray[np.float64]
) -> tuple[float | None, tuple[HotRow, ...]]:
    """Share of the reads, one a value and chunk, that the rows' top 1 % takes; the rows that stand out."""
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
        one.salt: sum(f.reader**2 * (f.norm or 0.0) ** 2 for f in features if f.salt == one.salt) ** 0.5
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
    """Which of (N, c) stand there more than once: (N,)."""
    _, inverse, count = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    found: NDArray[np.bool_] = count[inverse.ravel()] > 1
    return found


@dataclass(frozen=True)
class TurningConfig:
    """How the single-layer model is trained: Adagrad, row-wise on the table, by coordinate on the readers."""

    dim: int = 32
    epochs: int = 10
    batch: int = 512
    table_rate: float = 0.05
    reader_rate: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Turning:
    """How far readers turned; angles are means over pairs in degrees, folded to [0, 90].

    Attributes:
        before, after: training; smallest: angle of the closest pair after it.
        auc: on validation, None where it has one label.
    """

    rows: int
    before: float
    after: float
    smallest: float
    auc: float | None


@one_thread()
@torch.no_grad()
def turning(fields: Fields, rows: int, config: TurningConfig = TurningConfig()) -> Turning:
    """Trains z = b + Σ_t ⟨θ_t, e_{h_t(x_t)}⟩ with logistic loss from readers θ_t that are all one unit vector.

    The paper's experiment in its worst case: at the start every collision between fields leaks in full. Rows start
    uniform in ±0.05. The gradients are written out, so that an epoch is a few products a batch.

    Args:
        fields: F fields and their three parts.
        rows: R of the one table that all fields share.
    """
    generator = torch.Generator().manual_seed(config.seed)
    table = (torch.rand(rows, config.dim, generator=generator) * 2 - 1) * _START
    theta = torch.nn.functional.normalize(torch.randn(1, config.dim, generator=generator)).repeat(len(fields.names), 1)
    bias, of_rows, of_theta = torch.zeros(1), torch.zeros(rows), torch.zeros_like(theta)
    chosen = torch.from_numpy(rows_of(fields, "unified", rows=rows, seed=config.seed)[:, 0])
    codes, labels = _tensors(fields.parts["train"])
    before = _turned(theta)
    place = torch.arange(len(theta))
    for epoch in range(config.epochs):
        order = torch.from_numpy(np.random.default_rng([config.seed, epoch]).permutation(len(labels)))
        for index in order.split(config.batch):
            at = chosen[codes[index]]
            vectors = table[at]
            error = torch.sigmoid((vectors * theta).sum((1, 2)) + bias) - labels[index]
            error /= len(index)
            # Readers times what each row got of each reader: (R, F) @ (F, D), the gradient of the rows.
            got = torch.zeros(rows * len(theta)).index_add_(
                0, (at * len(theta) + place).flatten(), error.repeat_interleave(len(theta))
            )
            row_gradient = got.view(rows, -1) @ theta
            gradient = torch.einsum("b,bfd->fd", error, vectors)
            of_rows += (row_gradient**2).mean(1)
            table -= config.table_rate * row_gradient / (of_rows.sqrt() + _EPSILON).unsqueeze(1)
            of_theta += gradient**2
            theta -= config.reader_rate * gradient / (of_theta.sqrt() + _EPSILON)
            bias -= config.reader_rate * error.sum()
    after = _turned(theta)
    codes, labels = _tensors(fields.parts["validation"])
    scores = torch.sigmoid((table[chosen[codes]] * theta).sum((1, 2)) + bias)
    auc = quality(labels.numpy(), scores.numpy()).auc
    return Turning(rows, before.mean or 0.0, after.mean or 0.0, after.smallest or 0.0, auc)


def _turned(theta: torch.Tensor) -> Angles:
    return angles({str(number): one[None, :] for number, one in enumerate(theta.numpy().astype(np.float64))})


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(part.codes), torch.from_numpy(part.labels)
