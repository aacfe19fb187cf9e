"""`main-job`: the offline job beside rates that only count and the hashed-id ranker, on the whole test part."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from features.dataset.descriptor import Dataset
from models.ranker.evaluate import RATE_BASELINES
from tessera.bench.harness.result import BenchResult, Claim
from tessera.bench.harness.rows import measured_rows
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run

_RANKER = "ranker"
_MODELS = (*RATE_BASELINES, "hashed-id", _RANKER)
_SHOWN = (
    "all_rows",
    "all_auc",
    "all_log_loss",
    "all_normalized_entropy",
    "all_calibration_error",
    "unseen_rows",
    "unseen_auc",
    "known_users_auc",
    "unseen_users_rows",
    "unseen_users_auc",
)


def main_job(datasets: Sequence[Dataset], out: Path, *, seeds: int, console: Console) -> BenchResult:
    """Measures quality on the whole test part in each seed, and claims the ranker against every baseline.

    Args:
        datasets: One dataset under one or more splits.
        out: Directory with a run for each split and seed; a later call continues there.
        seeds: Number of seeds, from 0.
    """
    rows = measured_rows()
    claims: list[Claim] = []
    for dataset in datasets:
        margins: dict[str, list[float]] = {name: [] for name in _MODELS if name != _RANKER}
        for seed in range(seeds):
            console.rule(f"{dataset.name}, split by {dataset.split.by}, seed {seed}")
            folder = out / f"{dataset.name}-{dataset.split.by}-{seed}"
            options = load_options(dataset, [f"seed={seed}"])
            result = run(dataset, folder, options, console=console, registry=None, until="evaluate")
            quality = result.metrics["quality"]
            for model in _MODELS:
                measured = {
                    f"{part}_{name}": value for part, found in quality[model].items() for name, value in found.items()
                }
                row = {"split": dataset.split.by, "seed": seed, "model": model}
                rows.append(row | {name: measured[name] for name in _SHOWN})
            for baseline, found in margins.items():
                ours, theirs = quality[_RANKER]["all"]["auc"], quality[baseline]["all"]["auc"]
                found.append((ours or 0.0) - (theirs or 0.0))
        for baseline, found in margins.items():
            claim = f"split by {dataset.split.by}: test AUC above {baseline} in each seed (smallest margin)"
            claims.append(Claim(claim, min(found), 0.0, min(found) > 0))
    return BenchResult("main-job", datasets[0].name, seeds, rows, claims)
