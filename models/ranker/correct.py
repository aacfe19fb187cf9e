"""Fits the correction of new items by neighbours on items that a small training does not see.

A tenth of the items is held out inside the training part. A ranker that is trained without them scores their events,
and the weight is the one that makes these scores fit best. What the correction gives is measured by halves of the
held-out items: the weight of each half is fitted on the other half. Beside it stands the control, in which the
residuals of a user's labelled items are dealt out among them.

Shape letters: E examples, N items, L labelled items of a user.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.frame import Frame
from features.frame_blocks import held_blocks, shown_items
from features.history import EventColumns, Jagged, history_by_user
from models.encoder.meaning.neighbours import (
    LABELLED,
    Floats,
    LabelledItems,
    NeighbourCorrection,
    coded_labels,
    corrected,
    fit_weight,
    item_rates,
)
from models.ranker.evaluate import quality
from models.ranker.loading import content_vectors
from models.ranker.reads import without_items
from models.ranker.train import TrainConfig, predict_part, train
from models.table.admission import Admission
from models.table.schema import Schema

HELD_OUT = 0.1
"""Share of the items that are held out."""
_READ = ("user", "item", "time", "label")
# Other streams of random numbers than those of the choice of parts and of a benchmark's held-out items.
_HELD_OUT_STREAM, _HALVES_STREAM, _CONTROL_STREAM = 51, 52, 53


@dataclass(frozen=True)
class CorrectionReport:
    """Gains of the correction on held-out items, half by half.

    Attributes:
        events: Events of the held-out items.
        weight: Weight fitted on all of them; 0 if the correction does not lower the log loss, and is left out.
        auc, log_loss: Change by the correction.
        permuted_auc, permuted_log_loss: Change by the control.
    """

    events: int
    weight: float
    auc: float
    log_loss: float
    permuted_auc: float
    permuted_log_loss: float


@dataclass(frozen=True)
class HeldOutVotes:
    """Events of items that a small training did not see.

    Attributes:
        items: (E,) number of each event's item.
        labels: (E,) 0 or 1.
        scores: (E,) probabilities of the small training's ranker.
        votes: (E,) log-odds of a correction of weight 1.
        permuted: (E,) those of the control.
    """

    items: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: Floats
    votes: Floats
    permuted: Floats


def fit_correction(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    space: str,
    lag: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[NeighbourCorrection, CorrectionReport]:
    """Fits the correction of a ranker of this schema. Its weight is 0 if it does not pay on held-out items.

    Args:
        schema: Schema of the ranker.
        frame: Frame of the run, with content. Its test part is not read.
        config: Training of the run; its seed decides the held-out items.
        space: Id of the space of the items' vectors.
        lag: Time until a label is known, in the unit of the events' time.
        progress: As for `train`.

    Raises:
        TrainingError: Held-out items have too few events.
    """
    held = held_out_votes(schema, frame, config, lag=lag, progress=progress)
    weight = fit_weight(held.labels, held.scores, held.votes)
    halves = np.random.default_rng([config.seed, _HALVES_STREAM]).random(frame.items.height)[held.items] < 0.5
    near = _gains(held.labels, held.scores, held.votes, halves)
    control = _gains(held.labels, held.scores, held.permuted, halves)
    if near[1] >= 0:
        weight = 0.0
    report = CorrectionReport(len(held.labels), weight, *near, *control)
    return replace(plain_correction(frame, space), weight=weight), report


def held_out_votes(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    lag: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutVotes:
    """Trains a ranker without a tenth of the items, and returns the votes on these; see `fit_correction`."""
    held_out = np.random.default_rng([config.seed, _HELD_OUT_STREAM]).random(frame.items.height) < HELD_OUT
    inner, new = without_items(frame, held_out)
    trained = train(schema, inner, replace(config, patience=min(config.patience, 1)), progress=progress)
    admission = Admission(trained.sketch, schema.admission)
    scores = predict_part(trained.ranker, schema, inner, held_blocks(new, 1), admission)
    known = pl.concat([inner.part("train").select(_READ), inner.part("validation").select(_READ)])
    votes, permuted = votes_of(plain_correction(inner, ""), frame, new, known, lag=lag, seed=config.seed)
    items, labels = new["item"].to_numpy().astype(np.int64), new["label"].to_numpy().astype(np.int64)
    return HeldOutVotes(items, labels, scores.astype(np.float64), votes, permuted)


def votes_of(
    correction: NeighbourCorrection, frame: Frame, asked: pl.DataFrame, known: pl.DataFrame, *, lag: int = 0, seed: int
) -> tuple[Floats, Floats]:
    """Returns the votes (E,) of the labelled items before each asked example, and those of the control.

    Args:
        correction: Correction whose votes count.
        frame: Frame with the items' vectors.
        asked: E examples of the frame.
        known: Examples of the frame whose labels are known.
        lag: Time until a label is known.
        seed: Seed of the control.
    """
    labelled = labelled_before(asked.select(_READ), known.select(_READ), lag=lag)
    items, vectors = asked["item"].to_numpy().astype(np.int64), content_vectors(frame.items)
    votes, _ = correction.votes(items, labelled, vectors)
    return votes, permuted_votes(correction, items, labelled, vectors, seed=seed)


def plain_correction(frame: Frame, space: str) -> NeighbourCorrection:
    """Returns the correction of weight 1 with the rates of a frame's training part."""
    train_part, size = frame.blocks("train"), frame.items.height
    events, likes = shown_items(train_part, size), shown_items(train_part, size, positive=True)
    base_rate = float(likes.sum() / max(events.sum(), 1))
    return NeighbourCorrection(space, 1.0, base_rate, item_rates(events, likes, base_rate))


