"""`multiplexing`: hashing per feature and the unified table at equal lookups, and the collisionless table.

The protocol of Table 1 of Coleman et al. (NeurIPS 2023): DCN-V2 over the single-valued categorical columns, a random
split, budgets of 1, 0.5 and 0.1 of the collisionless table. The paper's width of 30 is no multiple of 4, which
fbgemm needs: 32. All layouts are trained alike, on TorchRec's fused table by row-wise Adagrad. A budget counts the
bytes that training keeps, one accumulator a row included, so more lookups of narrower rows get fewer rows.

Sharing and lookups are two factors: each layout has one, two and four lookups, and a gain compares equal lookups.
A search in seed 0 alone varies what might decide whether sharing wins: smaller budgets, other widths, per-feature
parts of equal size, and a field of noise with ten times the values of all others together.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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

from features.dataset.descriptor import Dataset
from features.threads import one_thread
from models.compressed.fields import Fields, Part, with_noise
from models.compressed.layout import Layout, rows_of
from models.ranker.evaluate import quality
from models.ranker.network import Network, NetworkConfig
from models.table.batch import Batch
from models.table.open import open_table
from models.table.schema import Feature, Schema
from tessera.bench.harness.data import dataset_fields, progress_bar, remembered
from tessera.bench.harness.result import BenchResult, Claim, at_least

BUDGETS = (1.0, 0.5, 0.1)
LOOKUPS = (1, 2, 4)
WIDTH = 32
# The paper's gains of one lookup over hashing per feature with one lookup, in points of AUC.
_GAINS = {1.0: 2.3, 0.5: 3.0, 0.1: 3.5}
_COLLISIONLESS: Layout = "collisionless"
_HASHING: Layout = "hashing per feature"
_EQUAL: Layout = "hashing in equal parts"
_UNIFIED: Layout = "unified"
_SMALL_BUDGETS = (0.03, 0.01)
_WIDTHS = (16, 64)
_NOISE = 10
# A mean of seeds below this many points of AUC is a tie: one seed moves further than that.
_TIE = 0.1
_SCORE_ROWS = 8_192


@dataclass(frozen=True)
class MultiplexingArm:
    """One way to spend a budget.

    Attributes:
        layout: Layout of the rows that values read.
        budget: Share of the bytes of the collisionless table of the same width, accumulators included.
        lookups: of each value, `width / lookups` floats each.
        width: floats that a field gives to the network.
        noise: True if the fields have the field of noise.
    """

    layout: Layout
    budget: float
    lookups: int = 1
    width: int = WIDTH
    noise: bool = False

    @property
    def dim(self) -> int:
        """Floats of a row."""
        return self.width // self.lookups

    def rows(self, values: int) -> int:
        """Rows that the budget buys for so many values."""
        return int(self.budget * values * (self.width + 1) / (self.dim + 1))

    def size_bytes(self, values: int) -> int:
        """Bytes of the table: float32 rows and one float32 accumulator a row."""
        return 4 * self.rows(values) * (self.dim + 1)


GRID = (
    MultiplexingArm(_COLLISIONLESS, 1.0),
    *(MultiplexingArm(layout, budget, n) for budget, layout, n in product(BUDGETS, (_HASHING, _UNIFIED), LOOKUPS)),
)
SEARCH = (
    *(
        MultiplexingArm(layout, budget, n)
        for budget, layout, n in product(_SMALL_BUDGETS, (_HASHING, _UNIFIED), LOOKUPS)
    ),
    *(MultiplexingArm(_EQUAL, budget, n) for budget, n in product((0.1, 0.01), LOOKUPS)),
    *(MultiplexingArm(layout, 0.1, n, width) for width, layout, n in product(_WIDTHS, (_HASHING, _UNIFIED), (1, 4))),
    *(MultiplexingArm(layout, 0.1, n, noise=True) for layout, n in product((_HASHING, _EQUAL, _UNIFIED), LOOKUPS)),
)


@dataclass(frozen=True)
class Protocol:
    """Training protocol of every arm."""

    batch: int = 512
    max_epochs: int = 15
    patience: int = 2
    table_rate: float = 0.05
    network_rate: float = 1e-3
    network: NetworkConfig = field(default_factory=lambda: NetworkConfig(1, 64, (192,)))


@dataclass(frozen=True)
class ArmResult:
    """Test quality at the epoch with the lowest validation log loss."""

    auc: float
    log_loss: float
    epochs: int


def multiplexing(
    dataset: Dataset, out: Path, *, seeds: int, console: Console, protocol: Protocol = Protocol()
) -> BenchResult:
    """Trains the grid in every seed and the search in seed 0; finished arms are kept in `out`.

    Args:
        dataset: Dataset with at least one single-valued categorical column.
        seeds: Number of seeds, from 0; each decides split, hash, start and order.
    """
    results: dict[MultiplexingArm, list[ArmResult]] = {arm: [] for arm in (*GRID, *SEARCH)}
    sizes: dict[bool, int] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("multiplexing", total=len(GRID) * seeds + len(SEARCH))
        for seed in range(seeds):
            own = dataset_fields(dataset, seed=seed)
            both = {False: own, True: with_noise(own, _NOISE * own.values, seed=seed)}
            sizes = {noise: one.values for noise, one in both.items()}
            for arm in (*GRID, *SEARCH) if seed == 0 else GRID:
                fields = both[arm.noise]
                name = f"{arm.layout}-{arm.budget}-{arm.lookups}-{arm.width}{'-noise' * arm.noise}-{seed}"
                decided_by = (asdict(arm), asdict(protocol), seed, fields.key)
                work = partial(_measured, fields, arm, protocol, seed=seed)
                data = remembered(out / f"{name.replace(' ', '-')}.json", __name__, decided_by, work)
                results[arm].append(msgspec.convert(data, ArmResult))
                progress.advance(task)
    rows = [row(arm, results, sizes[arm.noise]) for arm in results]
    plot = out / f"multiplexing-{dataset.name}.png"
    draw(rows, dataset.name, plot)
    return BenchResult("multiplexing", dataset.name, seeds, rows, claims(results), str(plot))


def row(arm: MultiplexingArm, results: dict[MultiplexingArm, list[ArmResult]], values: int) -> dict[str, Any]:
    """Mean and deviation of one arm, and Welch's test against hashing per feature at equal bytes, width and lookups."""
    peer = replace(arm, layout=_HASHING)
    aucs = _aucs(results[arm])
    base = _aucs(results[peer]) if peer in results and arm.layout != _COLLISIONLESS else None
    compared = base is not None and arm != peer
    test = stats.ttest_ind(aucs, base, equal_var=False) if compared and len(aucs) > 1 else None
    return {
        "layout": arm.layout + ", noise" * arm.noise,
        "budget": arm.budget,
        "lookups": arm.lookups,
        "width": arm.width,
        "table_mb": arm.size_bytes(values) / 1e6,
        "seeds": len(aucs),
        "test_auc": float(aucs.mean()),
        "std": float(aucs.std(ddof=1)) if len(aucs) > 1 else None,
        "log_loss": float(np.mean([result.log_loss for result in results[arm]])),
        "gain_points": 100 * float(aucs.mean() - base.mean()) if compared and base is not None else None,
        "welch_p": None if test is None else float(test.pvalue),
        "each_seed": aucs.tolist(),
    }


