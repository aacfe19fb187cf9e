"""`multiplexing`: hashing per feature, the unified table and the collisionless one at three budgets.

The protocol of Table 1 of Coleman et al. (NeurIPS 2023): DCN-V2 over the single-valued categorical columns, a random
split, budgets of 1, 0.5 and 0.1 of the collisionless table. The paper's width of 30 is no multiple of 4, which
fbgemm needs: 32. All layouts are trained alike, on TorchRec's fused table by row-wise Adagrad.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from scipy import stats
from torch import Tensor
from torch.nn import functional

from features.dataset import Dataset
from features.determinism import one_thread
from models.evaluate import quality
from models.lookup import Batch
from models.ranker import Network, NetworkConfig
from models.schema import Feature, Schema
from models.table.fields import Fields, Part
from models.table.layout import Layout, rows_of
from models.table.open import open_table
from tessera.bench.data import dataset_fields, progress_bar, remembered
from tessera.bench.result import BenchResult, Claim, at_least

BUDGETS = (1.0, 0.5, 0.1)
WIDTH = 32
_GAINS = {1.0: (2.3, 2.5), 0.5: (3.0, 3.5), 0.1: (3.5, 4.5)}
_HASHING: Layout = "hashing per feature"
_SCORE_ROWS = 8_192


@dataclass(frozen=True)
class Arm:
    """One way to spend a budget: a layout, and lookups of `WIDTH / lookups` each."""

    layout: Layout
    budget: float
    lookups: int = 1


@dataclass(frozen=True)
class Protocol:
    """How every arm is trained."""

    batch: int = 512
    max_epochs: int = 15
    patience: int = 2
    table_rate: float = 0.05
    network_rate: float = 1e-3
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(1, 64, (192,)))


@dataclass(frozen=True)
class Outcome:
    """Test quality at the epoch with the lowest validation log loss."""

    auc: float
    log_loss: float
    epochs: int


def multiplexing(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, protocol: Protocol = Protocol()
) -> BenchResult:
    """Trains every arm in every seed; finished ones are kept in `out`.

    Args:
        dataset: any with at least one single-valued categorical column.
        seeds: how many, from 0; each decides split, hash, start and order.
    """
    arms = [Arm("collisionless", 1.0)]
    arms += [Arm(_HASHING, budget) for budget in BUDGETS]
    arms += [Arm("unified", budget, lookups) for budget, lookups in product(BUDGETS, (1, 2, 4))]
    found: dict[Arm, list[Outcome]] = {arm: [] for arm in arms}
    with progress_bar(console) as progress:
        task = progress.add_task("multiplexing", total=len(arms) * seeds)
        for seed in range(seeds):
            fields = dataset_fields(dataset, seed=seed)
            for arm in arms:
                name = f"{arm.layout}-{arm.budget}-{arm.lookups}-{seed}".replace(" ", "-")
                decided_by = (asdict(arm), asdict(protocol), seed, fields.key)
                work = partial(_measured, fields, arm, protocol, seed=seed)
                data = remembered(out / f"{name}.json", decided_by, work)
                found[arm].append(msgspec.convert(data, Outcome))
                progress.advance(task)
    rows = [row(arm, outcomes, found[Arm(_HASHING, arm.budget)]) for arm, outcomes in found.items()]
    plot = out / f"multiplexing-{dataset.name}.png"
    draw(rows, dataset.name, plot)
    return BenchResult("multiplexing", dataset.name, seeds, rows, claims(found), str(plot))


def row(arm: Arm, outcomes: Sequence[Outcome], hashing: Sequence[Outcome]) -> dict[str, Any]:
    """Mean and deviation of one arm, and Welch's test against hashing per feature at the same budget."""
    aucs, base = np.array([one.auc for one in outcomes]), np.array([one.auc for one in hashing])
    test = stats.ttest_ind(aucs, base, equal_var=False) if len(aucs) > 1 and arm.layout != _HASHING else None
    return {
        "layout": arm.layout,
        "budget": arm.budget,
        "lookups": arm.lookups,
        "test_auc": float(aucs.mean()),
        "std": float(aucs.std(ddof=1)) if len(aucs) > 1 else 0.0,
        "log_loss": float(np.mean([one.log_loss for one in outcomes])),
        "gain_points": 100 * float(aucs.mean() - base.mean()),
        "welch_p": None if test is None else float(test.pvalue),
        "seeds": [one.auc for one in outcomes],
    }


