"""Weight of content's list beside that of the towers, chosen on users' next items of the validation part.

Both lists are fused by reciprocal ranks: Cormack et al., "Reciprocal Rank Fusion" (SIGIR 2009), equation 1, with k = 60
and a weight for each list.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.content.lexical import fuse_scores
from features.frame import Frame
from models.towers.evaluate import spaces_of
from models.towers.inputs import ReadRows
from models.towers.sequences import TRAIN, Sequences
from models.towers.towers import Towers
from models.towers.validation import rank_gain, top_items

WEIGHTS = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Weights that are tried. The towers' list weighs 1."""
_DEPTH = 100


def chosen_weight(
    frame: Frame, towers: Towers, read_rows: ReadRows, sequences: Sequences, asked: NDArray[np.int64]
) -> float:
    """Returns the weight of content with the highest gain of the fused lists, the smallest of equally good weights.

    The weight is 1 if the items have no content, or if nobody is asked.

    Args:
        frame: Frame of the events.
        towers: Trained towers.
        read_rows: Reads their rows.
        sequences: Events of all users.
        asked: (M, 3) users with a next item, as `Sequences.first_of` returns.
    """
    if not len(asked) or "content_vector" not in frame.items.columns:
        return 1.0
    trained = np.bincount(sequences.items[sequences.parts == TRAIN], minlength=frame.items.height)
    spaces = spaces_of(frame, towers, read_rows, sequences, asked, trained)
    own, near = (top_items(sequences, asked, *spaces[name], _DEPTH) for name in ("towers", "content"))
    goals = sequences.items[asked[:, 0]]
    gains = [rank_gain(fused_ranks(own, near, goals, weight, last=frame.items.height)) for weight in WEIGHTS]
    return WEIGHTS[int(np.argmax(gains))]


def fused_ranks(
    towers: Sequence[NDArray[np.int64]],
    content: Sequence[NDArray[np.int64]],
    goals: NDArray[np.int64],
    weight: float,
    *,
    last: int,
) -> NDArray[np.int64]:
    """Returns the rank (M,) of each user's next item in the fused list, from 0.

    Args:
        towers: M lists of items, best first.
        content: M lists of items, best first.
        goals: (M,) next item of each user.
        weight: Weight of content. A list of weight 0 is left out.
        last: Rank of an item that is in no list.
    """
    ranks = np.full(len(goals), last, dtype=np.int64)
    for number, goal in enumerate(goals.tolist()):
        lists, weights = [towers[number]], [1.0]
        if weight:
            lists, weights = [*lists, content[number]], [*weights, weight]
        items, _ = fuse_scores(lists, sum(map(len, lists)), weights)
        (place,) = np.nonzero(items == goal)
        if len(place):
            ranks[number] = place[0]
    return ranks
