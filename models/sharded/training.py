"""Trains a ranker in one of several processes: the batches of a training in one process, each process its share.

The loss of a process is the sum over its own examples, times N over the batch's size. Torch averages the network's
gradients over N processes, and TorchRec divides the rows' gradients by N, so both get the gradient of the mean.

Shape letters: B batch of all processes.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from features.device import CPU
from features.durable import recover_directory, replace_directory
from features.frame_blocks import Blocks, BlockShare
from models.networks.tasks import summed_log_loss, summed_loss
from models.ranker import checkpoint
from models.ranker.loading import LoadedBlocks
from models.ranker.network import Ranker
from models.ranker.order import Draw
from models.ranker.train import (
    SCORE_ROWS,
    TRAIN,
    VALIDATION,
    Checkpointing,
    TrainConfig,
    TrainingRun,
    Watch,
)
from models.sharded.share import own_examples
from models.table.batch import Batch

# Batches from one question whether a checkpoint is due to the next: a question costs a message to all processes.
_ASK_EVERY = 8


class ShardedTraining(TrainingRun):
    """Training run of one process among several.

    Args:
        blocks: Blocks of the process's share of each part.
        model: Model to call in training; see `models.sharded.table.divided`.
        ranker: Ranker inside the model.
        config: Configuration of the training.
        share: Share of the process.
        whole: Blocks of each part with the examples of all processes; only their heights are read.
        positives: Number of positives in the training part.
        watch: Called with the loss of each step over all processes. None: the losses are not added up.
    """

    def __init__(
        self,
        blocks: LoadedBlocks,
        model: nn.Module,
        ranker: Ranker,
        config: TrainConfig,
        *,
        share: BlockShare,
        whole: Mapping[str, Blocks],
        positives: float,
        watch: Callable[[float], None] | None = None,
    ) -> None:
        self._model = model
        self._share = share
        self._held_out_heights = whole[VALIDATION].heights
        heights = whole[TRAIN].heights
        super().__init__(blocks, ranker, config, CPU, heights=heights, positives=positives, watch=Watch(watch))

    def _made(self, draw: Draw, limits: NDArray[np.uint8] | None) -> Callable[[], None]:
        own = own_examples(self._share, self._heights[draw.block], draw.rows)
        source, rows = self._blocks.load(TRAIN, draw.block)
        batch = source.batch(rows.take(own.rows), limits=None if limits is None else limits[own.places])
        factor = self._share.count / len(draw.rows)
        return partial(self._step_own, batch, torch.from_numpy(own.weights), factor)

    def _step_own(self, batch: Batch, weights: Tensor, factor: float) -> None:
        logits = self._model(batch)
        loss = summed_loss(self.ranker.network.tasks, logits, batch.labels, weights) * factor
        self._descend(loss)
        if self._watch.step is not None:
            self._watch.step(_total(float(loss.detach())) / self._share.count)

    def _held_out(self) -> float:
        total = sum(self._summed_log_loss(number) for number in range(len(self._held_out_heights)))
        total = _total(total)
        if not np.isfinite(total):
            raise self._diverged()
        return total / sum(self._held_out_heights)

    @torch.no_grad()
    def _summed_log_loss(self, number: int) -> float:
        """Returns the log loss, summed over the process's examples of one block of the validation part."""
        source, rows = self._blocks.load(VALIDATION, number)
        # As many as the largest share, since all processes must ask for rows equally often.
        count = -(-self._held_out_heights[number] // self._share.count)
        place = np.minimum(np.arange(count), len(rows) - 1)
        parts = [place[start : start + SCORE_ROWS] for start in range(0, count, SCORE_ROWS)]
        logits = torch.cat([self.ranker(source.batch(rows.take(part))) for part in parts])
        found = torch.sigmoid(logits[: len(rows)]).numpy()
        return (
            summed_log_loss(self.ranker.network.tasks, found, rows.targets)
            if np.isfinite(found).all()
            else float("nan")
        )

    def _due(self, saved: float, seconds: float) -> bool:
        """Returns the first process's answer, since all processes must write a checkpoint of the same step."""
        if self._batches % _ASK_EVERY:
            return False
        answer = torch.tensor([time.monotonic() - saved > seconds])
        dist.broadcast(answer, 0)
        return bool(answer)

    def _write(self, path: Path, position: checkpoint.Position, tensors: dict[str, Tensor]) -> None:
        """Writes a checkpoint, a directory with a file of each process: the files of one step, or of the step before.

        All files are written aside, and the first process puts them in place.
        """
        aside, first = path.with_name(f"{path.name}.next"), self._share.number == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        dist.barrier()
        checkpoint.save(checkpoint.part_of(aside, self._share.number), position, tensors)
        dist.barrier()
        if first:
            replace_directory(aside, path)

    def _read(self, path: Path, key: str) -> tuple[checkpoint.Position, dict[str, Tensor]] | None:
        if self._share.number == 0:
            recover_directory(path)
        dist.barrier()
        return checkpoint.load(checkpoint.part_of(path, self._share.number), key)

    def run_with(self, progress: Callable[[int, int], None], checkpointing: Checkpointing | None) -> None:
        """Continues from a checkpoint if there is one, and trains to the end."""
        if checkpointing:
            self.go_on(checkpointing.path)
        self.run(progress, checkpointing)


def _total(own: float) -> float:
    """Returns the sum of a number over all processes."""
    total = torch.tensor([own], dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)
