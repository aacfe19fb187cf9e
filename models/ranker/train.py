"""Trains a ranker on a frame: seeded, early-stopped on validation log loss, the same bits on every run.

Shape letters: E examples, B batch.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from features.dataset.label import TASK
from features.device import CPU, Device, DeviceChoice, named_faults, resolve
from features.errors import DatasetError, TrainingError
from features.frame import Frame
from features.frame_blocks import Blocks
from features.threads import fixed_threads, one_thread
from models.networks.tasks import mean_loss, summed_log_loss
from models.ranker import checkpoint
from models.ranker.checkpoint import Position
from models.ranker.dropout import DropoutConfig, ValueDropout, users_per_value
from models.ranker.loading import LoadedBlocks, ahead, checked_labels, dimensions, sighted
from models.ranker.network import DensePart, NetworkConfig, Ranker
from models.ranker.order import Draw, EpochOrder
from models.ranker.resident_steps import ResidentSteps, StreamedSteps
from models.table.admission import Admission, Sketch
from models.table.batch import Assembler, Batch, Examples
from models.table.device.block import MOST_PADDING, of_examples
from models.table.device.columns import Dimensions
from models.table.device.stream import BlockStream
from models.table.open import open_table
from models.table.placement import placement_cells
from models.table.reference import RowPrecision
from models.table.schema import Schema

TRAIN, VALIDATION = "train", "validation"
SCORE_ROWS = 8_192
"""Most examples that are scored at once."""
Objective = Callable[[Tensor, Batch], Tensor]
"""Mean loss of logits (B,) of a batch."""
Precision = Literal["float32", "bfloat16"]
PrecisionChoice = Literal["float32", "bfloat16", "auto"]
# Share of time `auto` must save to leave float32: less is within the noise of a few steps.
_WORTH_IT = 0.9
_TIMED_STEPS = 3


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a training run.

    Attributes:
        batch: Examples per step.
        max_epochs: Largest number of rounds through the training part.
        patience: Epochs without a lower validation log loss before training stops.
        table_rate: Learning rate of the table's row-wise Adagrad.
        network_rate: Learning rate of the dense part's Adam.
        dropout: Values to hide, so that the network learns to score without new values; only under admission.
        threads: Threads of torch; their number affects the bits.
        precision: Precision of the dense part's products in training; weights, table and loss stay float32. bfloat16
            saves time if the processor multiplies it (AVX-512 BF16, AMX), and takes several times as long if it does
            not. `auto` times a few steps of both on the first batch and uses the faster; the bits then depend on the
            machine.
        network: Shape of the dense part.
        seed: Seed of everything random.
        device: Device of the training: `cpu`, `cuda`, or `auto` for a GPU where torch and fbgemm can use it. A GPU adds
            floats in another order than a processor, so its bits differ; the same card gives the same bits twice.
        row_precision: `float16` halves the table's memory on a GPU, by stochastic rounding.
        processes: Processes that divide the table's rows and the examples. More than one train on processors alone, and
            add floats in another order than one process. The same number gives the same bits twice.
    """

    batch: int = 512
    max_epochs: int = 8
    patience: int = 2
    table_rate: float = 0.1
    network_rate: float = 1e-3
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    threads: int = 1
    precision: PrecisionChoice = "float32"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    seed: int = 0
    device: DeviceChoice = "auto"
    row_precision: RowPrecision = "float32"
    processes: int = 1


@dataclass(frozen=True)
class Trained:
    """Result of a training run.

    Attributes:
        ranker: Ranker as of the best epoch.
        sketch: Sketch of the values' sightings in training.
        epochs: Validation log loss after each epoch.
        precision: Precision of the dense part's products, as chosen by `auto`.
        device: Name of the device, its driver and versions.
    """

    ranker: Ranker
    sketch: Sketch
    epochs: tuple[float, ...]
    precision: Precision = "float32"
    device: Mapping[str, str] = field(default_factory=lambda: CPU.about)


