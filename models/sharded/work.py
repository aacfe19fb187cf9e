"""Work of one process of a training in several: reads the description, trains its share, writes its rows."""

import time
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from features.device import CPU
from features.errors import TesseraError
from features.frame import stored_frame
from features.frame_blocks import BlockShare, stored_blocks
from features.threads import fixed_threads
from models.ranker.loading import LoadedBlocks, dimensions
from models.ranker.network import DensePart, Ranker
from models.ranker.stored import load_network, load_sketch, save_without_rows
from models.ranker.train import TRAIN, VALIDATION, Checkpointing, Trained, cells_of
from models.sharded.messages import ERROR, LOSSES, MEETING, PROGRESS, RankError, RankSpec
from models.sharded.table import divided, own_range
from models.sharded.training import ShardedTraining
from models.table.admission import Admission
from models.table.reference import start_range
from models.table.row_files import load_rows, write_range
from models.table.schema import Schema

_PATIENCE = timedelta(minutes=10)
"""Longest wait for the other processes, longer than a block takes to read."""
_SHOWN_EVERY_S = 0.5


def work(path: Path, rank: int, processes: int) -> int:
    """Trains this process's share of the training that a file describes.

    Args:
        path: File of the description. The processes meet in a file beside it.
        rank: Number of this process.
        processes: Number of processes.

    Returns:
        The exit code.
    """
    spec = msgspec.json.decode(path.read_bytes(), type=RankSpec)
    directory = path.parent
    meeting = (directory / MEETING).absolute().as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=_PATIENCE)
    try:
        _train(spec, directory)
    except TesseraError as error:
        told = RankError(type(error).__name__, str(error))
        (directory / ERROR.format(dist.get_rank())).write_bytes(msgspec.json.encode(told))
        return 1
    dist.destroy_process_group()
    return 0


def _train(spec: RankSpec, files: Path) -> None:
    share = BlockShare(dist.get_rank(), dist.get_world_size())
    schema, config = Schema.from_json(spec.schema), spec.config
    directory, model_directory = Path(spec.frame), Path(spec.model)
    whole, own = stored_blocks(directory), stored_blocks(directory, share)
    sketch = load_sketch(files)
    source = dimensions(schema, stored_frame(directory), Admission(sketch, schema.admission))
    losses: list[float] = []
    with fixed_threads(config.threads):
        model, ranker = divided(
            schema, DensePart(schema, config.network, seed=config.seed), table_rate=config.table_rate
        )
        _fill(ranker, schema, spec)
        training = ShardedTraining(
            LoadedBlocks(source, {part: own[part] for part in (TRAIN, VALIDATION)}, tuple(config.network.tasks)),
            model,
            ranker,
            config,
            share=share,
            whole=whole,
            positives=spec.positives,
            watch=losses.append if spec.watch else None,
        )
        checkpointing = Checkpointing(Path(spec.checkpoint), spec.seconds) if spec.checkpoint else None
        training.run_with(_Progress(files / PROGRESS, share).told, checkpointing)
        write_range(model_directory, share.number, ranker.table.weight, ranker.table.accumulator)
        if share.number == 0:
            if schema.placement:
                ranker.network.placement.settle(cells_of(schema, whole[TRAIN]))
            trained = Trained(ranker.eval(), sketch, training.losses, device=CPU.about)
            save_without_rows(model_directory, schema, trained)
            (files / LOSSES).write_bytes(msgspec.json.encode(losses))
    dist.barrier()


def _fill(ranker: Ranker, schema: Schema, spec: RankSpec) -> None:
    """Gives the ranker its first values: those of an earlier ranker, or those that the seed decides."""
    table, own = ranker.table, own_range(schema)
    if spec.start:
        load_rows(Path(spec.start), schema, {"weight": table.weight, "accumulator": table.accumulator}, own)
        load_network(Path(spec.start), ranker)
    else:
        start_range(table.weight, torch.Generator().manual_seed(spec.config.seed), low=own.low)


class _Progress:
    """Writer of the first process's progress, which is that of all, for the parent to show."""

    def __init__(self, path: Path, share: BlockShare) -> None:
        self._path = path
        self._first = share.number == 0
        self._written = 0.0

    def told(self, done: int, total: int) -> None:
        if self._first and (done == total or time.monotonic() - self._written > _SHOWN_EVERY_S):
            aside = self._path.with_suffix(".next")
            aside.write_bytes(msgspec.json.encode((done, total)))
            aside.replace(self._path)
            self._written = time.monotonic()
