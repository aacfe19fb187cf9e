"""`tessera bench shown`: rankers that learn from clicks, judged on uniformly shown items, under a known examination."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.errors import DatasetError
from features.frame import Frame
from models.ranker.evaluate import quality
from tessera.bench.harness.data import dataset_frame, progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.bench.shown.arms import ARMS, BLIND, CHOSEN, IPS, KNOWN, PERMUTED, arms
from tessera.bench.shown.clicks import CURVES, World, shown_frame, taught_world
from tessera.pipeline.options import load_options

IMPRESSIONS, UNIFORM, USERS, ITEMS = 10_000, 40_000, 500, 1_000
_GAIN, _BEHIND = 0.01, -0.003
# Least noise that a mean over seeds is granted, so that three equal seeds by chance refuse nothing.
_LEAST_NOISE = 0.001


def shown(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    impressions: int = IMPRESSIONS,
    curves: Sequence[str] = tuple(CURVES),
) -> BenchResult:
    """Simulates clicks in every seed and under every curve, and trains every arm; finished ones are kept in `out`.

    Args:
        dataset: Dataset with users and items, whose labels teach the preferences.
        out: Directory of the results.
        seeds: Number of seeds, from 0.
        console: Console of the progress.
        impressions: Simulated requests, ten items each.
        curves: Names in `CURVES`.

    Raises:
        DatasetError: The dataset has no users or no items.
    """
    if dataset.events.user is None or dataset.events.item is None:
        raise DatasetError(f"{dataset.source}: bench shown needs [events] user and item")
    rows = measured_rows()
    with progress_bar(console) as progress:
        task = progress.add_task("shown", total=seeds * len(curves))
        for seed in range(seeds):
            world: list[World] = []
            for curve in curves:
                rows.extend(_rows(dataset, out, world, curve=curve, seed=seed, impressions=impressions))
                progress.advance(task)
    return BenchResult("shown", dataset.name, seeds, rows, shown_claims(rows))


def _rows(
    dataset: Dataset, out: Path, world: list[World], *, curve: str, seed: int, impressions: int
) -> list[dict[str, Any]]:
    """Returns a row for each arm. The world is made when the first arm needs it, and kept in a list for the next."""
    options = load_options(dataset, [f"seed={seed}"])
    frames: list[Frame] = []

    def frame() -> Frame:
        if not world:
            real = dataset_frame(dataset, seed=seed)
            world.append(taught_world(dataset, real, options, users=USERS, items=ITEMS, seed=seed))
        if not frames:
            frames.append(shown_frame(world[0], CURVES[curve], impressions=impressions, uniform=UNIFORM, seed=seed))
        return frames[0]

    def work(name: str) -> dict[str, Any]:
        made = arms(dataset, frame(), CURVES[curve], options.shape, options.train_config())
        return {"auc": _auc(frame(), made[name])}

    decided_by = (dataset.model_dump(mode="json", exclude={"source"}), options.choices(), seed, curve, impressions)
    found: list[dict[str, Any]] = []
    for number, name in enumerate(ARMS):
        path = out / f"{curve}-{number}-{seed}.json"
        result = remembered(path, __name__, (*decided_by, name), partial(work, name))
        found.append({"clicks": "simulated", "examination": curve, "seed": seed, "arm": name} | result)
    return found


def _auc(frame: Frame, predict: Callable[[], NDArray[np.floating]]) -> float | None:
    return quality(frame.part("test")["label"].to_numpy().astype(np.float32), predict()).auc


def shown_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Returns the claims: gains in the seed that speaks most against each, and no loss without a position effect."""
    found = {(row["examination"], row["arm"], row["seed"]): row["auc"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})

    def gains(curve: str, other: str) -> list[float]:
        keys = [((curve, CHOSEN, seed), (curve, other, seed)) for seed in seeds]
        return [found[ours] - found[theirs] for ours, theirs in keys if ours in found and theirs in found]

    claims: list[Claim] = []
    if steep := gains("steep", BLIND):
        claims.append(at_least("steep: AUC of the position path less position-blind, worst seed", min(steep), _GAIN))
        known = min(gains("steep", IPS))
        claims.append(at_least("steep: AUC of the position path less inverse propensities, worst seed", known, _BEHIND))
        told = min(gains("steep", KNOWN))
        claims.append(at_least("steep: AUC of the position path less the true curve, worst seed", told, _BEHIND))
        permuted = min(gains("steep", PERMUTED))
        claims.append(at_least("steep: AUC of the position path less the permuted path, worst seed", permuted, _GAIN))
    if flat := gains("flat", BLIND):
        noise = max(_LEAST_NOISE, 2 * stdev(flat) / len(flat) ** 0.5 if len(flat) > 1 else 0.0)
        claims.append(
            at_least("flat: mean AUC of the position path less position-blind, within the noise", fmean(flat), -noise)
        )
    return claims