@dataclass(frozen=True)
class Checkpointing:
    """File and interval of checkpoints: written every `seconds` and after each epoch."""

    path: Path
    seconds: float = 60.0


@dataclass(frozen=True)
class Watch:
    """Functions that follow a training. An exception of a function ends the training.

    Attributes:
        step: Called with the loss of each step; on processors alone. None: the losses are not read.
        epoch: Called after each epoch with the validation losses of the epochs so far, before the epoch's checkpoint.
            A training that goes on from a checkpoint repeats no earlier call.
    """

    step: Callable[[float], None] | None = None
    epoch: Callable[[tuple[float, ...]], None] | None = None


def train(
    schema: Schema,
    frame: Frame,
    config: TrainConfig,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    checkpointing: Checkpointing | None = None,
    start: Ranker | None = None,
    objective: Objective | None = None,
    watch: Watch = Watch(),
) -> Trained:
    """Trains on the frame's train part and keeps the epoch with the lowest log loss on its validation part.

    Trains in this process alone, whatever `config.processes` says; see `models.sharded.launch` for several.

    Args:
        progress: Called with (examples done, most examples in all epochs).
        checkpointing: Continues from an existing checkpoint, to the bits of a run that was not interrupted.
        start: Ranker of the same schema to start from instead of a fresh one; it is trained in place.
        objective: Loss to lower on the train part and to compare epochs by. By default the log loss.
        watch: Functions that follow the training.

    Raises:
        DatasetError: A part is empty, or a label is neither 0 nor 1.
        TrainingError: The loss is no longer a number.
        DeviceError: The device is missing, too small or lost.
    """
    config = replace(config, processes=1)
    device = resolve(config.device)
    with fixed_threads(config.threads), named_faults():
        parts = {name: frame.blocks(name) for name in (TRAIN, VALIDATION)}
        tasks = tuple(config.network.tasks)
        positives = {name: positives_of(name, blocks, tasks) for name, blocks in parts.items()}
        source = sighted(schema, frame, parts[TRAIN])
        blocks = LoadedBlocks(source, parts, tasks)
        ranker = on_device(schema, start or new_ranker(schema, config, device), config, device)
        training = TrainingRun(
            blocks,
            ranker,
            config,
            device,
            heights=parts[TRAIN].heights,
            positives=positives[TRAIN],
            objective=objective,
            watch=watch,
        )
        if checkpointing:
            training.go_on(checkpointing.path)
        training.run(progress, checkpointing)
        trained = on_device(schema, training.ranker, config, CPU)
        if schema.placement:
            trained.network.placement.settle(cells_of(schema, parts[TRAIN]))
        return Trained(trained.eval(), source.admission.published, training.losses, training.precision, device.about)


def cells_of(schema: Schema, blocks: Blocks) -> Iterator[NDArray[np.int64]]:
    """Yields the cells of the position path of each block of a part."""
    for block in blocks.frames(*(one.column for one in schema.placement)):
        cells = placement_cells(schema.placement, block)
        assert cells is not None
        yield cells


def positives_of(name: str, blocks: Blocks, tasks: Sequence[str] = ()) -> float:
    """Returns the number of positives of a part, of all tasks together, and checks its labels before training begins.

    Raises:
        DatasetError: The part is empty, a label is neither 0 nor 1, or a task has no label in the part.
    """
    if not blocks.height:
        raise DatasetError(f"frame: the part {name!r} is empty; change the fractions of [split], or by")
    if not tasks:
        return sum(float(checked_labels(block).sum()) for block in blocks.frames("event", "label"))
    positives, known = 0.0, dict.fromkeys(tasks, 0)
    for block in blocks.frames("event", *(f"{TASK}{task}" for task in tasks)):
        for task in tasks:
            labels = checked_labels(block, f"{TASK}{task}")
            known[task] += int(np.isfinite(labels).sum())
            positives += float(np.nansum(labels))
    if missing := [task for task, count in known.items() if not count]:
        raise DatasetError(
            f"frame: no event of the part {name!r} has a label of the task {missing[0]!r}; change its rule under "
            "[events.labels], or the fractions of [split]"
        )
    return positives


