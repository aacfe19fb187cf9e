"""Generated clicks of `training-speed`, whose best possible AUC is known.

F categorical features of up to V values each follow a Zipf law, and n numeric features are uniform on [0, 1).
Labels follow

    logistic(bias + Σ_f effect[f, value_f] + Σ_j weight_j (numeric_j - 1/2))

with normal effects.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.frame import Frame
from models.table.schema import Feature, Numeric, Schema
from tessera.bench.peers.ctr import DIM, Arrays

_ZIPF, _BASE_RATE = 1.2, 0.25
_CATEGORICAL_STD, _NUMERIC_STD = 1.1, 0.5
# This part decides nothing: after one epoch there is no other epoch to choose.
_VALIDATION_ROWS = 64


@dataclass(frozen=True)
class TrainingSpec:
    """Specification of the data.

    Attributes:
        rows: Training rows.
        test_rows: Test rows.
        features: F, categorical features.
        values: V, the most values of a categorical feature.
        numeric: n, numeric features.
        seed: Seed of values, effects and labels.
    """

    rows: int = 400_000
    test_rows: int = 50_000
    features: int = 26
    values: int = 100_000
    numeric: int = 13
    seed: int = 0


def generate(spec: TrainingSpec) -> tuple[Arrays, Arrays, NDArray[np.float64]]:
    """Draws the training and the test part, and the test rows' true probabilities."""
    rng = np.random.default_rng(spec.seed)
    count = spec.rows + spec.test_rows
    values = np.minimum(rng.zipf(_ZIPF, (count, spec.features)) - 1, spec.values - 1).astype(np.int32)
    numeric = rng.random((count, spec.numeric), dtype=np.float32)
    effect = rng.normal(0, _CATEGORICAL_STD / spec.features**0.5, (spec.features, spec.values))
    # A uniform number has the variance 1/12.
    weight = rng.normal(0, _NUMERIC_STD * (12 / spec.numeric) ** 0.5, spec.numeric)
    logit = (numeric - 0.5) @ weight
    for number in range(spec.features):
        logit += effect[number, values[:, number]]
    probability = _with_base_rate(logit)
    labels = (rng.random(count) < probability).astype(np.float32)
    parts = (slice(0, spec.rows), slice(spec.rows, None))
    first, second = (Arrays(values[part], numeric[part], labels[part]) for part in parts)
    return first, second, probability[spec.rows :]


def _with_base_rate(logit: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = -20.0, 20.0
    for _ in range(50):
        bias = (low + high) / 2
        low, high = (bias, high) if np.mean(1 / (1 + np.exp(-logit - bias))) < _BASE_RATE else (low, bias)
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-logit - low))
    return probability


def star(training: Arrays, test: Arrays) -> Frame:
    """Returns the arrays as a frame whose events hold every feature, categorical values as strings."""
    parts = {"train": training, "validation": training.head(_VALIDATION_ROWS), "test": test}
    tables = []
    for name, part in parts.items():
        columns = {f"C{number}": pl.Series(column).cast(pl.String) for number, column in enumerate(part.values.T)}
        columns |= {f"I{number}": pl.Series(column) for number, column in enumerate(part.numeric.T)}
        tables.append(
            pl.DataFrame(columns).with_columns(
                user=pl.lit(0, dtype=pl.UInt32),
                item=pl.lit(0, dtype=pl.UInt32),
                label=pl.Series(part.labels.astype(np.int8)),
                split=pl.lit(name),
                history=pl.lit([], dtype=pl.List(pl.UInt32)),
            )
        )
    events = pl.concat(tables).with_row_index("event")
    return Frame(pl.DataFrame({"user_id": ["only"]}), pl.DataFrame({"item_id": ["only"]}), events)


def schema_of(frame: Frame) -> Schema:
    """Returns one lookup a feature, and as many rows as the training part has distinct values."""
    part = frame.part("train")
    categorical = [name for name in part.columns if name.startswith("C")]
    return Schema(
        features=tuple(Feature(name, "event", name, name) for name in categorical),
        numeric=tuple(
            # The mean and the deviation of log1p of a uniform number.
            Numeric(name, "event", name, mean=0.386, std=0.198)
            for name in part.columns
            if name.startswith("I")
        ),
        rows=sum(part[name].n_unique() for name in categorical),
        dim=DIM,
        history_length=1,
    )


def store(spec: TrainingSpec, directory: Path) -> float:
    """Writes both parts as .npy, so that every process reads the same arrays; returns the best possible test AUC."""
    from sklearn.metrics import roc_auc_score

    training, test, probability = generate(spec)
    for name, part in (("train", training), ("test", test)):
        part.save(directory / name)
    return float(roc_auc_score(test.labels, probability))
