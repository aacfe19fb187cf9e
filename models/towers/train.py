"""Trains the two towers on a frame: seeded, early-stopped on the users' next items in the validation part.

The rows of the towers' range are trained by Adam beside the network and are written into the unified table afterwards,
before the ranker is trained. All states of a window are trained at once. The towers that are kept have a moving mean of
the weights after each epoch (Polyak and Juditsky, SIAM J. Control 1992), and validation judges that mean.

Shape letters: U users, N items, B windows, L visits, T targets, W width, D dim.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.errors import DatasetError, TrainingError
from features.frame import Frame
from features.threads import fixed_threads
from models.ranker import checkpoint
from models.ranker.checkpoint import Position
from models.table.admission import Admission, Sketch
from models.table.batch import Entities
from models.table.reference import start_rows
from models.table.schema import Schema
from models.towers.config import TowerConfig
from models.towers.inputs import tower_inputs
from models.towers.loss import Candidates, drawn_candidates, softmax_loss
from models.towers.mixture import chosen_weight
from models.towers.network import gap_buckets
from models.towers.sequences import TRAIN, VALIDATION, Sequences, VisitWindow, sequences_of
from models.towers.towers import Towers, empty_network
from models.towers.validation import next_item_ranks, rank_gain, visits_of

_VALIDATION_USERS = 4_096


@dataclass(frozen=True)
class TrainedTowers:
    """Result of a training.

    Attributes:
        towers: Towers as of the best epoch, see `TowerConfig.averaging`; their range starts at row 0.
        rows: (R, D) float32 rows of their range.
        gains: Validation gain after each epoch, see `rank_gain`.
    """

    towers: Towers
    rows: NDArray[np.float32]
    gains: tuple[float, ...]


def train_towers(
    schema: Schema,
    frame: Frame,
    config: TowerConfig,
    *,
    seed: int = 0,
    threads: int = 1,
    lag: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    halfway: Path | None = None,
) -> TrainedTowers:
    """Trains on the positives of the train part. Keeps the epoch that places validation's next items highest.

    Args:
        schema: See `tower_schema`.
        frame: Frame of the events; its test part is not read.
        config: Shape and training.
        seed: Seed of everything random.
        threads: Threads of torch; their number affects the bits.
        lag: Time until a label is known. Validation sees the visits that are known; training sees all earlier ones.
        progress: Called with (windows done, most windows in all epochs).
        halfway: File of checkpoints, one after each epoch. An existing one of the same training is continued, to the
            bits of a training that was not interrupted.

    Raises:
        DatasetError: No user has two positive events in the train part.
        TrainingError: The loss is no longer a number.
    """
    with fixed_threads(threads), torch.random.fork_rng(devices=[]):
        run = _TowerTraining(schema, frame, config, seed, lag)
        if halfway is not None:
            run.go_on(halfway)
        run.run(progress, halfway)
        return run.result()


class _TowerTraining:
    """State of a training and the loop that advances it."""

    def __init__(self, schema: Schema, frame: Frame, config: TowerConfig, seed: int, lag: int) -> None:
        self._schema, self._config, self._seed, self._lag = schema, config, seed, lag
        self._frame, self._items, self._users = frame, frame.items, frame.users
        self._sequences = sequences_of(frame)
        self._windows = self._sequences.windows(schema.history_length)
        if not len(self._windows):
            raise DatasetError(
                "frame: no user has two positive events in the train part, so nothing tells what comes next; give more "
                'events, or set retrieval to "off"'
            )
        self._sketch, self._known, self._share = sighted_values(schema, frame, self._sequences)
        admission = Admission(self._sketch, schema.admission)
        self._item_inputs = tower_inputs(schema, "item", self._items, admission, start=0)
        self._user_inputs = tower_inputs(schema, "user", self._users, admission, start=0)
        self._network = empty_network(schema, config, seed=seed)
        self._table = torch.nn.Parameter(torch.empty(schema.rows, schema.dim))
        start_rows(self._table.detach(), torch.Generator().manual_seed(seed))
        self._sampled = len(self._known) > config.negatives
        self._optimizers = self._new_optimizers()
        self._asked = self._sequences.first_of(VALIDATION, lag=lag)
        if len(self._asked) > _VALIDATION_USERS:
            chosen = np.random.default_rng(seed).choice(len(self._asked), _VALIDATION_USERS, replace=False)
            self._asked = self._asked[np.sort(chosen)]
        self._gains: tuple[float, ...] = ()
        self._mean: dict[str, Tensor] | None = None
        self._best: dict[str, Tensor] | None = None
        decided_by = (schema.to_json(), asdict(config), seed, lag, len(self._sequences.items), len(self._windows))
        self._key = sha256(msgspec.json.encode(decided_by)).hexdigest()

    def _new_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        rate, dense = self._config.rate, list(self._network.parameters())
        if not self._sampled:
            return {"all": torch.optim.Adam([*dense, self._table], lr=rate, betas=(0.9, 0.98), fused=True)}
        # A step reads few rows of a large catalogue, and must not touch the others.
        return {
            "network": torch.optim.Adam(dense, lr=rate, betas=(0.9, 0.98), fused=True),
            "rows": torch.optim.SparseAdam([self._table], lr=rate, betas=(0.9, 0.98)),
        }

    def go_on(self, path: Path) -> None:
        """Restores the checkpoint at `path`, if it belongs to this training."""
        found = checkpoint.load(path, self._key)
        if found is None:
            return
        position, tensors = found
        self._gains = position.losses
        self._restore(_under(tensors, "now."))
        self._mean, self._best = (_under(tensors, name) or None for name in ("mean.", "best."))
        for name, optimizer in self._optimizers.items():
            checkpoint.restore_optimizer(optimizer, _under(tensors, f"optimizer.{name}."))

    def run(self, progress: Callable[[int, int], None], halfway: Path | None) -> None:
        """Trains to the end and takes the weights of the best epoch, or of the last one where nothing is validated."""
        config, count = self._config, len(self._windows)
        while len(self._gains) < config.max_epochs and not self._stopped():
            epoch = len(self._gains)
            torch.manual_seed(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0].item())
            rng = np.random.default_rng([self._seed, epoch])
            order = rng.permutation(count)
            self._network.train()
            for start in range(0, count, config.batch):
                self._step(self._windows[order[start : start + config.batch]], rng)
                progress(epoch * count + min(start + config.batch, count), config.max_epochs * count)
            self._finish_epoch()
            if halfway is not None:
                self._save(halfway)
        kept = self._best or self._mean
        if kept is not None:
            self._restore(kept)
        progress(1, 1)

    def result(self) -> TrainedTowers:
        """Returns the towers as they are, with the weight of content beside them."""
        now = self._snapshot()
        towers, rows = self._towers(now), now["rows"].numpy()
        if self._config.content_weight is None:
            weight = chosen_weight(self._frame, towers, rows.__getitem__, self._sequences, self._asked)
            towers = self._towers(now, replace(self._config, content_weight=weight))
        return TrainedTowers(towers, rows, self._gains)

    def _stopped(self) -> bool:
        best = int(np.argmax(self._gains)) if self._gains else 0
        return bool(len(self._asked)) and len(self._gains) - best > self._config.patience

    def _step(self, windows: NDArray[np.int64], rng: np.random.Generator) -> None:
        window = self._sequences.read(windows, self._schema.history_length)
        rows, slots = train_targets(window, self._config.targets, rng)
        targets = window.items[rows, slots + 1]
        candidates = self._candidates(window, targets, rng)
        needed, where = self._needed(window, candidates)
        table = self._table
        inputs = self._item_inputs if len(needed) == self._item_inputs.size else self._item_inputs.take(needed)
        vectors = self._network.items(inputs.parts(table, sparse=self._sampled))
        held = np.arange(window.items.shape[1] - 1) < window.lengths[:, None]
        visited = vectors[torch.from_numpy(where[window.items[:, :-1]])] * torch.from_numpy(held).unsqueeze(2)
        gaps = gap_buckets(torch.from_numpy(np.diff(window.times, axis=1)))
        states = self._network.states(visited, gaps, torch.from_numpy(window.lengths))
        own = self._user_inputs.take(window.users).parts(table, sparse=self._sampled)
        users = self._network.users_of(states[torch.from_numpy(rows), torch.from_numpy(slots)], own, rows)
        chosen = vectors[torch.from_numpy(where[candidates.items])]
        loss = softmax_loss(users * self._network.scale.exp(), chosen, targets, rows, candidates)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"retrieve: the loss is {loss.item()} after {len(self._gains)} epochs; lower towers.rate = "
                f"{self._config.rate}"
            )
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self._optimizers.values():
            optimizer.step()

    def _candidates(self, window: VisitWindow, targets: NDArray[np.int64], rng: np.random.Generator) -> Candidates:
        if not self._sampled:
            return Candidates(self._known, np.zeros(len(self._known), dtype=np.float32))
        visited = np.where(window.parts >= 0, window.items, -1)
        return drawn_candidates(targets, visited, self._known, self._share, self._config.negatives, rng)

    def _needed(self, window: VisitWindow, candidates: Candidates) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the items (M,) whose vectors a step needs, and the place of each item number among them."""
        size = self._item_inputs.size
        if not self._sampled:
            return np.arange(size), np.arange(size)
        needed = np.unique(np.concatenate([window.items.reshape(-1), candidates.items]))
        where = np.zeros(size, dtype=np.int64)
        where[needed] = np.arange(len(needed))
        return needed, where

    def _finish_epoch(self) -> None:
        now, old = self._snapshot(), self._mean
        # Until an epoch's share is reached, all epochs count alike, so that the first one does not outweigh them.
        share = max(1 - self._config.averaging, 1 / (len(self._gains) + 1))
        self._mean = now if old is None else {name: old[name].lerp(own, share) for name, own in now.items()}
        gain = self._gain_of(self._mean)
        if len(self._asked) and (not self._gains or gain > max(self._gains)):
            self._best = {name: own.clone() for name, own in self._mean.items()}
        self._gains = (*self._gains, gain)

    def _gain_of(self, weights: dict[str, Tensor]) -> float:
        """Returns the validation gain of weights; 0 where no user is asked."""
        asked = self._asked
        if not len(asked):
            return 0.0
        towers, read_rows = self._towers(weights), weights["rows"].numpy().__getitem__
        vectors = towers.item_vectors(read_rows, self._items)
        visits = visits_of(self._sequences, asked, vectors, towers.length)
        users = towers.user_vectors(read_rows, self._users[self._sequences_users(asked)], visits)
        return rank_gain(next_item_ranks(self._sequences, asked, users, vectors, self._known))

    def _sequences_users(self, asked: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._sequences.offsets, asked[:, 0], side="right") - 1

    def _towers(self, weights: dict[str, Tensor], config: TowerConfig | None = None) -> Towers:
        network = empty_network(self._schema, self._config)
        network.load_state_dict(_under(weights, "network."))
        return Towers(self._schema, config or self._config, network, self._sketch, start=0)

    def _snapshot(self) -> dict[str, Tensor]:
        network = {f"network.{name}": own.detach().clone() for name, own in self._network.state_dict().items()}
        return network | {"rows": self._table.detach().clone()}

    @torch.no_grad()
    def _restore(self, state: dict[str, Tensor]) -> None:
        self._network.load_state_dict(_under(state, "network."))
        self._table.copy_(state["rows"])

    def _save(self, path: Path) -> None:
        tensors = {f"now.{name}": own for name, own in self._snapshot().items()}
        for name, weights in (("mean", self._mean), ("best", self._best)):
            tensors |= {f"{name}.{field}": own for field, own in (weights or {}).items()}
        for name, optimizer in self._optimizers.items():
            state = checkpoint.optimizer_tensors(optimizer)
            tensors |= {f"optimizer.{name}.{field}": own for field, own in state.items()}
        checkpoint.save(path, Position(self._key, len(self._gains), 0, self._gains), tensors)


