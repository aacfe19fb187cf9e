"""Rows of a bundle's rankings before and after its run got a view: they must be equal to the bit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import load_dataset
from models.bundle.bundle import Bundle
from models.encoder.tuning.options import TuneOptions
from models.ranker.train import TrainConfig
from tessera.demo.synthetic import write_synthetic
from tessera.encoders.tune import SIMILAR, ViewOptions, tune_view
from tessera.pipeline.options import RunOptions
from tessera.pipeline.run import run

_USERS = 40


def untouched(out: Path, seed: int) -> list[dict[str, Any]]:
    """Runs a small synthetic catalogue to a bundle, tunes a view, publishes again, and compares every score.

    Args:
        out: Directory of the run; made again.
        seed: Seed of run and fit.
    """
    shutil.rmtree(out, ignore_errors=True)
    dataset = load_dataset(write_synthetic(out / "data", users=200, items=300, events=8_000))
    options = RunOptions(seed=seed, training=TrainConfig(max_epochs=1))
    quiet = Console(quiet=True)

    def published() -> Bundle:
        bundle = run(dataset, out / "run", options, console=quiet, registry=None, until="publish").bundle
        assert bundle is not None
        return bundle

    before = _scores(published())
    tuned = tune_view(out / "run", ViewOptions(tune=TuneOptions(seed=seed, rounds=5)))
    bundle = published()
    after = _scores(bundle)
    return [
        {
            "seed": seed,
            "base": "bundle",
            "variant": f"with the view {SIMILAR}",
            "scores": after.size,
            "view_steps": len(tuned.view.steps),
            "views": len(bundle.views),
            "equal_share": float(np.mean(before.view(np.uint32) == after.view(np.uint32))),
        }
    ]


def _scores(bundle: Bundle) -> NDArray[np.float32]:
    """Returns the scores (U, N) of all items for the first users."""
    users = bundle.users["user_id"][:_USERS].to_list()
    items = bundle.items["item_id"].to_list()
    return np.stack([bundle.rank(user, items) for user in users])