def _aucs(outcomes: Sequence[ArmResult]) -> NDArray[np.float64]:
    return np.array([outcome.auc for outcome in outcomes])


def draw(rows: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Mean test AUC against the budget, a line for each layout and number of lookups, bars of one deviation."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    top = next(row for row in rows if row["layout"] == _COLLISIONLESS)
    spread = top["std"] or 0.0
    axes.axhspan(top["test_auc"] - spread, top["test_auc"] + spread, color="#dddddd")
    axes.text(max(BUDGETS), top["test_auc"] + spread, "collisionless", va="bottom", color="#555555")
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for measured in rows:
        if measured["layout"] in (_HASHING, _UNIFIED) and measured["width"] == WIDTH:
            lines.setdefault((measured["layout"], measured["lookups"]), []).append(measured)
    shown: set[float] = set()
    for (layout, lookups), own in lines.items():
        points = sorted((measured["budget"], measured["test_auc"], measured["std"] or 0.0) for measured in own)
        shares, aucs, spreads = zip(*points, strict=True)
        shown |= set(shares)
        axes.errorbar(
            shares, aucs, yerr=spreads, marker="o", capsize=3, color=f"C{LOOKUPS.index(lookups)}",
            linestyle="-" if layout == _UNIFIED else "--", label=f"{layout}, {lookups} lookup{'s' * (lookups > 1)}",
        )  # fmt: skip
    axes.set(xscale="log", xlabel="share of the collisionless table's bytes, accumulators included", ylabel="test AUC")
    axes.set_title(f"Layouts of one table on {name}", loc="left", fontweight="bold")
    axes.set_xticks(sorted(shown), [f"{share:g}" for share in sorted(shown)])
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def claims(results: dict[MultiplexingArm, list[ArmResult]]) -> list[Claim]:
    """Returns the paper's order and gain at one lookup, and that sharing costs nothing at equal lookups."""
    judged: list[Claim] = []
    top = _aucs(results[MultiplexingArm(_COLLISIONLESS, 1.0)])
    for budget in BUDGETS:
        name = f"budget {budget:g}"
        hashing, unified = (_aucs(results[MultiplexingArm(layout, budget)]) for layout in (_HASHING, _UNIFIED))
        margin = float(np.minimum(unified - hashing, top - unified).min())
        order = f"{name}, one lookup: hashing per feature < unified < collisionless in every seed (smallest margin)"
        judged.append(Claim(order, margin, 0.0, margin > 0))
        for lookups in LOOKUPS:
            ours, theirs = (_aucs(results[MultiplexingArm(layout, budget, lookups)]) for layout in (_UNIFIED, _HASHING))
            claim = (
                f"{name}, {lookups} lookup{'s' * (lookups > 1)} each: unified less hashing per feature, points of AUC"
            )
            target = _GAINS[budget] if lookups == 1 else -_TIE
            judged.append(at_least(claim, 100 * float((ours - theirs).mean()), target))
    return judged


def _measured(fields: Fields, arm: MultiplexingArm, protocol: Protocol, *, seed: int) -> dict[str, Any]:
    return asdict(fit(fields, arm, protocol, seed=seed))


@one_thread()
def fit(fields: Fields, arm: MultiplexingArm, protocol: Protocol, *, seed: int) -> ArmResult:
    """Trains one arm until its validation log loss has not fallen for `patience` epochs."""
    run = _Arm(fields, arm, protocol, seed)
    best: tuple[float, ArmResult] | None = None
    for epoch in range(protocol.max_epochs):
        if best is not None and epoch - best[1].epochs >= protocol.patience:
            break
        run.train_epoch(np.random.default_rng([seed, epoch]))
        loss = quality(fields.parts["validation"].labels, run.score(fields.parts["validation"])).log_loss
        assert loss is not None
        if best is None or loss < best[0]:
            measured = quality(fields.parts["test"].labels, run.score(fields.parts["test"]))
            best = loss, ArmResult(measured.auc or 0.0, measured.log_loss or 0.0, epoch + 1)
    assert best is not None
    return best[1]


class _Arm:
    """Table, network and the values' rows of one arm."""

    def __init__(self, fields: Fields, arm: MultiplexingArm, protocol: Protocol, seed: int) -> None:
        dim, size = arm.dim, arm.rows(fields.values)
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
        logits: Tensor = self._network(self._table(batch), batch.numeric)
        return logits

    def _assemble(self, part: Part, index: NDArray[np.int64]) -> Batch:
        values = self._rows[part.codes[index]].transpose(1, 2, 0).ravel()
        return Batch(
            values=torch.from_numpy(values),
            lengths=torch.ones(len(values), dtype=torch.int64),
            scale=torch.ones(len(index), self._lookups),
            numeric=torch.from_numpy(part.numeric[index]),
            labels=torch.from_numpy(part.labels[index]),
        )
