"""Tunes a head on frozen vectors: a linear or low-rank function, near the identity, that brings alike rows together.

A fit has two phases. The first learns from nine tenths of the items, once for each temperature, and stops at the round
after which the tenth that it never read is found best. The second learns from all items with the best temperature for
as many rounds. A fit that is stopped after any round goes on from its checkpoint to the same bits. Houlsby et al.,
"Parameter-Efficient Transfer Learning" (2019); on frozen vectors: "Search-Adaptor" (2023).

Shape letters: R rows of a task, D dim, B pairs of a batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from features.content.step import VectorStep
from features.durable import write_file
from features.errors import TesseraError
from features.threads import one_thread
from models.encoder.losses import PairBatch, contrastive, cuts
from models.encoder.pairs import Task
from models.encoder.tuning.head import TunedHead
from models.encoder.tuning.options import TuneOptions
from models.encoder.tuning.rows import HeldOut, TrainingRows, held_out_rows

# Visits of each row in a round.
_VISITS = 4


@dataclass(frozen=True)
class Tuned:
    """Result of a fit.

    Attributes:
        steps: The head; empty if no round was better than no head.
        recalls: Recall of the held-out items before the fit and after each round of the first phase with the chosen
            temperature, the mean over the tasks.
        rounds: Rounds of the head that was chosen; 0 is no head.
        temperature: Temperature that was chosen.
    """

    steps: tuple[VectorStep, ...]
    recalls: tuple[float, ...]
    rounds: int
    temperature: float


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


class _Fit:
    """State of a fit: recalls of each temperature so far, phase, round, head, and Adam's moments."""

    def __init__(self, tasks: Sequence[Task], options: TuneOptions) -> None:
        widths = {task.vectors.shape[1] for task in tasks}
        if len(widths) != 1:
            raise TesseraError(f"tasks of one width expected, got widths {', '.join(map(str, sorted(widths)))}")
        for task in tasks:
            if not task.pairs:
                raise TesseraError(f"pairs {task.name}: none was found; use another source of pairs")
        self._tasks, self._options, self._dim = tasks, options, widths.pop()
        self._wanted = [HeldOut(task, held_out_rows(task, options.seed)) for task in tasks]
        self.key = _key(tasks, options)
        self.trials = [[self._recall(None)]]
        self._start(refit=False)

    def _start(self, *, refit: bool) -> None:
        """Begins a phase with a new head."""
        self.refit, self.round = refit, 0
        self._rows = [
            TrainingRows(task, np.ones(len(task.item), bool) if refit else ~held_out_rows(task, self._options.seed))
            for task in self._tasks
        ]
        self._head = TunedHead(self._dim, self._options)
        self._adam = torch.optim.Adam(self._head.parameters(), lr=self._options.rate)

    @property
    def _trial(self) -> int:
        """Number of the temperature of this phase: that of the best trial in the second phase."""
        if not self.refit:
            return len(self.trials) - 1
        return int(np.argmax([max(recalls) for recalls in self.trials]))

    @property
    def recalls(self) -> list[float]:
        """Recalls of the temperature of this phase."""
        return self.trials[self._trial]

    @property
    def chosen(self) -> int:
        """Round after which most held-out items were found with the temperature of this phase."""
        return int(np.argmax(self.recalls))

    @property
    def finished(self) -> bool:
        return self.refit and self.round >= self.chosen

    @property
    def done(self) -> int:
        return sum(len(recalls) - 1 for recalls in self.trials) + (self.round if self.refit else 0)

    @property
    def total(self) -> int:
        """Most rounds of both phases, as far as is known."""
        if self.refit:
            return self.done - self.round + self.chosen
        return self.done - self.round + self._options.rounds * (2 + len(self._options.temperatures) - len(self.trials))

    def advance(self) -> None:
        """Does one round, and ends a trial or the first phase."""
        self._learn()
        if self.refit:
            return
        self.recalls.append(self._recall(self._head))
        if self.round < min(self._options.rounds, self.chosen + self._options.patience):
            return
        refit = len(self.trials) == len(self._options.temperatures)
        if not refit:
            self.trials.append(self.trials[0][:1])
        self._start(refit=refit)

    def _learn(self) -> None:
        options = self._options
        loss_options = replace(options.loss, temperature=options.temperatures[self._trial])
        rng = np.random.default_rng([options.seed, 6, int(self.refit), self.round])
        batches = [
            (rows, pair) for rows in self._rows for _ in range(_VISITS) for pair in rows.batches(rng, options.batch)
        ]
        for place in rng.permutation(len(batches)):
            rows, (first, second) = batches[place]
            vectors = self._head(rows.vectors[first]), self._head(rows.vectors[second])
            batch, share = PairBatch(*vectors, *rows.known(first, second)), self.round / options.rounds
            loss = torch.stack([contrastive(one, loss_options, share) for one in cuts(batch, options.prefixes)]).mean()
            if options.pull:
                loss = loss + options.pull * self._head.distance()
            self._adam.zero_grad()
            loss.backward()
            self._adam.step()
        self.round += 1

    def _recall(self, head: TunedHead | None) -> float:
        """Mean over the tasks of the recall of held-out rows."""
        found = []
        for task, wanted in zip(self._tasks, self._wanted, strict=True):
            vectors = torch.tensor(task.vectors)
            with torch.no_grad():
                found.append(wanted.recall((vectors if head is None else head(vectors)).numpy()))
        return float(np.mean(found))

    def tuned(self) -> Tuned:
        steps = (self._head.step(),) if self.chosen else ()
        return Tuned(steps, tuple(self.recalls), self.chosen, self._options.temperatures[self._trial])

    def state(self) -> bytes:
        moments = self._adam.state_dict()["state"]
        tensors = {f"weight-{n}": weight.detach().numpy() for n, weight in enumerate(self._head.weights)}
        for number, own in moments.items():
            tensors |= {f"{name}-{number}": own[name].numpy() for name in ("exp_avg", "exp_avg_sq", "step")}
        names = ("key", "trials", "refit", "round")
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
        self.trials = described["trials"]
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


def _key(tasks: Sequence[Task], options: TuneOptions) -> str:
    digest = hashlib.sha256(msgspec.json.encode(asdict(options)))
    for task in tasks:
        for array in (task.vectors, task.item, task.alike.indptr, task.alike.indices, task.alike.data):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