class TrainingRun:
    """State of one training run and the loop that advances it.

    Args:
        blocks: Blocks of the training and validation parts.
        ranker: Ranker to train in place, on `device`.
        config: Configuration of the run.
        device: Device of the training.
        heights: Number of examples of each block of the training part.
        positives: Number of positives in the training part.
        objective, watch: As in `train`.
    """

    def __init__(
        self,
        blocks: LoadedBlocks,
        ranker: Ranker,
        config: TrainConfig,
        device: Device,
        *,
        heights: Sequence[int],
        positives: float,
        objective: Objective | None = None,
        watch: Watch = Watch(),
    ) -> None:
        self.ranker = ranker
        self.losses: tuple[float, ...] = ()
        self._objective = objective
        self._watch = watch
        self._blocks = blocks
        self._heights = tuple(heights)
        self._config = config
        self._device = device
        self._optimizer = torch.optim.Adam(
            ranker.network.parameters(), lr=config.network_rate, fused=True, capturable=not device.is_cpu
        )
        # Number of the block whose examples lie on the GPU, and their steps.
        self._held: tuple[int, ResidentSteps | None] | None = None
        # Steps on a GPU of a part of several blocks.
        self._streamed: StreamedSteps | None = None
        self._best: dict[str, Tensor] | None = None
        self._epoch = self._batches = 0
        schema = blocks.source.schema
        self._hidden = ValueDropout(schema, config.dropout, users_per_value(blocks.source))
        several = [self._heights] if len(self._heights) > 1 else []
        own = [self.ranker.network.config.source] if self.ranker.network.config.source else []
        decided_by = (schema.to_json(), asdict(config), sum(self._heights), positives, *several, *own)
        self._key = sha256(msgspec.json.encode(decided_by)).hexdigest()
        self.precision = self._chosen_precision()

    def run(self, progress: Callable[[int, int], None], checkpointing: Checkpointing | None) -> None:
        """Trains to the end and restores the ranker of its best epoch."""
        with self._streaming(checkpointing):
            self._run(progress, checkpointing)

    def _run(self, progress: Callable[[int, int], None], checkpointing: Checkpointing | None) -> None:
        count = sum(self._heights)
        total = self._config.max_epochs * count
        saved = time.monotonic()
        while self._epoch < self._config.max_epochs and not self._stopped():
            for done, advance in self._rest_of_epoch():
                advance()
                self._batches += 1
                progress(self._epoch * count + done, total)
                if checkpointing and self._due(saved, checkpointing.seconds):
                    self._save(checkpointing.path)
                    saved = time.monotonic()
            self._finish_epoch()
            if checkpointing:
                self._save(checkpointing.path)
                saved = time.monotonic()
        if self._best is not None:
            restore(self.ranker, self._best)
        progress(total, total)

    def go_on(self, path: Path) -> None:
        """Restores the checkpoint at `path`, if it belongs to this training run."""
        found = self._read(path, self._key)
        if found is None:
            return
        position, tensors = found
        self._epoch, self._batches, self.losses = position.epoch, position.batches, position.losses
        restore(self.ranker, _under(tensors, "now."))
        self._best = _under(tensors, "best.") or None
        checkpoint.restore_optimizer(self._optimizer, _under(tensors, "optimizer."))

    def _due(self, saved: float, seconds: float) -> bool:
        """Returns True if the last checkpoint, written at `saved` on the monotonic clock, is old enough for another."""
        return time.monotonic() - saved > seconds

    def _write(self, path: Path, position: Position, tensors: dict[str, Tensor]) -> None:
        checkpoint.save(path, position, tensors)

    def _read(self, path: Path, key: str) -> tuple[Position, dict[str, Tensor]] | None:
        return checkpoint.load(path, key)

    def _chosen_precision(self) -> Precision:
        if self._config.precision != "auto":
            return self._config.precision
        source, rows = self._blocks.load(TRAIN, 0)
        first = source.batch(rows.take(np.arange(min(self._config.batch, len(rows)))))
        return faster_precision(self.ranker, first.to(self._device), self._device)

    def _rest_of_epoch(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yields the steps that the epoch still lacks, each with the number of the epoch's examples up to its end."""
        config, epoch = self._config, self._epoch
        order = EpochOrder(self._heights, config.batch, seed=config.seed, epoch=epoch)
        following = dict(pairwise(order.blocks()))

        def make(draw: Draw) -> tuple[int, Callable[[], None]]:
            limits = self._hidden.limits(np.random.default_rng([config.seed, epoch, draw.start]), len(draw.rows))
            if self._streamed is not None:
                self._streamed.ask(draw.block)
                self._streamed.ask(following.get(draw.block, draw.block))
            return draw.start + len(draw.rows), self._made(draw, limits)

        return ahead(make, order.draws(after=self._batches))

    def _made(self, draw: Draw, limits: NDArray[np.uint8] | None) -> Callable[[], None]:
        """Returns the step of a batch, ready to be called by the trainer's thread."""
        if self._streamed is not None:
            return partial(self._streamed_step, self._streamed, draw, limits)
        source, rows = self._blocks.load(TRAIN, draw.block)
        if steps := self._resident(draw.block, source, rows):
            return partial(steps, draw.rows, limits)
        return partial(self._step, source.batch(rows.take(draw.rows), limits=limits).to(self._device))

    def _streamed_step(self, steps: StreamedSteps, draw: Draw, limits: NDArray[np.uint8] | None) -> None:
        if not steps(draw.block, draw.rows, limits):
            source, rows = self._blocks.load(TRAIN, draw.block)
            self._step(source.batch(rows.take(draw.rows), limits=limits).to(self._device))

    @contextmanager
    def _streaming(self, checkpointing: Checkpointing | None) -> Iterator[None]:
        """Lets blocks pass through a GPU inside the block, from files that a stopped training leaves for the next."""
        if self._device.is_cpu or len(self._heights) == 1:
            yield
            return
        source, config = self._blocks.source, self._config
        with TemporaryDirectory() as aside:
            path = Path(aside) if checkpointing is None else checkpointing.path.with_suffix(".blocks") / self._key[:16]
            dimensions = Dimensions(source.schema, source.users, source.items, source.vectors, self._device)
            stream = BlockStream(dimensions, source.admission, path, partial(self._blocks.pack, TRAIN), self._device)
            self._streamed = StreamedSteps(
                stream, self._step, config.batch, self._device, room=max(self._heights), hides=self._hidden.any
            )
            try:
                yield
            finally:
                stream.close()
            if checkpointing is not None:
                rmtree(path.parent)

    def _resident(self, number: int, source: Assembler, rows: Examples) -> ResidentSteps | None:
        """Returns the steps of a block that lies on the GPU. None on a processor, or with too much padding."""
        if self._device.is_cpu:
            return None
        if self._held is None or self._held[0] != number:
            self._held = None
            block = of_examples(source, rows, self._device)
            steps = None
            if block.padding <= MOST_PADDING:
                steps = ResidentSteps(block, self._step, self._config.batch, self._device, hides=self._hidden.any)
            self._held = number, steps
        return self._held[1]

    def _step(self, batch: Batch) -> None:
        logits = self._logits(batch)
        tasks = self.ranker.network.tasks
        loss = mean_loss(tasks, logits, batch.labels) if self._objective is None else self._objective(logits, batch)
        self._descend(loss)
        if self._watch.step is not None:
            self._watch.step(float(loss.detach()))

    def _descend(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self.ranker.table.step()

    def _logits(self, batch: Batch) -> Tensor:
        return dense_logits(self.ranker, self.ranker.table(batch), batch, self.precision)

    def _finish_epoch(self) -> None:
        self.losses = (*self.losses, self._held_out())
        self._epoch, self._batches = self._epoch + 1, 0
        if self.losses[-1] == min(self.losses):
            # No later epoch can replace the last one, so the last needs no copy.
            self._best = None if self._epoch == self._config.max_epochs else snapshot(self.ranker)
        if self._watch.epoch is not None:
            self._watch.epoch(self.losses)

    def _held_out(self) -> float:
        """Returns the mean loss of the validation part."""
        held_out = self._blocks.parts[VALIDATION]
        return sum(self._held_out_loss(number) for number in range(len(held_out))) / held_out.height

    def _held_out_loss(self, number: int) -> float:
        """Returns the log loss of one block of the validation part, summed over its examples."""
        source, rows = self._blocks.load(VALIDATION, number)
        if self._objective is not None:
            return _summed(self._objective, self.ranker, source, rows, self._device)
        found = predict_tasks(self.ranker, source, rows, self._device)
        if not np.isfinite(found).all():
            raise self._diverged()
        return summed_log_loss(self.ranker.network.tasks, found, rows.targets)

    def _diverged(self) -> TrainingError:
        return TrainingError(
            f"training diverged in epoch {self._epoch}: predictions are no longer numbers; lower table_rate "
            f"({self._config.table_rate}) or network_rate ({self._config.network_rate})"
        )

    def _stopped(self) -> bool:
        return bool(self.losses) and len(self.losses) - 1 - int(np.argmin(self.losses)) >= self._config.patience

    def _save(self, path: Path) -> None:
        """Writes a checkpoint, unless the network is no longer made of numbers: no later run could go on from it."""
        if not all(bool(torch.isfinite(own).all()) for own in self.ranker.network.parameters()):
            raise self._diverged()
        tensors = {f"now.{name}": tensor for name, tensor in snapshot(self.ranker).items()}
        tensors |= {f"best.{name}": tensor for name, tensor in (self._best or {}).items()}
        tensors |= {
            f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer_tensors(self._optimizer).items()
        }
        position = Position(self._key, self._epoch, self._batches, self.losses, self._config.processes)
        self._write(path, position, tensors)


def dense_logits(ranker: Ranker, pooled: Tensor, batch: Batch, precision: Precision) -> Tensor:
    """Returns logits (B,) float32 of the table's output (B, K · D), by products of a precision."""
    if precision == "float32":
        found: Tensor = ranker.network(pooled, batch)
        return found
    # Not autocast: it mixes dtypes in the cross net's products, which costs more than it saves.
    network = ranker.network
    narrow = {name: parameter.bfloat16() for name, parameter in network.named_parameters()}
    logits: Tensor = functional_call(network, narrow, (pooled, batch))
    return logits.float()


def faster_precision(ranker: Ranker, batch: Batch, device: Device = CPU) -> Precision:
    """Times forward and backward passes of the dense part in both precisions; bfloat16 must save a tenth.

    The ranker stays unchanged: the table is only read, and no optimizer steps.
    """
    with torch.no_grad():
        start = ranker.table(batch)
    times: dict[Precision, float] = {"float32": float("inf"), "bfloat16": float("inf")}
    # The first round warms up.
    for counted in (False, *([True] * _TIMED_STEPS)):
        for precision in times:
            pooled = start.clone().requires_grad_()
            began = time.perf_counter()
            logits = dense_logits(ranker, pooled, batch, precision)
            mean_loss(ranker.network.tasks, logits, batch.labels).backward()
            device.synchronize()
            if counted:
                times[precision] = min(times[precision], time.perf_counter() - began)
    ranker.network.zero_grad(set_to_none=True)
    return "bfloat16" if times["bfloat16"] < _WORTH_IT * times["float32"] else "float32"


def new_ranker(schema: Schema, config: TrainConfig, device: Device = CPU) -> Ranker:
    """Returns an untrained ranker, decided by the configuration's seed and the device."""
    precision = "float32" if device.is_cpu else config.row_precision
    table = open_table(schema, learning_rate=config.table_rate, seed=config.seed, device=device, precision=precision)
    return Ranker(table, DensePart(schema, config.network, seed=config.seed).to(device.torch))


def on_device(schema: Schema, ranker: Ranker, config: TrainConfig, device: Device) -> Ranker:
    """Returns a ranker on a device: the same object if it is there, else a copy of its state."""
    if ranker.table.weight.device.type == device.name:
        return ranker
    moved = new_ranker(schema, config, device)
    restore(moved, snapshot(ranker))
    return moved


def snapshot(ranker: Ranker) -> dict[str, Tensor]:
    """Copies the table's rows and optimizer state and the network's parameters to the processor's memory."""
    found = {f"network.{name}": tensor for name, tensor in ranker.network.state_dict().items()}
    found |= {"table.weight": ranker.table.weight, "table.accumulator": ranker.table.accumulator}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


def restore(ranker: Ranker, state: dict[str, Tensor]) -> None:
    """Restores the state that `snapshot` copied."""
    ranker.network.load_state_dict(_under(state, "network."))
    ranker.table.weight.copy_(state["table.weight"])
    ranker.table.accumulator.copy_(state["table.accumulator"])


def predict(ranker: Ranker, source: Assembler, rows: Examples, device: Device = CPU) -> NDArray[np.float32]:
    """Returns probabilities (E,) float32 of the examples, in order; of several tasks those of the judged task."""
    return ranker.network.judged(predict_tasks(ranker, source, rows, device))


@one_thread()
@torch.no_grad()
def predict_tasks(ranker: Ranker, source: Assembler, rows: Examples, device: Device = CPU) -> NDArray[np.float32]:
    """Returns probabilities (E,) float32 of the examples, in order, or (E, T) of several tasks.

    Args:
        ranker: Ranker on `device`.
        source: Assembler of the examples' entities.
        rows: E examples.
        device: Device of the ranker.
    """
    tasks = ranker.network.tasks
    out = np.zeros((len(rows), *(() if tasks is None else (len(tasks.names),))), dtype=np.float32)
    for start in range(0, len(rows), SCORE_ROWS):
        index = np.arange(start, min(start + SCORE_ROWS, len(rows)))
        out[index] = torch.sigmoid(ranker(source.batch(rows.take(index)).to(device))).cpu().numpy()
    return out


def predict_part(
    ranker: Ranker, schema: Schema, frame: Frame, blocks: Blocks, admission: Admission
) -> NDArray[np.float32]:
    """Returns probabilities (E,) float32 of a part's examples, in the order of the part; reads block by block.

    Of several tasks they are the judged task's.
    """
    return ranker.network.judged(predict_part_tasks(ranker, schema, frame, blocks, admission))


def predict_part_tasks(
    ranker: Ranker, schema: Schema, frame: Frame, blocks: Blocks, admission: Admission
) -> NDArray[np.float32]:
    """Returns what `predict_part` returns for one label, and (E, T) of several tasks."""
    loaded = LoadedBlocks(dimensions(schema, frame, admission), {"": blocks})
    return blocks.arranged([predict_tasks(ranker, *loaded.load("", number)) for number in range(len(blocks))])


@torch.no_grad()
def _summed(objective: Objective, ranker: Ranker, source: Assembler, rows: Examples, device: Device) -> float:
    """Returns an objective, summed over the examples."""
    total = 0.0
    for start in range(0, len(rows), SCORE_ROWS):
        index = np.arange(start, min(start + SCORE_ROWS, len(rows)))
        batch = source.batch(rows.take(index)).to(device)
        total += float(objective(ranker(batch), batch)) * len(index)
    return total


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
