"""Corrects the score of a new item by the user's labelled items that are near to it.

A ranker that knows only an item's content errs in the same direction on alike items of one user. The user's last
labelled items vote: each with its label less the label that user and item made likely, by the fourth power of the
cosine, so that distant items hardly vote. The mean over the user's labelled items is taken out, so a user who likes
everything gets no correction. An item whose id the ranker has learnt is left as it is.

The method follows "CAAD" (2025) without its network; see `docs/adr/0051-correct-by-neighbours.md`.

The bits of a vote depend on neither the batch nor the threads: cosines are sums of whole numbers, and every sum over
labelled items has `LABELLED` terms.

Shape letters: E examples, N items, D dim, L = LABELLED.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from features.content.encoder import content_id
from features.errors import BundleError, TrainingError

Floats = NDArray[np.float64]
Vectors = NDArray[np.float32]
LABELLED = 60
"""Labelled items of a user that vote, the last ones."""
_SHRINK, _USER_PRIOR, _ITEM_PRIOR = 0.3, 5.0, 10.0
_MOST_WEIGHT = 50.0
_LEAST_EXAMPLES = 100
# Products of two whole unit vectors are below 2^40, so that every partial sum is exact in float64.
_WHOLE = 2.0**20
_AT_ONCE = 1_024
_FILE, _RATES = "correction.json", "rates.safetensors"


@dataclass(frozen=True)
class LabelledItems:
    """Last labelled items of users, one row for each user or example, filled from the left.

    Attributes:
        items: (E, L) int64 number of the item, -1 for no item.
        labels: (E, L) float64, 0 or 1.
    """

    items: NDArray[np.int64]
    labels: Floats

    @staticmethod
    def of(items: NDArray[np.int64], labels: NDArray[np.integer]) -> "LabelledItems":
        """Returns the last L of one user's labelled items, oldest first."""
        last = len(items[-LABELLED:])
        found = LabelledItems(np.full((1, LABELLED), -1, dtype=np.int64), np.zeros((1, LABELLED)))
        if last:
            found.items[0, :last], found.labels[0, :last] = items[-last:], labels[-last:]
        return found


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of the correction's JSON file."""

    space: str
    weight: float
    base_rate: float


