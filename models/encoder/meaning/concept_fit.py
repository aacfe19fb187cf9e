"""Fits heads of concepts: on the values of a column, or on a few examples of one concept.

A column's concept is a logistic regression. Its shares are calibrated on items that a fold left out (Platt, 1999), and
so is the threshold of the filter `without`. Few examples are compared with the catalogue by their mean direction.

Shape letters: N items, D dim, C concepts.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.content.encoder import unit
from features.errors import DatasetError
from models.encoder.meaning.concepts import Concept, ConceptHead, Floats

LEAST_CARRIERS, MOST_CONCEPTS = 10, 200
"""Fewest items that carry a value of a column, and most values, for the values to become concepts."""
LEAST_EXAMPLES, MOST_EXAMPLES = 3, 10
LOST = 0.04
"""Share of the other items that the filter `without` may exclude wrongly."""
_FOLDS, _INVERSE_PENALTY, _MOST_ITEMS = 3, 10.0, 20_000
_MARGIN = 1.5  # standard deviations of the catalogue at which an example's share is one half


def fit_column(
    vectors: Floats, values: Sequence[Sequence[str] | None], *, column: str, source: str, seed: int = 0
) -> ConceptHead:
    """Fits a concept for each value of a column that enough items carry.

    Args:
        vectors: (N, D) unit vectors; a zero row is left out.
        values: N lists of values; None where the column is empty, which says nothing about the item.
        column: Name of the column.
        source: Id of the encoder of the vectors.
        seed: Seed of the folds, and of the sample if the catalogue is large.

    Raises:
        DatasetError: No value is carried by enough items and missing from others.
    """
    usable = np.flatnonzero(np.any(vectors, axis=1) & np.array([value is not None for value in values], dtype=bool))
    if len(usable) > _MOST_ITEMS:
        usable = np.sort(np.random.default_rng(seed).choice(usable, _MOST_ITEMS, replace=False))
    sets = [set(values[row] or ()) for row in usable.tolist()]
    counts: dict[str, int] = {}
    for found in sets:
        for name in found:
            counts[name] = counts.get(name, 0) + 1
    names = [name for name, count in counts.items() if LEAST_CARRIERS <= count <= len(sets) - LEAST_CARRIERS]
    names = sorted(sorted(names, key=lambda name: (-counts[name], name))[:MOST_CONCEPTS])
    if not names:
        raise DatasetError(
            f"[items] concepts: no value of column '{column}' is carried by {LEAST_CARRIERS} items with content and "
            f"missing from {LEAST_CARRIERS}; name a column of broader values"
        )
    rows = vectors[usable]
    carried = np.array([[name in found for name in names] for found in sets], dtype=bool)
    return _fitted(rows, carried, names, column=column, source=source, seed=seed)


def _fitted(
    rows: Floats, carried: NDArray[np.bool_], names: Sequence[str], *, column: str, source: str, seed: int
) -> ConceptHead:
    from sklearn.metrics import roc_auc_score

    tensors: dict[str, list[NDArray[np.floating]]] = {name: [] for name in ("weight", "bias", "direction")}
    floors, thresholds, concepts = [], [], []
    for name, carries in zip(names, carried.T, strict=True):
        held_out = left_out_logits(rows, carries, seed=seed)
        scale, shift = logistic(held_out[:, None], carries, inverse_penalty=1e6)
        weight, bias = logistic(rows, carries)
        tensors["weight"].append(weight * scale[0])
        tensors["bias"].append(np.array(bias * scale[0] + shift))
        direction = _direction(rows[carries], rows[~carries])
        tensors["direction"].append(direction)
        floors.append(float(np.median(rows[~carries] @ direction)))
        shares = 1 / (1 + np.exp(-(held_out * scale[0] + shift)))
        thresholds.append(float(np.quantile(shares[~carries], 1 - LOST)))
        auc = float(roc_auc_score(carries, held_out))
        concepts.append(Concept(name, column, int(carries.sum()), auc))
    stacked = {name: np.stack(found).astype(np.float32) for name, found in tensors.items()}
    stacked |= {"floor": np.array(floors, dtype=np.float32), "threshold": np.array(thresholds, dtype=np.float32)}
    return ConceptHead(source, tuple(concepts), stacked)


def fit_examples(
    name: str, examples: Floats, catalogue: Floats, *, source: str, least: int = LEAST_EXAMPLES
) -> ConceptHead:
    """Fits one concept on a few examples.

    The direction of the concept is the examples' mean less the catalogue's mean. A share of one half means: as far from
    the catalogue's mean as an example that was left out of the mean, or 1.5 standard deviations, whichever is more.

    Args:
        name: Name of the concept.
        examples: (M, D) unit vectors of items or texts that carry the concept; zero rows are left out.
        catalogue: (N, D) unit vectors of all items; zero rows are left out.
        source: Id of the encoder of the vectors.
        least: Fewest examples.

    Raises:
        DatasetError: There are too few or too many examples with content; names the concept.
    """
    examples, others = examples[np.any(examples, axis=1)], catalogue[np.any(catalogue, axis=1)]
    if not least <= len(examples) <= MOST_EXAMPLES:
        empty = "" if len(examples) else " is empty"
        raise DatasetError(
            f"concept {name!r}{empty}: {len(examples)} examples have content, expected {least} to {MOST_EXAMPLES}; "
            "name other items or texts, or declare a column of the concept"
        )
    direction = _direction(examples, others)
    usual = others @ direction
    centre, spread = float(usual.mean()), max(float(usual.std()), 1e-6)
    left_out = [
        float(one @ _direction(np.delete(examples, row, axis=0), others)) if len(examples) > 1 else centre
        for row, one in enumerate(examples)
    ]
    half = max(centre + _MARGIN * spread, float(np.median(left_out)))
    # At the catalogue's mean the share is about 2 %.
    slope = 4.0 / (half - centre)
    shares = 1 / (1 + np.exp(-slope * (usual - half)))
    tensors = {
        "weight": (slope * direction)[None].astype(np.float32),
        "bias": np.array([-slope * half], dtype=np.float32),
        "direction": direction[None].astype(np.float32),
        "floor": np.array([np.median(usual)], dtype=np.float32),
        "threshold": np.array([np.quantile(shares, 1 - LOST)], dtype=np.float32),
    }
    return ConceptHead(source, (Concept(name, examples=len(examples)),), tensors)


def left_out_logits(rows: Floats, carries: NDArray[np.bool_], *, seed: int = 0) -> NDArray[np.float64]:
    """Returns the logit of each row (N,) from a regression that was fitted without the row's fold."""
    fold = np.empty(len(rows), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for part in (carries, ~carries):
        # Each fold has its share of the carriers.
        fold[part] = rng.permutation(np.arange(part.sum()) % _FOLDS)
    logits = np.empty(len(rows))
    for number in range(_FOLDS):
        weight, bias = logistic(rows[fold != number], carries[fold != number])
        logits[fold == number] = rows[fold == number] @ weight + bias
    return logits


def logistic(
    rows: NDArray[np.floating], carries: NDArray[np.bool_], *, inverse_penalty: float = _INVERSE_PENALTY
) -> tuple[NDArray[np.float64], float]:
    """Returns weight (D,) and bias of a logistic regression of rows (N, D) on True and False (N,)."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, max_iter=300).fit(rows.astype(np.float64), carries)
    weight: NDArray[np.float64] = model.coef_[0]
    return weight, float(model.intercept_[0])


def _direction(carriers: Floats, others: Floats) -> NDArray[np.float64]:
    difference = carriers.astype(np.float64).mean(axis=0) - others.astype(np.float64).mean(axis=0)
    direction: NDArray[np.float64] = unit(difference[None])[0].astype(np.float64)
    return direction
