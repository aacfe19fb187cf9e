"""Corrects the score of a new item by the user's labelled items that are nearest to it.

A ranker that knows only an item's content errs in the same direction on alike items of one user. The residuals of the
user's nearest labelled items, label less score, show the direction. An item with enough events of its own is left as
it is: the ranker has learnt such an item itself.

The method follows "CAAD" (2025) without its network; see `docs/guides/encoders.md`.

Shape letters: E examples, K known examples, N items, D dim.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.errors import BundleError, TrainingError
from models.encoder.measure import LabelledPairs

Floats = NDArray[np.float64]
NEIGHBOURS = 20
"""Labelled items of the user that vote."""
_POWER, _SHRINK = 2.0, 1.0
_MOST_WEIGHT = 50.0
_LEAST_EXAMPLES = 100
_FILE = "correction.json"


@dataclass(frozen=True)
class NeighbourCorrection:
    """Correction of log-odds by neighbours.

    Attributes:
        source: Id of the encoder whose vectors say which items are near.
        weight: Log-odds per unit of the mean residual; 0 changes nothing.
        neighbours: Labelled items of the user that vote, nearest first.
        power: Power of the cosine that weighs a vote.
        shrink: Weight of a vote of 0 that is added to the others, so that distant items change little.
        most_events: Events from which an item is left as it is.
    """

    source: str
    weight: float
    neighbours: int = NEIGHBOURS
    power: float = _POWER
    shrink: float = _SHRINK
    most_events: int = 1

    def apply(self, scores: Floats, votes: Floats, events: NDArray[np.integer] | None = None) -> Floats:
        """Returns corrected probabilities (E,).

        Args:
            scores: (E,) probabilities of the ranker.
            votes: (E,) mean residuals, as `mean_residuals` returns them.
            events: (E,) events of each example's item in training; None if every item is new.
        """
        on = np.ones(len(scores)) if events is None else (events < self.most_events).astype(np.float64)
        changed = _odds(scores) + self.weight * on * votes
        return np.where(on > 0, 1 / (1 + np.exp(-changed)), scores)

    def save(self, directory: Path) -> None:
        """Writes the correction into an existing directory."""
        (directory / _FILE).write_bytes(msgspec.json.encode(asdict(self)))


def load_correction(directory: Path) -> NeighbourCorrection:
    """Loads a correction that `NeighbourCorrection.save` wrote.

    Raises:
        BundleError: The file is missing or damaged.
    """
    try:
        return msgspec.json.decode((directory / _FILE).read_bytes(), type=NeighbourCorrection)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"{directory}: holds no correction that can be read ({error}); fit it again") from error


def mean_residuals(
    vectors: NDArray[np.float32],
    asked: LabelledPairs,
    known: LabelledPairs,
    residuals: NDArray[np.floating],
    *,
    like: NeighbourCorrection,
    permuted: int | None = None,
) -> Floats:
    """Returns the mean residual of the user's labelled items nearest to each asked item, (E,) float64.

    Args:
        vectors: (N, D) unit vectors of the items.
        asked: E examples; their labels are not read. An asked item does not vote for itself.
        known: K labelled examples.
        residuals: (K,) label less score of each, from a ranker that did not read the label.
        like: Number of neighbours, power and shrinkage.
        permuted: Seed of the control, in which items of the user drawn at random vote with the weights of the nearest.
            None: the nearest vote.
    """
    by_user = np.argsort(known.user, kind="stable")
    of_user, of_item, of_residual = known.user[by_user], known.item[by_user], residuals[by_user]
    order = np.argsort(asked.user, kind="stable")
    users, starts = np.unique(asked.user[order], return_index=True)
    rng = np.random.default_rng(permuted)
    votes = np.zeros(len(asked.user))
    for user, rows in zip(users.tolist(), np.split(order, starts[1:]), strict=True):
        mine = slice(*np.searchsorted(of_user, [user, user + 1]).tolist())
        items, own = of_item[mine], of_residual[mine]
        if not len(items):
            continue
        cosines = np.maximum(vectors[asked.item[rows]] @ vectors[items].T, 0).astype(np.float64)
        cosines[asked.item[rows][:, None] == items[None]] = 0.0
        count = min(like.neighbours, len(items))
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        weights = np.take_along_axis(cosines, nearest, axis=1) ** like.power
        if permuted is not None:
            nearest = rng.permuted(np.tile(np.arange(len(items)), (len(rows), 1)), axis=1)[:, :count]
        votes[rows] = (weights * own[nearest]).sum(axis=1) / (weights.sum(axis=1) + like.shrink)
    return votes


def fit_correction(
    labels: NDArray[np.integer], scores: Floats, votes: Floats, *, source: str, most_events: int = 1
) -> NeighbourCorrection:
    """Fits the weight by the log loss on examples of items that the ranker has not seen.

    Args:
        labels: (E,) 0 or 1.
        scores: (E,) probabilities of the ranker, fitted without these examples.
        votes: (E,) mean residuals of the neighbours, with the default settings.
        source: Id of the encoder whose vectors say which items are near.
        most_events: Events from which an item is left as it is.

    Raises:
        TrainingError: There are fewer than 100 examples.
    """
    from scipy.optimize import minimize_scalar

    if len(labels) < _LEAST_EXAMPLES:
        raise TrainingError(
            f"correct: {len(labels)} events of items held out, expected {_LEAST_EXAMPLES} at least; "
            'remove correct = "neighbours"'
        )
    odds, signs = _odds(scores), 1 - 2.0 * np.asarray(labels)

    def loss(weight: float) -> float:
        return float(np.logaddexp(0, signs * (odds + weight * votes)).mean())

    best = float(minimize_scalar(loss, bounds=(0.0, _MOST_WEIGHT), method="bounded").x)
    return NeighbourCorrection(source, best if loss(best) < loss(0.0) else 0.0, most_events=most_events)


def _odds(scores: Floats) -> Floats:
    inside = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.log(inside / (1 - inside))
