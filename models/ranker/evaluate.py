"""Quality of predicted probabilities (on all examples, for known and unseen items and users), and counting baselines.

Shape letter: N examples.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.frame import Frame

Value = TypeVar("Value", bound=np.generic)
RATE_BASELINES = ("popularity", "user-item", "user-item-running")
_CLIP = 1e-7
_BINS = 15
_PRIOR = 10.0
# Variance of a place's constant: a place whose labels are all alike has a finite one.
_PLACE_VARIANCE = 9.0
_NEWTON_STEPS = 40
# Examples whose running rates are counted at once, about.
_KEYS_AT_ONCE = 1 << 20
LEAST_OF_LABEL = 10
"""Fewest examples of each label for which a part has an AUC: with fewer its standard error is about a tenth."""


PARTS = {
    "all": "all",
    "known": "known items",
    "unseen": "unseen items",
    "known_users": "known users",
    "unseen_users": "unseen users",
}
"""Label of each part that `by_novelty` measures, by its name in the metrics."""


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
        distinct: Items or users of the examples; None where the part is not chosen by items or users.
    """

    rows: int
    positives: float
    auc: float | None
    log_loss: float | None
    calibration_error: float | None
    normalized_entropy: float | None
    distinct: int | None = None


@dataclass(frozen=True)
class Keys:
    """Items or users of N examples, and which of them training saw.

    Attributes:
        ids: (N,) int64 row number of the item or the user.
        known: (N,) True if a training example has the same id.
    """

    ids: NDArray[np.int64]
    known: NDArray[np.bool_]


def quality(labels: NDArray[np.float32], probabilities: NDArray[np.floating]) -> Quality:
    """Measures predictions (N,) against labels (N,) in {0, 1}. Examples whose label is unknown, NaN, are left out."""
    from sklearn.metrics import log_loss, roc_auc_score

    labels, probabilities = with_label(labels, probabilities)
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


def with_label(labels: NDArray[np.float32], values: NDArray[Value]) -> tuple[NDArray[np.float32], NDArray[Value]]:
    """Returns the labels that are known, and the values (N, …) of the same examples."""
    known = ~np.isnan(labels)
    return (labels, values) if known.all() else (labels[known], values[known])


def calibration_error(labels: NDArray[np.float32], probabilities: NDArray[np.floating]) -> float:
    """Returns the expected calibration error of predictions (N,), N ≥ 1, against labels (N,) in {0, 1}."""
    order = np.argsort(probabilities, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if len(part)]
    gaps = [abs(float(probabilities[part].mean(dtype=np.float64) - labels[part].mean())) for part in bins]
    return float(np.average(gaps, weights=[len(part) for part in bins]))


def by_novelty(
    labels: NDArray[np.float32], probabilities: NDArray[np.floating], items: Keys | None, users: Keys | None
) -> dict[str, Quality]:
    """Measures all examples (N,), then those whose item, and those whose user, training saw or did not see.

    Args:
        items, users: Ids of the examples; None if the dataset has none, whose parts are then empty.

    Returns:
        Quality by part: `all`; `known` and `unseen` by item; `known_users` and `unseen_users` by user. A part with
        under `LEAST_OF_LABEL` examples of either label has no AUC and no normalized entropy.
    """
    found = {"all": quality(labels, probabilities)}
    nothing = np.zeros(len(labels), dtype=np.bool_)
    for ending, keys in (("", items), ("_users", users)):
        ids, known, unseen = (labels, nothing, nothing) if keys is None else (keys.ids, keys.known, ~keys.known)
        for name, held in (("known", known), ("unseen", unseen)):
            found[f"{name}{ending}"] = _part_quality(labels[held], probabilities[held], ids[held])
    return found


def novelty(frame: Frame, column: Literal["item", "user"]) -> Keys | None:
    """Returns the items or the users of a frame's test part; None if the dataset has no such column."""
    if not (frame.items if column == "item" else frame.users).height:
        return None
    ids = frame.blocks("test").whole(column)[column].to_numpy().astype(np.int64)
    seen = ids[:0]
    for block in frame.blocks("train").frames(column):
        seen = np.union1d(seen, block[column].unique().to_numpy())
    return Keys(ids, np.isin(ids, seen))


def _part_quality(
    labels: NDArray[np.float32], probabilities: NDArray[np.floating], ids: NDArray[np.generic]
) -> Quality:
    found = replace(quality(labels, probabilities), distinct=len(np.unique(ids)))
    labels, _ = with_label(labels, probabilities)
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < LEAST_OF_LABEL:
        return replace(found, auc=None, normalized_entropy=None)
    return found


