"""Quality of predicted probabilities: on all items, on items known from training, on items never trained on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

_CLIP = 1e-7
_BINS = 15


@dataclass(frozen=True)
class Quality:
    """Measures of one set of predictions.

    Attributes:
        rows: examples.
        positives: share of label 1.
        auc: area under the ROC curve, ties counted half; None when only one label occurs.
        log_loss: mean binary cross-entropy in nats.
        calibration_error: expected calibration error (Naeini et al., AAAI 2015) over 15 bins of equally many examples:
            the mean distance of a bin's mean probability from its share of label 1.
        normalized_entropy: log loss over that of always predicting the set's own positive rate
            (He et al., ADKDD 2014); below 1 is better than that; None when only one label occurs.
    """

    rows: int
    positives: float
    auc: float | None
    log_loss: float | None
    calibration_error: float | None
    normalized_entropy: float | None


def quality(labels: NDArray[np.float32], probabilities: NDArray[np.floating]) -> Quality:
    """Measures predictions (N,) against labels (N,) in {0, 1}."""
    if not len(labels):
        return Quality(0, 0.0, None, None, None, None)
    clipped = np.clip(probabilities.astype(np.float64), _CLIP, 1 - _CLIP)
    rate = float(labels.mean())
    loss = float(log_loss(labels, clipped, labels=[0, 1]))
    if rate in (0.0, 1.0):
        return Quality(len(labels), rate, None, loss, calibration_error(labels, probabilities), None)
    base = float(-(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)))
    auc = float(roc_auc_score(labels, clipped))
    return Quality(len(labels), rate, auc, loss, calibration_error(labels, probabilities), loss / base)


def calibration_error(labels: NDArray[np.float32], probabilities: NDArray[np.floating]) -> float:
    """Expected calibration error of predictions (N,), N ≥ 1, against labels (N,) in {0, 1}."""
    order = np.argsort(probabilities, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    gaps = [abs(float(probabilities[part].mean(dtype=np.float64) - labels[part].mean())) for part in bins]
    return float(np.average(gaps, weights=[len(part) for part in bins]))


def by_item_novelty(
    labels: NDArray[np.float32], probabilities: NDArray[np.floating], known: NDArray[np.bool_]
) -> dict[str, Quality]:
    """Measures `all`, the examples whose item is `known` (N,) from training, and the `unseen` rest."""
    return {
        "all": quality(labels, probabilities),
        "known": quality(labels[known], probabilities[known]),
        "unseen": quality(labels[~known], probabilities[~known]),
    }


class Popularity:
    """The smoothed-popularity baseline: an item's positive rate in training, drawn towards the overall rate.

    p(i) = (positives_i + a · p) / (events_i + a), p the overall rate. An unseen item gets p.

    Args:
        items: item number per training event; labels: in {0, 1}.
        size: number of items.
        prior: a, in events.
    """

    def __init__(
        self, items: NDArray[np.int64], labels: NDArray[np.float32], *, size: int, prior: float = 10.0
    ) -> None:
        rate = float(labels.mean())
        events = np.bincount(items, minlength=size)
        positives = np.bincount(items, weights=labels, minlength=size)
        self._rates = (positives + prior * rate) / (events + prior)

    def __call__(self, items: NDArray[np.int64]) -> NDArray[np.float64]:
        """Probabilities (N,) of item numbers (N,)."""
        found: NDArray[np.float64] = self._rates[items]
        return found