def labelled_before(asked: pl.DataFrame, known: pl.DataFrame, *, lag: int = 0) -> LabelledItems:
    """Returns the user's last labelled items strictly before the time of each asked example.

    Args:
        asked: E examples, `user`, `item`, `time` and `label`; they do not enter the labelled items.
        known: Examples that enter, with the same columns.
        lag: Time until a label is known.
    """
    both = pl.concat([known, asked])
    coded = coded_labels(both["item"].to_numpy().astype(np.int64), both["label"].to_numpy())
    columns = EventColumns(
        both["user"].to_numpy().astype(np.int64),
        coded,
        both["time"].to_numpy().astype(np.int64),
        np.arange(both.height) < known.height,
    )
    found = history_by_user(columns, length=LABELLED, lag=lag).take(np.arange(known.height, both.height))
    return _padded(found)


def permuted_votes(
    correction: NeighbourCorrection,
    asked: NDArray[np.int64],
    labelled: LabelledItems,
    vectors: NDArray[np.float32],
    *,
    seed: int,
) -> Floats:
    """Returns the votes (E,) of the control: the labels of a user's labelled items are dealt out among them."""
    keys = np.random.default_rng([seed, _CONTROL_STREAM]).random(labelled.items.shape)
    # Empty places stay behind the others, so only labelled items change their labels.
    order = np.argsort(np.where(labelled.items >= 0, keys, 2.0), axis=1)
    residuals = np.take_along_axis(correction.residuals(labelled), order, axis=1)
    votes, _ = correction.votes(asked, labelled, vectors, residuals=residuals)
    return votes


def _padded(lists: Jagged) -> LabelledItems:
    """Returns lists of coded labels, of at most L each, as rows of L."""
    lengths = np.diff(lists.offsets)
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(lists.offsets[:-1], lengths)
    found = LabelledItems(np.full((len(lengths), LABELLED), -1, dtype=np.int64), np.zeros((len(lengths), LABELLED)))
    values = lists.values.astype(np.int64)
    found.items[row, place], found.labels[row, place] = values // 2, values % 2
    return found


def _gains(labels: NDArray[np.int64], scores: Floats, votes: Floats, halves: NDArray[np.bool_]) -> tuple[float, float]:
    """Returns the changes of AUC and log loss, the weight of each half of the items fitted on the other half."""
    changed = scores.astype(np.float32)
    for half in (halves, ~halves):
        changed[half] = corrected(scores[half], fit_weight(labels[~half], scores[~half], votes[~half]) * votes[half])
    before, after = (quality(labels.astype(np.float32), found) for found in (scores, changed))
    nothing = (0.0, 0.0)
    if before.auc is None or after.auc is None or before.log_loss is None or after.log_loss is None:
        return nothing
    return after.auc - before.auc, after.log_loss - before.log_loss
