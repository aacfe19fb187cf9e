"""Tunes a head on frozen vectors: a linear or low-rank function, near the identity, that brings alike rows together.

A fit has two phases. The first learns from nine tenths of the items and stops at the round after which the tenth that
it never read is found best. The second learns from all items for as many rounds. A fit that is stopped after any round
goes on from its checkpoint to the same bits. Houlsby et al., "Parameter-Efficient Transfer Learning" (2019); on frozen
vectors: "Search-Adaptor" (2023).

Shape letters: R rows of a task, D dim, K rank, B pairs of a batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from scipy import sparse
from torch.nn import functional

from features.content.step import Linear, LowRank, VectorStep
from features.durable import write_file
from features.errors import TesseraError
from features.threads import one_thread
from models.encoder.likes import Neighbours
from models.encoder.losses import LossOptions, PairBatch, contrastive
from models.encoder.measure import recall
from models.encoder.pairs import Task

Head = Literal["linear", "low-rank"]
_HELD_OUT = 0.1
_MOST_ASKED = 1_000
_DRAWN_FROM = 20
# Visits of each row in a round.
_VISITS = 4


@dataclass(frozen=True)
class TuneOptions:
    """Choices of a fit.

    Attributes:
        head: `linear` is a matrix (D, D), `low-rank` the identity and a correction of `rank`.
        rank: K.
        pull: Weight of the squared distance from the identity, divided by D; 0 is off.
        loss: Choices of the loss.
        batch: B, at least 2.
        rate: Learning rate of Adam.
        rounds: Most rounds; a round visits each row that has a pair four times.
        patience: Rounds without a better one after which the first phase ends.
        prefixes: Widths at which the first values alone are trained too; none by default. A tuned head then keeps more
            in its prefix than a rotation of it would.
            Kusupati et al., "Matryoshka Representation Learning" (2022).
        seed: Seed of the batches, the held-out items and the first weights.

    Raises:
        TesseraError: A value is out of its range.
    """

    head: Head = "linear"
    rank: int = 32
    pull: float = 0.02
    loss: LossOptions = field(default_factory=LossOptions)
    batch: int = 512
    rate: float = 6e-3
    rounds: int = 40
    patience: int = 5
    prefixes: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.head not in ("linear", "low-rank"):
            raise TesseraError(f"head: expected linear or low-rank, got {self.head!r}")
        for name, least in (("rank", 1), ("batch", 2), ("rounds", 1), ("patience", 1), ("pull", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise TesseraError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if any(width < 1 for width in self.prefixes):
            raise TesseraError(f"prefixes: expected widths of 1 or more, got {', '.join(map(str, self.prefixes))}")


@dataclass(frozen=True)
class Tuned:
    """Result of a fit.

    Attributes:
        steps: The head; empty if no round was better than no head.
        recalls: Recall of the held-out items before the fit and after each round of the first phase, the mean over
            the tasks.
        rounds: Rounds of the head that was chosen; 0 is no head.
    """

    steps: tuple[VectorStep, ...]
    recalls: tuple[float, ...]
    rounds: int


def tune(
    tasks: Sequence[Task],
    options: TuneOptions,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tuned:
    """Fits a head on tasks; each batch is of one task.

    Args:
        tasks: Tasks of one width D.
        options: Choices of the fit.
        checkpoint: File of the state after the last round. A fit of the same tasks and options goes on from it; the
            state of another fit is replaced.
        progress: Called with the number of finished rounds and the most that may follow.

    Raises:
        TesseraError: The tasks have other widths, or no pair.
    """
    with one_thread():
        fit = _Fit(tasks, options)
        if checkpoint is not None:
            fit.restore(checkpoint)
        while not fit.finished:
            fit.advance()
            if checkpoint is not None:
                write_file(checkpoint, fit.state())
            progress(fit.done, fit.total)
        return fit.tuned()


def held_out_recall(vectors: NDArray[np.float32], task: Task, seed: int) -> float:
    """Returns how well vectors (R, D) of a task's rows find the pairs of the items that a first phase holds out."""
    return _Wanted(task, held_out_rows(task, seed)).recall(vectors)


