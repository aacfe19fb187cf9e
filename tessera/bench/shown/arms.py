"""Arms of `bench shown`: rankers that treat the position in different ways, and rates that only count.

Shape letters: N rows of the test part.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.ranker.loading import assembler, examples
from models.ranker.reads import choose_path
from models.ranker.train import Objective, TrainConfig, predict, train
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.default_schema import TableOptions, default_schema
from models.table.placement import PlacementColumn
from models.table.schema import Feature, Schema
from tessera.bench.shown.clicks import POSITIONS, Floats

BLIND, PATH, FEATURE = "position-blind", "position path", "position as a feature"
IPS, KNOWN, PERMUTED = "inverse propensities", "true curve in the likelihood", "position path, permuted"
CHOSEN = "position path, if it pays"
RATES, DEBIASED = "user + item rate", "user + item rate, debiased"
ARMS = (BLIND, PATH, FEATURE, IPS, KNOWN, PERMUTED, RATES, DEBIASED, CHOSEN)
_POSITION, _WORD = "position", "position_word"
_MOST_WEIGHT = 10.0


def arms(
    dataset: Dataset, frame: Frame, curve: Floats, options: TableOptions, config: TrainConfig
) -> dict[str, Callable[[], NDArray[np.floating]]]:
    """Returns the predictions (N,) of the test part at the first position, as functions by the name of the arm."""
    plain = _without_history(default_schema(dataset, frame, options, history_length=1))
    placed = replace(plain, placement=(PlacementColumn(_POSITION, positions=POSITIONS),))

    def ranker(schema: Schema, own: Frame, objective: Objective | None = None) -> NDArray[np.floating]:
        model = train(schema, own, config, objective=objective)
        test = own.part("test")
        # A server has no position. The feature of the control arm stays, at its constant.
        test = test.drop(_POSITION)
        source = assembler(schema, own, test, Admission(model.sketch, schema.admission))
        return predict(model.ranker, source, examples(test))

    def chosen() -> NDArray[np.floating]:
        return ranker(placed if choose_path(placed, frame, config).kept else plain, frame)

    return {
        CHOSEN: chosen,
        BLIND: lambda: ranker(plain, frame),
        PATH: lambda: ranker(placed, frame),
        PERMUTED: lambda: ranker(placed, _permuted(frame, config.seed)),
        FEATURE: lambda: ranker(*_as_feature(plain, frame)),
        IPS: lambda: ranker(placed, frame, _by_propensity(curve)),
        KNOWN: lambda: ranker(placed, frame, _by_likelihood(curve)),
        RATES: lambda: _rates(frame, np.ones_like(curve)),
        DEBIASED: lambda: _rates(frame, curve),
    }


def _without_history(schema: Schema) -> Schema:
    features = tuple(one for one in schema.features if one.of in ("user", "item"))
    return replace(
        schema,
        features=features,
        numeric=tuple(one for one in schema.numeric if one.of in ("user", "item")),
        placement=(),
    )


def _as_feature(schema: Schema, frame: Frame) -> tuple[Schema, Frame]:
    words = tuple(map(str, range(POSITIONS)))
    feature = Feature("event.position", "event", _WORD, "event.position", vocabulary=words)
    wider = replace(schema, features=(*schema.features, feature), rows=schema.rows + POSITIONS)
    return wider, frame.replace(examples=frame.examples.with_columns(pl.col(_POSITION).cast(pl.String).alias(_WORD)))


def _permuted(frame: Frame, seed: int) -> Frame:
    return frame.replace(examples=frame.examples.with_columns(pl.col(_POSITION).shuffle(seed=seed)))


def _of_batch(curve: Floats, batch: Batch) -> Tensor:
    assert batch.placement is not None
    return torch.from_numpy(curve).float()[batch.placement[:, 0] - 1]


def _by_propensity(curve: Floats) -> Objective:
    """Weighs clicks by the inverse propensity (Saito et al., "Unbiased Recommender Learning", WSDM 2020, eq. 9)."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        weight = (1 / _of_batch(curve, batch)).clamp(max=_MOST_WEIGHT)
        return functional.binary_cross_entropy_with_logits(logits, batch.labels * weight)

    return loss


def _by_likelihood(curve: Floats) -> Objective:
    """Maximises the likelihood of the clicks under the true examination: P(click) = e · σ(logit)."""

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        clicks = (_of_batch(curve, batch) * torch.sigmoid(logits)).clamp(1e-6, 1 - 1e-6)
        return functional.binary_cross_entropy(clicks, batch.labels)

    return loss


def _rates(frame: Frame, curve: Floats) -> NDArray[np.float64]:
    """Returns the smoothed rate of the user plus that of the item; an impression counts as its examination."""
    train, test = frame.part("train"), frame.part("test")
    clicks, seen = train["label"].to_numpy().astype(np.float64), curve[train[_POSITION].to_numpy()]
    mean = clicks.sum() / seen.sum()
    found = np.zeros(test.height)
    for name, height in (("user", frame.users.height), ("item", frame.items.height)):
        known, asked = train[name].to_numpy(), test[name].to_numpy()
        total, shown = np.bincount(known, clicks, height), np.bincount(known, seen, height)
        found += ((total + 5 * mean) / (shown + 5))[asked]
    return found
