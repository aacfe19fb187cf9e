"""`compression`: embedding methods at equal bytes, and which to take at which budget.

A budget is a share of the collisionless table's weights. Methods are trained and scored alike (see
`models.compressed.fit`) on one split; seeds decide initial values and the order of examples. Each measurement is
a file, so that a later call goes on where one was stopped.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from features.dataset.descriptor import Dataset
from features.dataset.input_files import file_hashes
from models.compressed.fields import Fields
from models.compressed.fit import FitConfig, Fitted, fit
from models.compressed.method import FLOAT_BYTES, BudgetError, EmbeddingMethod, footprint
from models.compressed.registry import FAMILIES, METHODS
from tessera.bench.harness.data import dataset_fields, progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least, at_most
from tessera.pipeline.made_of import key_of

BUDGETS = (1.0, 0.5, 0.25, 0.1, 0.02)
_NOISE = 0.001  # AUC that is not worth paying for, however small the deviation over seeds
_REGRET = 0.002
_LABEL_GAP = 0.055  # of a panel's height
_REFERENCE, _BASELINE, _MULTIPLEXED = "collisionless", "hashing", "unified-1"
_SHOWN = ("auc", "log_loss", "validation_auc", "train_seconds", "lookup_ms", "epochs")


@dataclass(frozen=True)
class CompressionResult(BenchResult):
    """A benchmark's result with a choice for each budget.

    Attributes:
        recommendations: for each budget the method, its share of the weights' bytes and its mean measures.
    """

    recommendations: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    """One training; `budget` is in bytes, `share` of the collisionless weights."""

    share: float
    budget: int
    method: type[EmbeddingMethod]
    seed: int


def compression(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    budgets: Sequence[float] = BUDGETS,
    dim: int = 32,
    methods: Sequence[str] = tuple(METHODS),
    config: FitConfig | None = None,
) -> CompressionResult:
    """Measures each method at each budget in each seed, and the collisionless table at what it takes.

    Args:
        dataset: Dataset whose single-valued categorical columns are embedded, with its own split.
        out: Directory of the measurements and the plot.
        seeds: Number of seeds, from 0.
        budgets: Shares of the bytes of the collisionless table's weights.
        dim: D.
        methods: names in `METHODS`.
        config: of the training; its seed is replaced.
    """
    columns = dataset_fields(dataset)
    full = columns.values * dim * FLOAT_BYTES
    unlimited = METHODS[_REFERENCE].at(columns, dim, 2**62, seed=0)
    reference = footprint(unlimited.stored())
    jobs = [_Job(reference / full, reference, METHODS[_REFERENCE], seed) for seed in range(seeds)]
    jobs += [
        _Job(share, int(share * full), METHODS[name], seed)
        for share in sorted(budgets, reverse=True)
        for name in methods
        for seed in range(seeds)
    ]
    key = ("compression", dataset.model_dump(mode="json", exclude={"source"}), file_hashes(dataset), dim)
    measure = _Measure(columns, dim, config or FitConfig(), out / f"compression-{dataset.name}", key)
    rows = measure.all(jobs, console)
    chosen = [_recommend(rows, share) for share in sorted(budgets, reverse=True)]
    recommendations = [choice for choice in chosen if choice is not None]
    plot = out / f"compression-{dataset.name}.png"
    draw(rows, dataset.name, full, plot)
    for choice in recommendations:
        console.print(
            f"budget {choice['budget']:g}: {choice['method']} ({choice['bytes']:,} bytes, "
            f"{choice['lookup_ms']:.2f} ms a lookup), test AUC {choice['auc']:.4f}, "
            f"collisionless {_mean(_of(rows, jobs[0].share), 'auc'):.4f}"
        )
    claims = _claims(rows, recommendations, full)
    return CompressionResult(
        "compression", dataset.name, seeds, rows, claims, str(plot), recommendations=recommendations
    )


class _Measure:
    """Measurements, each done once: a file for each method, size and seed."""

    def __init__(self, columns: Fields, dim: int, config: FitConfig, directory: Path, key: Any) -> None:
        self._fields, self._dim, self._config = columns, dim, config
        self._directory = directory
        self._key = key
        directory.mkdir(parents=True, exist_ok=True)

    def all(self, jobs: Sequence[_Job], console: Console) -> list[dict[str, Any]]:
        """Returns a row for each job; those that cannot be done are one row for all seeds."""
        rows: list[dict[str, Any]] = []
        with progress_bar(console) as bar:
            task = bar.add_task("", total=len(jobs))
            for number, job in enumerate(jobs):
                bar.update(task, description=f"{job.method.name} at {job.share:.3g}, seed {job.seed}")

                def advance(done: int, total: int, number: int = number) -> None:
                    bar.update(task, completed=number + done / total)

                row = {"budget": job.share, "method": job.method.name}
                try:
                    fitted = self._one(job, advance)
                    row |= {"seed": job.seed, "bytes": fitted.bytes} | {name: asdict(fitted)[name] for name in _SHOWN}
                except BudgetError as error:
                    row |= {"note": f"needs at least {error.least:,} bytes"}
                if row not in rows:
                    rows.append(row)
                bar.update(task, completed=number + 1)
        return rows

    def _one(self, job: _Job, advance: Callable[[int, int], None]) -> Fitted:
        method = job.method.at(self._fields, self._dim, job.budget, seed=job.seed)
        config = replace(self._config, seed=job.seed)
        # By its size and not by the budget: a method that takes no more of a larger one is the same there.
        key = key_of(self._key, asdict(config), job.method.name, footprint(method.stored()))
        path = self._directory / f"{job.method.name}-{job.seed}-{key[:16]}.json"
        measured = remembered(path, __name__, key, lambda: asdict(fit(method, self._fields, config, progress=advance)))
        return msgspec.convert(measured, Fitted)


def _of(rows: Sequence[dict[str, Any]], share: float, method: str | None = None) -> list[dict[str, Any]]:
    """Measured rows of a budget, of one method where it is named."""
    return [row for row in rows if "auc" in row and row["budget"] == share and method in (None, row["method"])]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(row[name] for row in rows) if rows else float("nan")


def _recommend(rows: Sequence[dict[str, Any]], share: float) -> dict[str, Any] | None:
    """Returns the cheapest of the methods that validation cannot tell from the best: fewest bytes, then fastest lookup.

    Cannot tell: within 0.001 of its mean AUC, or within its standard deviation over the seeds where that is more.
    Bytes within a hundredth count as equal, since knobs are whole numbers.
    """
    by_method = {method: _of(rows, share, method) for method in dict.fromkeys(row["method"] for row in rows)}
    by_method = {method: own for method, own in by_method.items() if own}
    if not by_method:
        return None
    validation = {method: _mean(own, "validation_auc") for method, own in by_method.items()}
    best = max(validation, key=lambda method: validation[method])
    spread = statistics.stdev(row["validation_auc"] for row in by_method[best]) if len(by_method[best]) > 1 else 0.0
    near = [method for method in validation if validation[method] >= validation[best] - max(_NOISE, spread)]
    fewest = min(_mean(by_method[method], "bytes") for method in near)
    cheap = [method for method in near if _mean(by_method[method], "bytes") <= 1.01 * fewest]
    method = min(cheap, key=lambda method: _mean(by_method[method], "lookup_ms"))
    own = by_method[method]
    measured = {name: _mean(own, name) for name in _SHOWN}
    return {"budget": share, "method": method, "bytes": round(_mean(own, "bytes"))} | measured


def _claims(rows: Sequence[dict[str, Any]], recommendations: Sequence[dict[str, Any]], full: int) -> list[Claim]:
    measured = [row for row in rows if "auc" in row]
    beyond = max(row["bytes"] - round(row["budget"] * full) for row in measured)
    claims = [at_most("bytes that any method stores beyond its budget", max(beyond, 0), 0)]
    for choice in recommendations:
        share = choice["budget"]
        hashed, multiplexed = (_mean(_of(rows, share, name), "auc") for name in (_BASELINE, _MULTIPLEXED))
        if not np.isnan(multiplexed - hashed):
            gain = multiplexed - hashed
            claims.append(at_least(f"budget {share:g}: test AUC of {_MULTIPLEXED} over {_BASELINE}", gain, 0.0))
        tested = {row["method"] for row in _of(rows, share)}
        best = max(_mean(_of(rows, share, method), "auc") for method in tested)
        regret = best - choice["auc"]
        claims.append(at_most(f"budget {share:g}: test AUC of the best over {choice['method']}", regret, _REGRET))
    return claims


def draw(rows: Sequence[dict[str, Any]], name: str, full: int, path: Path) -> None:
    """Mean test AUC against bytes: a panel for each family, the best of all methods behind every one."""
    points: dict[str, list[tuple[float, float]]] = {}
    for share, method in dict.fromkeys((row["budget"], row["method"]) for row in rows if "auc" in row):
        own = _of(rows, share, method)
        points.setdefault(method, []).append((_mean(own, "bytes") / full, _mean(own, "auc")))
    front: list[tuple[float, float]] = []
    # Sizes within a hundredth are one budget, met as well as whole knobs allow: its best method stands for it.
    for share, auc in sorted(point for own in points.values() for point in own):
        if front and share <= 1.01 * front[-1][0]:
            front[-1] = (front[-1][0], max(auc, front[-1][1]))
        elif not front or auc > front[-1][1]:
            front.append((share, auc))
    shown = [auc for own in points.values() for _, auc in own]
    margin = 0.05 * (max(shown) - min(shown)) + 1e-3
    limits = (min(shown) - margin, max(shown) + margin)
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, (family, methods) in zip(panels, FAMILIES.items(), strict=True):
        axes.plot(*zip(*front, strict=True), color="#c8c8c8", linewidth=6, solid_capstyle="round", zorder=1)
        axes.set_title(family, loc="left", fontweight="bold")
        axes.set(xscale="log", ylim=limits)
        axes.set_xticks(sorted({row["budget"] for row in rows if row["method"] != _REFERENCE}), minor=False)
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _panel(axes, {entry.name: sorted(set(points[entry.name])) for entry in methods if entry.name in points})
    figure.suptitle(
        f"Embedding methods on {name}: test AUC for bytes; grey is the best of all methods", x=0.01, ha="left"
    )
    figure.supxlabel("bytes stored, as a share of the collisionless table's weights", fontsize=11)
    figure.supylabel("test AUC", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    """Draws lines, each named beside its right end; names that would touch move apart."""
    ends = {name: own[-1] for name, own in lines.items()}
    order = sorted(lines, key=lambda name: ends[name][1])
    low, high = axes.get_ylim()
    heights = _apart([(ends[name][1] - low) / (high - low) for name in order], _LABEL_GAP)
    for number, (name, height) in enumerate(zip(order, heights, strict=True)):
        colour = f"C{number}"
        shares, values = zip(*lines[name], strict=True)
        axes.plot(shares, values, color=colour, marker="o", markersize=5, linewidth=1.6)
        axes.annotate(
            f"{name}  {ends[name][1]:.3f}",
            ends[name],
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "alpha": 0.4,
                "linewidth": 0.8,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved until neighbours are at least `gap` apart, and all are below 1 if they fit."""
    up = list(heights)
    for number in range(1, len(up)):
        up[number] = max(up[number], up[number - 1] + gap)
    ceiling = 1.0
    for number in reversed(range(len(up))):
        up[number] = min(up[number], ceiling)
        ceiling = up[number] - gap
    return up