def at_places(
    probabilities: NDArray[np.floating], labels: NDArray[np.float32], places: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Tells predictions the places of their examples: adds to the logit a constant for each place.

        maximise over c:  log P(labels | logit + c) - c² / (2 · 3²)

    Users click at the top because it is the top, so a model that knows places explains a log better than another that
    orders items better. After this step all models know the places alike, and differ by the order of items at one place
    alone. Newton's method finds all constants at once.

    Args:
        probabilities: (N,) predictions that know no place.
        labels: (N,) labels in {0, 1}.
        places: (N,) number of the place of each example, from 0.
    """
    logits, count = _logit(probabilities.astype(np.float64)), int(places.max(initial=0)) + 1
    constants = np.zeros(count)
    for _ in range(_NEWTON_STEPS):
        told = _rates(logits + constants[places])
        slope = np.bincount(places, labels - told, count) - constants / _PLACE_VARIANCE
        bend = np.bincount(places, told * (1 - told), count) + 1 / _PLACE_VARIANCE
        constants += np.clip(slope / bend, -1, 1)
    return _rates(logits + constants[places])


class Popularity:
    """Smoothed-popularity baseline: an item's positive rate in training, drawn towards the overall rate.

    p(i) = (positives_i + a · p) / (events_i + a), p the overall rate. An unseen item gets p.

    Args:
        items: item number per training event; labels: in {0, 1}.
        size: number of items.
        prior: a, in events.
    """

    def __init__(
        self, items: NDArray[np.integer], labels: NDArray[np.float32], *, size: int, prior: float = _PRIOR
    ) -> None:
        events = np.bincount(items, minlength=size)
        positives = np.bincount(items, weights=labels, minlength=size)
        self._rates = _smoothed(positives, events, float(labels.mean()), prior)

    def __call__(self, items: NDArray[np.integer]) -> NDArray[np.float64]:
        """Returns probabilities (N,) of item numbers (N,)."""
        found: NDArray[np.float64] = self._rates[items]
        return found


def added(users: NDArray[np.float64], items: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Adds the rates (N,) of users and items as log-odds: logit p = logit p(user) + logit p(item) - logit rate."""
    return _rates(_logit(users) + _logit(items) - _logit(np.float64(rate)))


def running_rates(
    keys: NDArray[np.integer],
    times: NDArray[np.int64],
    labels: NDArray[np.float32],
    *,
    rate: float,
    prior: float = _PRIOR,
) -> NDArray[np.float64]:
    """Returns the smoothed positive rate (N,) of each example's key over all examples strictly before its time.

    Args:
        keys: user or item number per example; times: any unit. Examples may come in any order.
        rate: Rate of a key without earlier examples.
        prior: Number of events by which a rate is drawn towards `rate`.
    """
    parts = max(1, -(-len(keys) // _KEYS_AT_ONCE))
    if parts == 1:
        return _running_rates(keys, times, labels, rate, prior)
    out = np.zeros(len(keys))
    of_part = (keys % parts).astype(np.int32)
    for part in range(parts):
        chosen = np.flatnonzero(of_part == part)
        out[chosen] = _running_rates(keys[chosen], times[chosen], labels[chosen], rate, prior)
    return out


def _running_rates(
    keys: NDArray[np.integer], times: NDArray[np.int64], labels: NDArray[np.float32], rate: float, prior: float
) -> NDArray[np.float64]:
    order = np.lexsort((times, keys))
    key, time, label = keys[order], times[order], labels[order].astype(np.float64)
    place = np.arange(len(key))
    new_key = np.r_[True, key[1:] != key[:-1]]
    new_time = new_key | np.r_[True, time[1:] != time[:-1]]
    # The first example of the same key, and the first of the same key and time: the examples between them came before.
    first, tie = (np.maximum.accumulate(np.where(new, place, 0)) for new in (new_key, new_time))
    positives = np.r_[0.0, np.cumsum(label)]
    out = np.zeros(len(key))
    out[order] = _smoothed(positives[tie] - positives[first], tie - first, rate, prior)
    return out


def rate_baselines(frame: Frame) -> dict[str, NDArray[np.float64]]:
    """Returns probabilities of the test part by the baselines that only count, by name in `RATE_BASELINES`.

    `popularity` is the item's rate in training. `user-item` adds the user's rate in training to it.
    `user-item-running` adds the same two rates counted over every example strictly before the scored example, of any
    part. The example's history has the same knowledge; a ranker that is frozen after training does not.
    An example whose label is unknown is not counted, and its prediction means nothing.
    """
    events = _events(frame)
    labels, times = events["label"].astype(np.float32), events["time"]
    known = ~np.isnan(labels)
    train, test = np.flatnonzero(events["train"] & known), np.flatnonzero(events["test"])
    if "event" in events:
        # The blocks of a part are in no order.
        test = test[np.argsort(events["event"][test], kind="stable")]
    rate = float(labels[train].mean())
    static, running = {}, {}
    for name, size in (("user", frame.users.height), ("item", frame.items.height)):
        key = events[name]
        static[name] = Popularity(key[train], labels[train], size=max(size, 1))(key[test])
        rates = np.full(len(key), rate)
        rates[known] = running_rates(key[known], times[known], labels[known], rate=rate)
        running[name] = rates[test]
    found = static["item"], added(static["user"], static["item"], rate), added(running["user"], running["item"], rate)
    return dict(zip(RATE_BASELINES, found, strict=True))


def _events(frame: Frame) -> dict[str, NDArray[Any]]:
    """Returns columns of all examples, block by block, and masks of the parts; `event` only if there are blocks."""
    blocks = frame.all_blocks()
    names = ["user", "item", "time", "label", *(["event"] if len(blocks) > 1 else [])]
    parts = [(pl.col("split") == part).alias(part) for part in ("train", "test")]
    found = [block.select(*names, *parts) for block in blocks.frames(*names, "split")]
    return {name: np.concatenate([block[name].to_numpy() for block in found]) for name in found[0].columns}


def _smoothed(
    positives: NDArray[np.floating | np.integer], events: NDArray[np.integer], rate: float, prior: float
) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (positives.astype(np.float64) + prior * rate) / (events + prior)
    return found


def _logit(rates: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    clipped = np.clip(rates, _CLIP, 1 - _CLIP)
    found: NDArray[np.float64] = np.log(clipped / (1 - clipped))
    return found


def _rates(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    return found