def draw(rows: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Mean test AUC against the budget, a line for each layout and number of lookups, bars of one deviation."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    top = next(row for row in rows if row["layout"] == "collisionless")
    axes.axhspan(top["test_auc"] - top["std"], top["test_auc"] + top["std"], color="#dddddd")
    axes.text(max(BUDGETS), top["test_auc"] + top["std"], "collisionless", va="bottom", color="#555555")
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in rows:
        if one is not top:
            lines.setdefault((one["layout"], one["lookups"]), []).append(one)
    for (layout, lookups), own in lines.items():
        shares, aucs, spread = zip(*((one["budget"], one["test_auc"], one["std"]) for one in own), strict=True)
        many = f", {lookups} lookups" if lookups > 1 else ", one lookup"
        axes.errorbar(shares, aucs, yerr=spread, marker="o", capsize=3, label=layout + many * (layout == "unified"))
    axes.set(xscale="log", xlabel="rows, as a share of the collisionless table's bytes", ylabel="test AUC")
    axes.set_title(f"Layouts of one table on {name}", loc="left", fontweight="bold")
    axes.set_xticks(sorted(BUDGETS), [f"{share:g}" for share in sorted(BUDGETS)])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def claims(found: dict[Arm, list[Outcome]]) -> list[Claim]:
    """The order in every seed, and the mean gains over hashing per feature."""
    judged: list[Claim] = []
    aucs = {arm: np.array([one.auc for one in outcomes]) for arm, outcomes in found.items()}
    top = aucs[Arm("collisionless", 1.0)]
    for budget in BUDGETS:
        hashing = aucs[Arm(_HASHING, budget)]
        unified = {arm.lookups: auc for arm, auc in aucs.items() if (arm.layout, arm.budget) == ("unified", budget)}
        margin = float(np.minimum(unified[1] - hashing, top - unified[1]).min())
        name = f"budget {budget:g}"
        order = f"{name}: hashing per feature < unified < collisionless in every seed (smallest margin)"
        judged.append(Claim(order, margin, 0.0, margin > 0))
        one, best = _GAINS[budget]
        gains = {lookups: 100 * float((auc - hashing).mean()) for lookups, auc in unified.items()}
        judged.append(at_least(f"{name}: gain of one lookup, points of AUC", gains[1], one))
        lookups = max(gains, key=lambda count: gains[count])
        judged.append(at_least(f"{name}: gain of the best, {lookups} lookups, points of AUC", gains[lookups], best))
    return judged


def _measured(fields: Fields, arm: Arm, protocol: Protocol, *, seed: int) -> dict[str, Any]:
    return asdict(fit(fields, arm, protocol, seed=seed))


@one_thread()
def fit(fields: Fields, arm: Arm, protocol: Protocol, *, seed: int) -> Outcome:
    """Trains one arm until its validation log loss has not fallen for `patience` epochs."""
    run = _Arm(fields, arm, protocol, seed)
    best: tuple[float, Outcome] | None = None
    for epoch in range(protocol.max_epochs):
        if best is not None and epoch - best[1].epochs >= protocol.patience:
            break
        run.train_epoch(np.random.default_rng([seed, epoch]))
        loss = quality(fields.parts["validation"].labels, run.score(fields.parts["validation"])).log_loss
        assert loss is not None
        if best is None or loss < best[0]:
            measured = quality(fields.parts["test"].labels, run.score(fields.parts["test"]))
            best = loss, Outcome(measured.auc or 0.0, measured.log_loss or 0.0, epoch + 1)
    assert best is not None
    return best[1]


class _Arm:
    """Table, network and the values' rows of one arm."""

    def __init__(self, fields: Fields, arm: Arm, protocol: Protocol, seed: int) -> None:
        dim = WIDTH // arm.lookups
        size = int(arm.budget * fields.values * arm.lookups)
        names = tuple(Feature(name, "event", name, name, arm.lookups) for name in fields.names)
        self._rows = rows_of(fields, arm.layout, rows=size, chunks=arm.lookups, seed=seed)
        self._lookups = len(fields.names) * arm.lookups
        self._part = fields.parts["train"]
        self._batch = protocol.batch
        schema = Schema(names, (), rows=size, dim=dim, history_length=1)
        self._table = open_table(schema, learning_rate=protocol.table_rate, seed=seed)
        width = self._lookups * dim + self._part.numeric.shape[1]
        self._network = Network(width, protocol.network, seed=seed)
        self._optimizer = torch.optim.Adam(self._network.parameters(), lr=protocol.network_rate, fused=True)

    def train_epoch(self, rng: np.random.Generator) -> None:
        order = rng.permutation(len(self._part.labels))
        for start in range(0, len(order), self._batch):
            batch = self._assemble(self._part, order[start : start + self._batch])
            loss = functional.binary_cross_entropy_with_logits(self._logits(batch), batch.labels)
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            self._table.step()

    @torch.no_grad()
    def score(self, part: Part) -> NDArray[np.float32]:
        """Probabilities (E,) of a part."""
        every = np.arange(len(part.labels))
        cuts = [every[start : start + _SCORE_ROWS] for start in range(0, len(every), _SCORE_ROWS)]
        return np.concatenate([torch.sigmoid(self._logits(self._assemble(part, index))).numpy() for index in cuts])

    def _logits(self, batch: Batch) -> Tensor:
        found: Tensor = self._network(self._table(batch), batch.numeric)
        return found

    def _assemble(self, part: Part, index: NDArray[np.int64]) -> Batch:
        values = self._rows[part.codes[index]].transpose(1, 2, 0).ravel()
        return Batch(
            values=torch.from_numpy(values),
            lengths=torch.ones(len(values), dtype=torch.int64),
            scale=torch.ones(len(index), self._lookups),
            numeric=torch.from_numpy(part.numeric[index]),
            labels=torch.from_numpy(part.labels[index]),
        )
