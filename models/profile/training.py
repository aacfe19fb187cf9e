"""Computes a bundle's profile of training from the frame and the trained ranker."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.frame import Frame
from features.frame_blocks import held_blocks
from features.value.score import ScoreFormula
from models.profile.profile import (
    BINS,
    LENGTH_EDGES,
    SCORE,
    TOP,
    VERSION,
    FeatureValues,
    ProfileMeasure,
    TrainingProfile,
    category_values,
    effective,
    number_values,
    observed,
    unit_shares,
)
from models.ranker.loading import LoadedBlocks, dimensions
from models.ranker.network import Ranker
from models.ranker.train import predict_tasks
from models.table.admission import Admission
from models.table.schema import Schema

SAMPLE: Final = 50_000
"""Largest number of rows of a part that a profile counts."""
_SEED: Final = 5


@dataclass(frozen=True)
class _Part:
    """Values of the sampled rows of a part, by feature.

    Attributes:
        units: (E,) number of each row's unit.
        count: Number of units.
        values: Values by feature, the score among them.
    """

    units: NDArray[np.int64]
    count: int
    values: dict[str, FeatureValues]

    def measured(self, measure: ProfileMeasure) -> tuple[list[float], float]:
        """Returns the shares of a measure's cells and their effective number of observations."""
        values = self.values.get(measure.feature)
        found = None if values is None else observed(measure, values)
        if found is None:
            return [], 0.0
        shares = unit_shares(found, self.units, self.count, len(measure.shares))
        if not len(shares):
            return [], 0.0
        mean, variance = shares.mean(axis=0), shares.var(axis=0)
        units = effective(len(shares), mean, variance, most=len(np.unique(found.example)))
        return [round(share, 9) for share in mean.tolist()], round(units, 3)


def training_profile(
    frame: Frame, schema: Schema, ranker: Ranker, admission: Admission, formula: ScoreFormula | None = None
) -> TrainingProfile:
    """Returns the profile of at most 50,000 rows of the training part and of the test part each.

    Features are those of training rows. The score is that of test rows, since a ranker knows its training rows by
    heart. The test part's shares of the features are in the profile, too.

    Args:
        frame: The training frame.
        schema: Schema of the ranker.
        ranker: The trained ranker.
        admission: Admission after training.
        formula: Score of several tasks; None for one label.
    """
    # A server knows no position, so the scores have the constant of the position path, as served scores have.
    train, test = (_read(frame, schema.served, ranker, admission, part, formula) for part in ("train", "test"))
    measures: list[ProfileMeasure] = []
    for empty in (one for name, values in train.values.items() if name != SCORE for one in _measures(name, values)):
        shares, units = train.measured(empty)
        held, held_units = test.measured(empty)
        if shares:
            found = msgspec.structs.replace(empty, shares=shares, units=units, held=held, held_units=held_units)
            measures.append(found)
    for empty in _number_measures(SCORE, test.values[SCORE]) if SCORE in test.values else ():
        shares, units = test.measured(empty)
        if shares and empty.measure == "values":
            measures.append(msgspec.structs.replace(empty, shares=shares, units=units))
    return TrainingProfile(VERSION, len(train.units), train.count, len(test.units), measures)


def _read(
    frame: Frame, schema: Schema, ranker: Ranker, admission: Admission, part: str, formula: ScoreFormula | None
) -> _Part:
    # The blocks divide events by a hash, so the first block is a sample.
    block = frame.blocks(part).read(0)
    if block.height > SAMPLE:
        chosen = np.random.default_rng(_SEED).choice(block.height, SAMPLE, replace=False)
        block = block[np.sort(chosen).tolist()]
    assembler, rows = LoadedBlocks(dimensions(schema, frame, admission), {"": held_blocks(block, 1)}).load("", 0)
    values: dict[str, FeatureValues] = {}
    if len(rows):
        plain = type(assembler)(replace(schema, content=0), assembler.users, assembler.items, assembler.events)
        batch = plain.batch(rows.take(np.arange(len(rows))), unread=True)
        assert batch.unread is not None
        values = dict(category_values(schema, batch, schema.features, unread=batch.unread.numpy()))
        numbers = batch.numeric.numpy()
        values |= {one.name: number_values(numbers[:, place]) for place, one in enumerate(schema.numeric)}
        found = predict_tasks(ranker, assembler, rows)
        values[SCORE] = number_values(found if formula is None else formula(found))
    known = frame.users.height > 1
    distinct, units = np.unique(block["user"].to_numpy() if known else np.arange(block.height), return_inverse=True)
    return _Part(units.astype(np.int64), len(distinct), values)


def _measures(feature: str, values: FeatureValues) -> Iterator[ProfileMeasure]:
    """Yields the measures of a feature with their cells, without shares."""
    if values.numbers is not None:
        yield from _number_measures(feature, values)
        return
    assert values.unread is not None
    rows, counts = np.unique(values.rows, return_counts=True)
    most = rows[np.argsort(-counts, kind="stable")][:TOP].tolist()
    yield ProfileMeasure(feature, "values", [0.0] * (len(most) + 1), 0.0, rows=most)
    yield ProfileMeasure(feature, "missing", [0.0, 0.0], 0.0)
    yield ProfileMeasure(feature, "unseen", [0.0, 0.0], 0.0)
    if (values.lengths + values.unread).max(initial=0) > 1:
        yield ProfileMeasure(feature, "length", [0.0] * (len(LENGTH_EDGES) + 1), 0.0, edges=list(LENGTH_EDGES))


def _number_measures(feature: str, values: FeatureValues) -> Iterator[ProfileMeasure]:
    assert values.numbers is not None
    present = values.numbers[values.numbers != 0]
    if len(present):
        inner = np.quantile(present, np.arange(1, BINS) / BINS, method="inverted_cdf")
        edges = np.unique([np.nextafter(present.min(), -np.inf), *inner, present.max()]).tolist()
        yield ProfileMeasure(feature, "values", [0.0] * (len(edges) + 1), 0.0, edges=edges)
    yield ProfileMeasure(feature, "missing", [0.0, 0.0], 0.0)