def train_targets(
    window: VisitWindow, most: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns windows (T,) and slots (T,) of the states to train, those before an event of the train part.

    Args:
        window: B windows.
        most: Largest T; of more, `rng` draws as many.
        rng: Generator of the draws.
    """
    rows, slots = np.nonzero(window.parts[:, 1:] == TRAIN)
    if len(rows) > most:
        kept = np.sort(rng.choice(len(rows), most, replace=False))
        rows, slots = rows[kept], slots[kept]
    return rows, slots


def sighted_values(
    schema: Schema, frame: Frame, sequences: Sequences
) -> tuple[Sketch, NDArray[np.int64], NDArray[np.float64]]:
    """Counts the values of the users and items of the train part's positives.

    Returns:
        Sketch of the sightings, items with one at least (N,) ascending, and the share of each item number.
    """
    train = sequences.parts == TRAIN
    everything = Admission.off()
    sources = {
        "item": (frame.items, sequences.items[train]),
        "user": (frame.users, sequences.users[train]),
    }
    keys, counts = [], []
    for of, (table, index) in sources.items():
        entities = Entities(schema, of, table, everything)  # type: ignore[arg-type]
        for column in schema.columns(of):  # type: ignore[arg-type]
            own, times = entities.sightings(column, index)
            keys.append(own)
            counts.append(times)
    sketch = Sketch.sized(sum(len(own) for own in keys))
    for own, times in zip(keys, counts, strict=True):
        sketch.add(own, times)
    each = np.bincount(sequences.items[train], minlength=frame.items.height)
    return sketch, np.flatnonzero(each), each / max(1, each.sum())


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