class TrainingRows:
    """Rows of one task that may be in a pair, with the most alike rows of each.

    Args:
        task: The task.
        kept: (R,) True if the row may be in a pair.
    """

    def __init__(self, task: Task, kept: NDArray[np.bool_]) -> None:
        inside = sparse.diags(kept.astype(np.float32))
        self.alike: sparse.csr_matrix = (inside @ task.alike @ inside).tocsr()
        self.alike.eliminate_zeros()
        ranked = most_alike(self.alike, _DRAWN_FROM)
        self.anchors, self._counts = np.unique(ranked.of, return_counts=True)
        self._starts, self._others = np.cumsum(self._counts) - self._counts, ranked.item
        self.vectors, self.item = torch.tensor(task.vectors), task.item

    def batches(self, rng: np.random.Generator, size: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Returns the pairs that visit each anchor once, in batches of `size`; a smaller last batch is left out."""
        order = rng.permutation(len(self.anchors))
        drawn = self._starts[order] + (rng.random(len(order)) * self._counts[order]).astype(np.int64)
        first, second = self.anchors[order], self._others[drawn]
        size = min(size, len(order))
        return [(first[start : start + size], second[start : start + size]) for start in _starts(len(order), size)]

    def known(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the likeness (B, B) of a batch, and whether two rows belong to one item."""
        alike = torch.from_numpy(self.alike[first][:, second].toarray())
        return alike, torch.from_numpy(self.item[first][:, None] == self.item[second][None, :])


def _cuts(batch: PairBatch, prefixes: Sequence[int]) -> list[PairBatch]:
    """Returns the batch, and the batch of each prefix scaled to unit length."""
    return [
        batch,
        *(
            replace(
                batch,
                first=functional.normalize(batch.first[:, :width], dim=1),
                second=functional.normalize(batch.second[:, :width], dim=1),
            )
            for width in prefixes
        ),
    ]


def _starts(length: int, size: int) -> range:
    return range(0, length - size + 1, size) if size else range(0)


def most_alike(alike: sparse.csr_matrix, count: int) -> Neighbours:
    """Returns the `count` most alike rows of each row; of equal likeness, the lower row comes first."""
    found = alike.tocoo()
    order = np.lexsort((found.col, -found.data, found.row))
    row, column, data = found.row[order], found.col[order], found.data[order]
    top = np.arange(len(row)) - np.searchsorted(row, row) < count
    return Neighbours(row[top].astype(np.int64), column[top].astype(np.int64), data[top])


class _Head(torch.nn.Module):
    """Head that starts at the identity."""

    def __init__(self, dim: int, options: TuneOptions) -> None:
        super().__init__()
        self._low_rank = options.head == "low-rank"
        rank = min(options.rank, dim)
        draws = np.random.default_rng([options.seed, 5]).normal(size=(dim, rank)) / np.sqrt(dim)
        first = torch.from_numpy(draws.astype(np.float32)) if self._low_rank else torch.eye(dim)
        self.weights = torch.nn.ParameterList([first] + [torch.zeros(rank, dim)] * self._low_rank)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._low_rank:
            return functional.normalize(vectors + (vectors @ self.weights[0]) @ self.weights[1], dim=1)
        return functional.normalize(vectors @ self.weights[0], dim=1)

    def distance(self) -> torch.Tensor:
        """Squared distance from the identity, divided by D."""
        own = self.weights[0]
        change: torch.Tensor = own @ self.weights[1] if self._low_rank else own - torch.eye(len(own))
        return change.square().sum() / len(own)

    def step(self) -> VectorStep:
        arrays = [weight.detach().numpy() for weight in self.weights]
        return LowRank(left=arrays[0], right=arrays[1]) if self._low_rank else Linear(matrix=arrays[0])


class _Fit:
    """State of a fit: phase, round, head, and Adam's moments."""

    def __init__(self, tasks: Sequence[Task], options: TuneOptions) -> None:
        widths = {task.vectors.shape[1] for task in tasks}
        if len(widths) != 1:
            raise TesseraError(f"tasks of one width expected, got widths {', '.join(map(str, sorted(widths)))}")
        for task in tasks:
            if not task.pairs:
                raise TesseraError(f"pairs {task.name}: none was found; use another source of pairs")
        self._tasks, self._options, self._dim = tasks, options, widths.pop()
        self._wanted = [_Wanted(task, held_out_rows(task, options.seed)) for task in tasks]
        self.key = _key(tasks, options)
        self.recalls = [self._recall(None)]
        self.chosen = 0
        self._start(refit=False)

    def _start(self, *, refit: bool) -> None:
        """Begins a phase with a new head."""
        self.refit, self.round = refit, 0
        self._rows = [
            TrainingRows(task, np.ones(len(task.item), bool) if refit else ~held_out_rows(task, self._options.seed))
            for task in self._tasks
        ]
        self._head = _Head(self._dim, self._options)
        self._adam = torch.optim.Adam(self._head.parameters(), lr=self._options.rate)

    @property
    def finished(self) -> bool:
        return self.refit and self.round >= self.chosen

    @property
    def done(self) -> int:
        return self.round + (len(self.recalls) - 1 if self.refit else 0)

    @property
    def total(self) -> int:
        """Most rounds of both phases, as far as is known."""
        return len(self.recalls) - 1 + self.chosen if self.refit else 2 * self._options.rounds

    def advance(self) -> None:
        """Does one round, or ends the first phase."""
        self._learn()
        if self.refit:
            return
        self.recalls.append(self._recall(self._head))
        if self.recalls[-1] > self.recalls[self.chosen]:
            self.chosen = self.round
        if self.round >= min(self._options.rounds, self.chosen + self._options.patience):
            self._start(refit=True)

    def _learn(self) -> None:
        options = self._options
        rng = np.random.default_rng([options.seed, 6, int(self.refit), self.round])
        batches = [
            (rows, pair) for rows in self._rows for _ in range(_VISITS) for pair in rows.batches(rng, options.batch)
        ]
        for place in rng.permutation(len(batches)):
            rows, (first, second) = batches[place]
            vectors = self._head(rows.vectors[first]), self._head(rows.vectors[second])
            batch, share = PairBatch(*vectors, *rows.known(first, second)), self.round / options.rounds
            loss = torch.stack([contrastive(one, options.loss, share) for one in _cuts(batch, options.prefixes)]).mean()
            if options.pull:
                loss = loss + options.pull * self._head.distance()
            self._adam.zero_grad()
            loss.backward()
            self._adam.step()
        self.round += 1

    def _recall(self, head: _Head | None) -> float:
        """Mean over the tasks of the recall of held-out rows."""
        found = []
        for task, wanted in zip(self._tasks, self._wanted, strict=True):
            vectors = torch.tensor(task.vectors)
            with torch.no_grad():
                found.append(wanted.recall((vectors if head is None else head(vectors)).numpy()))
        return float(np.mean(found))

    def tuned(self) -> Tuned:
        steps = (self._head.step(),) if self.chosen else ()
        return Tuned(steps, tuple(self.recalls), self.chosen)

    def state(self) -> bytes:
        moments = self._adam.state_dict()["state"]
        tensors = {f"weight-{n}": weight.detach().numpy() for n, weight in enumerate(self._head.weights)}
        for number, own in moments.items():
            tensors |= {f"{name}-{number}": own[name].numpy() for name in ("exp_avg", "exp_avg_sq", "step")}
        names = ("key", "recalls", "chosen", "refit", "round")
        described = msgspec.json.encode({name: getattr(self, name) for name in names})
        return bytes(save(tensors | {"state": np.frombuffer(described, dtype=np.uint8)}))

    def restore(self, path: Path) -> None:
        """Continues from a state of the same fit; a missing or damaged state, or that of another fit, is ignored."""
        try:
            tensors = load(path.read_bytes())
            described: dict[str, Any] = msgspec.json.decode(tensors["state"].tobytes())
        except (OSError, SafetensorError, KeyError, msgspec.DecodeError):
            return
        if described["key"] != self.key:
            return
        self.recalls, self.chosen = described["recalls"], described["chosen"]
        self._start(refit=described["refit"])
        self.round = described["round"]
        with torch.no_grad():
            for number, weight in enumerate(self._head.weights):
                weight.copy_(torch.from_numpy(tensors[f"weight-{number}"]))
        if "step-0" in tensors:
            moments = {
                number: {name: torch.tensor(tensors[f"{name}-{number}"]) for name in ("exp_avg", "exp_avg_sq", "step")}
                for number in range(len(self._head.weights))
            }
            self._adam.load_state_dict(self._adam.state_dict() | {"state": moments})


class _Wanted:
    """Held-out rows of a task, and the rows that each shall find."""

    def __init__(self, task: Task, held_out: NDArray[np.bool_]) -> None:
        asked = np.flatnonzero(held_out & (np.diff(task.alike.indptr) > 0))
        asked = asked[:: max(1, len(asked) // _MOST_ASKED)]
        found = most_alike(task.alike[asked], _DRAWN_FROM)
        self._gold = Neighbours(asked[found.of], found.item, found.cosine)
        self._all = np.ones(len(held_out), dtype=bool)

    def recall(self, vectors: NDArray[np.float32]) -> float:
        return recall(vectors, self._gold, self._all)


def held_out_rows(task: Task, seed: int) -> NDArray[np.bool_]:
    """Returns (R,) True for the rows of the items that only the choice of a round reads, the same in every task."""
    items = np.random.default_rng([seed, 7]).random(int(task.item.max(initial=-1)) + 1) < _HELD_OUT
    return items[task.item]


def _key(tasks: Sequence[Task], options: TuneOptions) -> str:
    digest = hashlib.sha256(msgspec.json.encode(asdict(options)))
    for task in tasks:
        for array in (task.vectors, task.item, task.alike.indptr, task.alike.indices, task.alike.data):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