@dataclass(frozen=True, eq=False)
class NeighbourCorrection:
    """Correction of log-odds by neighbours.

    Attributes:
        space: Id of the space whose vectors say which items are near.
        weight: Log-odds per unit of a vote, above 0.
        base_rate: Share of label 1 in training.
        rates: (N,) float32 log-odds of label 1 of each published item, less those of `base_rate`. An item that the
            stream adds has 0.
    """

    space: str
    weight: float
    base_rate: float
    rates: NDArray[np.float32]

    @cached_property
    def id(self) -> str:
        """Hash of everything that the correction computes with."""
        return content_id("correction", msgspec.json.encode(self._kept), self.rates.tobytes())

    @property
    def _kept(self) -> _Kept:
        return _Kept(self.space, self.weight, self.base_rate)

    def residuals(self, labelled: LabelledItems) -> Floats:
        """Returns what each labelled item says beyond user and item, (E, L): their mean over a user is 0."""
        valid = (labelled.items >= 0).astype(np.float64)
        count = valid.sum(axis=1, keepdims=True)
        likes = (labelled.labels * valid).sum(axis=1, keepdims=True)
        user = odds((likes + _USER_PRIOR * self.base_rate) / (count + _USER_PRIOR))
        known = (labelled.items >= 0) & (labelled.items < len(self.rates))
        rates = np.append(self.rates, np.float32(0)).astype(np.float64)
        item = rates[np.where(known, labelled.items, len(self.rates))]
        found = (labelled.labels - _probability(user + item)) * valid
        centred: Floats = (found - found.sum(axis=1, keepdims=True) / np.maximum(count, 1)) * valid
        return centred

    def votes(
        self, asked: NDArray[np.int64], labelled: LabelledItems, vectors: Vectors, *, residuals: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """Returns what the labelled items say of each asked item, as log-odds.

        Args:
            asked: (E,) numbers of the asked items. An item does not vote for itself.
            labelled: Labelled items of each example's user; one row if all examples are of one user.
            vectors: (N, D) unit vectors of the items; zero for an item without content.
            residuals: As `residuals` returns them, by default those of `labelled`.

        Returns:
            The sum over the labelled items (E,), and the part of each labelled item (E, L).
        """
        own = self.residuals(labelled) if residuals is None else residuals
        own = np.broadcast_to(own, (len(asked), LABELLED))
        items = np.broadcast_to(labelled.items, (len(asked), LABELLED))
        parts = np.zeros((len(asked), LABELLED))
        for start in range(0, len(asked), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            nearness = _nearness(asked[rows], items[rows], labelled, vectors)
            parts[rows] = nearness * own[rows] / (nearness.sum(axis=1, keepdims=True) + _SHRINK)
        parts *= self.weight
        return parts.sum(axis=1), parts

    def save(self, directory: Path) -> None:
        """Writes the correction into an existing directory."""
        (directory / _FILE).write_bytes(msgspec.json.encode(self._kept))
        (directory / _RATES).write_bytes(save({"rates": self.rates}))


def load_correction(directory: Path) -> NeighbourCorrection:
    """Loads a correction that `NeighbourCorrection.save` wrote.

    Raises:
        BundleError: A file is missing or damaged.
    """
    try:
        kept = msgspec.json.decode((directory / _FILE).read_bytes(), type=_Kept)
        rates = load((directory / _RATES).read_bytes())["rates"]
    except (OSError, msgspec.MsgspecError, SafetensorError, KeyError) as error:
        raise BundleError(f"{directory}: holds no correction that can be read ({error}); fit it again") from error
    return NeighbourCorrection(kept.space, kept.weight, kept.base_rate, rates)


def corrected(scores: NDArray[np.floating], votes: Floats) -> NDArray[np.float32]:
    """Returns probabilities (E,) float32 whose log-odds are changed by votes (E,); without a vote they keep their bits.

    Args:
        scores: (E,) probabilities of the ranker.
        votes: (E,) log-odds, of `NeighbourCorrection.votes`; 0 for an item that is not new.
    """
    changed = _probability(odds(scores.astype(np.float64)) + votes).astype(np.float32)
    return np.where(votes != 0, changed, scores.astype(np.float32))


def fit_weight(labels: NDArray[np.integer], scores: NDArray[np.floating], votes: Floats) -> float:
    """Fits the weight by the log loss on examples of items that the ranker has not seen; 0 if no weight helps.

    Args:
        labels: (E,) 0 or 1.
        scores: (E,) probabilities of the ranker, fitted without these examples.
        votes: (E,) log-odds of a correction of weight 1.

    Raises:
        TrainingError: There are fewer than 100 examples.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) < _LEAST_EXAMPLES:
        raise TrainingError(
            f"correct: {len(labels)} events of items held out, expected {_LEAST_EXAMPLES} at least; "
            'set correct = "off" in [run]'
        )
    own, signs = odds(scores.astype(np.float64)), 1 - 2.0 * np.asarray(labels)

    def loss(weight: float) -> float:
        return float(np.logaddexp(0, signs * (own + weight * votes)).mean())

    best = float(minimize_scalar(loss, bounds=(0.0, _MOST_WEIGHT), method="bounded").x)
    return best if loss(best) < loss(0.0) else 0.0


def coded_labels(items: NDArray[np.int64], labels: NDArray[np.number[Any]]) -> NDArray[np.int64]:
    """Returns items with their labels as one number each, as `features.history.History` keeps them."""
    coded: NDArray[np.int64] = 2 * items + (labels > 0)
    return coded


def item_rates(events: NDArray[np.integer], likes: NDArray[np.integer], base_rate: float) -> NDArray[np.float32]:
    """Returns the rates of `NeighbourCorrection` from the events and the likes (N,) of each item in training."""
    smoothed = (likes + _ITEM_PRIOR * base_rate) / (events + _ITEM_PRIOR)
    base = odds(np.full(1, base_rate))
    return (odds(smoothed) - base).astype(np.float32)


def odds(probabilities: Floats) -> Floats:
    """Returns log-odds of probabilities."""
    inside = np.clip(probabilities, 1e-6, 1 - 1e-6)
    found: Floats = np.log(inside / (1 - inside))
    return found


def _probability(log_odds: Floats) -> Floats:
    found: Floats = 1 / (1 + np.exp(-log_odds))
    return found


def _nearness(asked: NDArray[np.int64], items: NDArray[np.int64], labelled: LabelledItems, vectors: Vectors) -> Floats:
    """Returns the fourth power of the cosine of asked items (E,) to labelled items, (E, L); 0 below a cosine of 0."""
    queries = _whole(vectors[asked])
    if len(labelled.items) == 1:
        products = queries @ _whole(vectors[labelled.items[0]]).T
    else:
        products = np.matmul(_whole(vectors[items]), queries[:, :, None])[:, :, 0]
    squares = np.square(np.maximum(products, 0) / _WHOLE**2)
    votes = (items >= 0) & (items != asked[:, None])
    found: Floats = np.square(squares) * votes
    return found


def _whole(vectors: Vectors) -> Floats:
    return np.rint(vectors.astype(np.float64) * _WHOLE)
