"""The true clicks of users, and models that learnt them well, badly, or the wrong way round.

Whether a user clicks an item is drawn once for all pairs, from the chances that also made the training data. A click
then depends on user and item alone: an arm gets more of them only where its model ranks better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from features.dataset.descriptor import load_dataset
from models.bundle.bundle import Bundle
from models.ranker.train import TrainConfig
from tessera.demo import synthetic
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import quiet

SPEC = synthetic.SyntheticSpec(seed=0, users=300, items=120, events=30_000)
USERS = [synthetic._user_id(row) for row in range(SPEC.users)]
CANDIDATES = [synthetic._item_id(row) for row in range(100)]


class Truth:
    """The users' minds."""

    def __init__(self) -> None:
        catalogue, readers = synthetic._catalogue(SPEC), synthetic._readers(SPEC)
        liking = readers.taste[:, catalogue.subtopics] @ np.array([0.65, 0.35])
        logit = liking + catalogue.quality + readers.generosity[:, None]
        chance = synthetic._logistic(logit + synthetic._bias(logit))
        self._likes = np.random.default_rng(0).random(chance.shape) < chance

    def clicked(self, user: str, items: Sequence[str]) -> list[str]:
        """Returns the items of a list that the user clicks."""
        return [item for item in items if self._likes[int(user[1:]), int(item[1:])]]


@dataclass(frozen=True)
class Bundles:
    """Bundles that may serve.

    Attributes:
        weak: learnt from a tenth of the events; good: from all of them.
        bad: from all of them with the labels flipped. Offline it looks sound, since the test part is flipped as well.
        broken: as sound as weak, until somebody breaks it.
    """

    weak: Bundle
    good: Bundle
    bad: Bundle
    broken: Bundle


def train(directory: Path, name: str) -> Bundles:
    """Trains them on datasets of one name."""
    every, tenth, flipped = (directory / part for part in ("every", "tenth", "flipped"))
    for place in (every, tenth, flipped):
        written = synthetic.write_synthetic(place, users=SPEC.users, items=SPEC.items, events=SPEC.events)
        described = written.read_text(encoding="utf-8")
        assert 'name = "synthetic"' in described
        written.write_text(described.replace('name = "synthetic"', f'name = "{name}"'), encoding="utf-8")
    events = pl.read_parquet(every / "events.parquet")
    events.gather_every(10).write_parquet(tenth / "events.parquet")
    events.with_columns(clicked=1 - pl.col("clicked")).write_parquet(flipped / "events.parquet")
    return Bundles(
        weak=_trained(tenth, directory / "weak"),
        good=_trained(every, directory / "good", training=TrainConfig(max_epochs=4)),
        bad=_trained(flipped, directory / "bad", training=TrainConfig(max_epochs=1)),
        broken=_trained(tenth, directory / "broken", seed=1),
    )


def _trained(data: Path, out: Path, **options: Any) -> Bundle:
    # A codebook of few steps: how good it is decides nothing here.
    chosen = RunOptions(quantizer_options={"steps": 100}, encoder_dim=32, **options)
    result = run(load_dataset(data / "dataset.toml"), out, chosen, console=quiet(), registry=None, until="publish")
    assert result.bundle is not None
    return result.bundle
