"""Simulated clicks on a real catalogue: who likes what is known, and so is the examination of each position.

    P(click | user, item, position) = examination(position) · relevance(user, item)

Relevance is the probability of a ranker that was trained on the dataset's own labels (the teacher), spread out. An
older ranker orders the items of a request. Its scores agree with the relevance in part and have an error of their own
for each item. So an item may be shown at the top often for no good reason, and its clicks then say little about it.

Shape letters: I impressions, P positions, N rows, U users, M items.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.dataset.descriptor import Dataset
from features.frame import Frame
from models.ranker.loading import assembler, examples
from models.ranker.train import predict, train
from models.table.admission import Admission
from models.table.default_schema import default_schema
from tessera.pipeline.options import RunOptions

Floats = NDArray[np.float64]
POSITIONS = 10
CURVES: dict[str, Floats] = {
    "steep": 1.0 / np.arange(1, POSITIONS + 1),
    "mild": (0.7 / np.arange(1, POSITIONS + 1) ** 0.25).astype(np.float64),
    "flat": np.full(POSITIONS, 0.5),
}
"""Examination of each position, by the name of the curve."""


@dataclass(frozen=True)
class World:
    """Users, items and their relevance.

    Attributes:
        frame: Frame of the dataset, whose users and items are shown.
        relevance: (U, M) float32 probability of a click on an examined item.
    """

    frame: Frame
    relevance: NDArray[np.float32]


def taught_world(dataset: Dataset, frame: Frame, options: RunOptions, *, users: int, items: int, seed: int) -> World:
    """Trains the teacher and returns its world of users and items, drawn by the seed."""
    rng = np.random.default_rng([seed, 1])
    schema = default_schema(dataset, frame, options.shape, history_length=options.history_length)
    taught = train(schema, frame, options.train_config())
    chosen_users = np.sort(rng.choice(frame.users.height, min(users, frame.users.height), replace=False))
    seen = np.unique(frame.part("train")["item"].to_numpy())
    chosen_items = np.sort(rng.choice(seen, min(items, len(seen)), replace=False))
    small = frame.replace(users=frame.users[chosen_users], items=frame.items[chosen_items])
    pairs = _rows(
        np.repeat(np.arange(len(chosen_users)), len(chosen_items)),
        np.tile(np.arange(len(chosen_items)), len(chosen_users)),
    )
    source = assembler(schema, small, pairs, Admission(taught.sketch, schema.admission))
    found = predict(taught.ranker, source, examples(pairs)).astype(np.float64).clip(1e-6, 1 - 1e-6)
    logits = np.log(found / (1 - found)).reshape(len(chosen_users), len(chosen_items))
    spread = 1.5 * (logits - logits.mean()) / logits.std() - 1.0
    return World(small, (1 / (1 + np.exp(-spread))).astype(np.float32))


def shown_frame(world: World, curve: Floats, *, impressions: int, uniform: int, seed: int) -> Frame:
    """Returns a frame of simulated impressions, and a test part of uniformly shown items that users examine.

    Args:
        world: Users, items and relevance.
        curve: (P,) examination of each position.
        impressions: I, of which the last tenth is the validation part.
        uniform: Rows of the test part.
        seed: Seed of the requests and clicks.
    """
    rng = np.random.default_rng([seed, 2])
    users, items = world.relevance.shape
    count = len(curve)
    user = rng.integers(0, users, impressions)
    item = _distinct(rng, impressions, count, items)
    truth: Floats = np.log(world.relevance / (1 - world.relevance))
    error = rng.normal(0, 1.5, size=(items,))
    score = 0.5 * truth[user[:, None], item] + error[item] + rng.normal(0, 1.0, item.shape)
    item = np.take_along_axis(item, np.argsort(-score, axis=1), axis=1)
    clicked = np.less(rng.random(item.shape), curve * world.relevance[user[:, None], item])
    position = np.tile(np.arange(count), impressions)
    held = int(impressions * 0.9) * count
    split = np.where(np.arange(impressions * count) < held, "train", "validation")
    logged = _rows(np.repeat(user, count), item.ravel(), labels=clicked.ravel(), position=position, split=split)
    user, item = rng.integers(0, users, uniform), rng.integers(0, items, uniform)
    clicked = rng.random(uniform) < world.relevance[user, item]
    test = _rows(user, item, labels=clicked, position=np.zeros(uniform, dtype=np.int64), split=np.full(uniform, "test"))
    both = pl.concat([logged, test]).with_columns(event=pl.int_range(pl.len(), dtype=pl.UInt32))
    return world.frame.replace(examples=both.with_columns(time=pl.col("event").cast(pl.Int64)))


def _distinct(rng: np.random.Generator, rows: int, count: int, most: int) -> NDArray[np.int64]:
    """Draws `count` distinct numbers for each row; a row that repeats one is drawn again."""
    found = rng.integers(0, most, (rows, count))
    while len(again := np.flatnonzero((np.diff(np.sort(found, axis=1), axis=1) == 0).any(axis=1))):
        found[again] = rng.integers(0, most, (len(again), count))
    return found.astype(np.int64)


def _rows(
    user: NDArray[np.int64],
    item: NDArray[np.int64],
    *,
    labels: NDArray[np.bool_] | None = None,
    position: NDArray[np.int64] | None = None,
    split: NDArray[np.str_] | None = None,
) -> pl.DataFrame:
    count = len(user)
    return pl.DataFrame(
        {
            "event": pl.Series(np.arange(count, dtype=np.uint32)),
            "user": pl.Series(user.astype(np.uint32)),
            "item": pl.Series(item.astype(np.uint32)),
            "label": pl.Series(np.zeros(count) if labels is None else labels).cast(pl.Int8),
            "split": pl.Series(["test"] * count if split is None else split.tolist()),
            "history": pl.Series([[]] * count, dtype=pl.List(pl.UInt32)),
            "position": pl.Series(np.zeros(count) if position is None else position).cast(pl.Int32),
        }
    )
