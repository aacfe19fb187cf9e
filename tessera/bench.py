"""Benchmarks with their peers side by side; one shape of JSON for all.

{"bench", "dataset", "seeds", "rows": [{…}], "claims": [{"claim", "value", "target", "holds"}]}
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from features.dataset import Dataset
from tessera.run import RunOptions, run

_MODELS = ("popularity", "hashed-id", "ranker")


@dataclass(frozen=True)
class Claim:
    """What is stated, judged from the rows."""

    claim: str
    value: float
    target: float
    holds: bool


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark measured; see the module for the JSON."""

    bench: str
    dataset: str
    seeds: int
    rows: list[dict[str, Any]]
    claims: list[Claim]

    @property
    def holds(self) -> bool:
        """Whether every claim does."""
        return all(claim.holds for claim in self.claims)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def main_job(datasets: Sequence[Dataset], out: Path, *, seeds: int, console: Console) -> BenchResult:
    """The offline job beside smoothed popularity and the hashed-id ranker, on the test part, in each seed.

    Args:
        datasets: one dataset under one or more splits.
        out: a run's directory for each split and seed; a later call goes on from there.
        seeds: how many, from 0.
    """
    rows: list[dict[str, Any]] = []
    claims: list[Claim] = []
    for dataset in datasets:
        margins: dict[str, list[float]] = {name: [] for name in _MODELS if name != "ranker"}
        for seed in range(seeds):
            console.rule(f"{dataset.name}, split by {dataset.split.by}, seed {seed}")
            place = out / f"{dataset.name}-{dataset.split.by}-{seed}"
            result = run(dataset, place, RunOptions(seed=seed), console=console, registry=None, until="evaluate")
            quality = result.metrics["quality"]
            for model in _MODELS:
                row = {"split": dataset.split.by, "seed": seed, "model": model}
                for part, measured in quality[model].items():
                    row |= {f"{part}_{name}": value for name, value in measured.items()}
                rows.append(row)
            for baseline, found in margins.items():
                ours, theirs = quality["ranker"]["all"]["auc"], quality[baseline]["all"]["auc"]
                found.append((ours or 0.0) - (theirs or 0.0))
        for baseline, found in margins.items():
            claims.append(
                Claim(
                    f"split by {dataset.split.by}: test AUC above {baseline} in each seed (smallest margin)",
                    min(found),
                    0.0,
                    min(found) > 0,
                )
            )
    return BenchResult("main-job", datasets[0].name, seeds, rows, claims)


def render(result: BenchResult, console: Console) -> None:
    """The rows, then each claim and whether it holds."""
    columns = (
        "split",
        "seed",
        "model",
        "all_auc",
        "all_log_loss",
        "all_normalized_entropy",
        "unseen_rows",
        "unseen_auc",
    )
    table = Table(title=f"{result.bench} on {result.dataset}, {result.seeds} seeds", title_justify="left")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("split", "model") else "right")
    for row in result.rows:
        cells = [row[column] for column in columns]
        table.add_row(
            *(f"{cell:.4f}" if isinstance(cell, float) else "–" if cell is None else str(cell) for cell in cells)
        )
    console.print(table)
    for claim in result.claims:
        mark = "[green]holds[/green]" if claim.holds else "[red]does not hold[/red]"
        console.print(f"{mark}  {claim.claim}: {claim.value:+.4f} (target > {claim.target:g})")
