"""`training-speed --device`: from a frame's files to the updated table, beside the step alone and a bare copy.

The frame lies in packed blocks, as a training leaves them after its first epoch; packing is a row of its own. Each way
is measured from files in the page cache and from files that the system was asked to drop from it.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

import polars as pl

from features.device import Device
from features.frame import Frame
from features.frame_blocks import held_blocks
from models.ranker.loading import LoadedBlocks, dimensions
from models.ranker.order import EpochOrder
from models.ranker.resident_steps import StreamedSteps
from models.ranker.train import TrainConfig, new_ranker
from models.table.admission import Admission
from models.table.batch import Batch
from models.table.device.columns import Dimensions
from models.table.device.packed import open_packed
from models.table.device.stream import BlockStream
from models.table.schema import Schema

_PART = "train"


class _Files:
    """Packed blocks of the training part in a directory of their own."""

    def __init__(self, frame: Frame, schema: Schema, device: Device, directory: Path, *, block_rows: int) -> None:
        self.device = device
        part = frame.part(_PART).with_columns(pl.col("event").cast(pl.Int64))
        blocks = held_blocks(part, max(1, part.height // block_rows))
        self.heights = blocks.heights
        self.loaded = LoadedBlocks(dimensions(schema, frame, Admission.off()), {_PART: blocks})
        self.directory = directory
        rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.paths = [directory / f"{number:05d}.safetensors" for number in range(len(blocks))]
        source = self.loaded.source
        self.dimensions = Dimensions(schema, source.users, source.items, None, self.device)

    def pack(self) -> float:
        """Packs all blocks; returns the seconds."""
        began = time.perf_counter()
        for number, path in enumerate(self.paths):
            self.loaded.pack(_PART, number, path)
        return time.perf_counter() - began

    def drop(self) -> None:
        """Asks the system to drop the files from its page cache."""
        for path in self.paths:
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

    def stream(self) -> BlockStream:
        """Opens a stream of the blocks."""
        source = self.loaded.source
        return BlockStream(
            self.dimensions, source.admission, self.directory, partial(self.loaded.pack, _PART), self.device
        )

    def copied(self) -> float:
        """Copies the files to the device, through pinned memory, and does nothing else; returns the seconds."""
        packed = [open_packed(path) for path in self.paths]
        staging = self.device.staging()
        staging.warm(max(one.size for one in packed))
        self.device.synchronize()
        began = time.perf_counter()
        held = [staging.put(one.size, one.read).bytes for one in packed]
        self.device.synchronize()
        seconds = time.perf_counter() - began
        del held
        return seconds


def end_to_end(
    frame: Frame,
    schema: Schema,
    device: Device,
    out: Path,
    config: TrainConfig,
    step_of: Callable[..., Callable[[Batch], None]],
    *,
    block_rows: int = 1 << 18,
) -> list[dict[str, Any]]:
    """Measures one epoch from files to the updated table.

    Args:
        frame, schema: Examples and the table that reads them.
        device: Device.
        out: Directory for the files.
        config: Configuration with the batch.
        step_of: Makes the step of a ranker, see `tessera.bench.device.training.step_of`.
        block_rows: Examples of a block, about.
    """
    files = _Files(frame, schema, device, out / "packed", block_rows=block_rows)
    packing = files.pack()
    size = sum(path.stat().st_size for path in files.paths)
    about: dict[str, Any] = {
        "batch": config.batch,
        "rows": sum(files.heights),
        "bytes": size,
        "blocks": len(files.heights),
    }
    rows: list[dict[str, Any]] = [{"model": "pack a frame", **about, "seconds": packing}]
    for precision in ("float32", "bfloat16"):
        ranker = new_ranker(schema, config, device)
        step = step_of(ranker, config, precision, device)

        def steps_of(stream: BlockStream, step: Callable[[Batch], None] = step) -> StreamedSteps:
            return StreamedSteps(stream, step, config.batch, device, room=max(files.heights), hides=False)

        stream = files.stream()
        steps = steps_of(stream)
        # The graph is captured, and the buffers are pinned, before the first measurement.
        _epoch(files, steps, 0)
        alone = min(_alone(files, steps) for _ in range(2))
        for cached in (True, False):
            for name, measure in (("copy", files.copied), ("whole", partial(_epoch, files, steps, 1))):
                if not cached:
                    files.drop()
                about[f"{name}_seconds"] = min(measure() for _ in range(2)) if cached else measure()
            rows.append(
                {
                    "model": "end to end",
                    **about,
                    "precision": precision,
                    "from": "page cache" if cached else "disk",
                    "step_seconds": alone,
                    "samples_per_second": about["rows"] / about["whole_seconds"],
                    "of_the_slower": max(alone, about["copy_seconds"]) / about["whole_seconds"],
                }
            )
        stream.close()
    rmtree(files.directory)
    return rows


def _epoch(files: _Files, steps: StreamedSteps, epoch: int) -> float:
    """Trains one epoch from the files; returns the seconds, the first block's way to the device among them."""
    order = EpochOrder(files.heights, steps.batch, seed=0, epoch=epoch)
    numbers = order.blocks()
    following = dict(pairwise(numbers))
    steps.forget()
    files.device.synchronize()
    began = time.perf_counter()
    steps.ask(numbers[0])
    for draw in order.draws():
        steps.ask(draw.block)
        steps.ask(following.get(draw.block, draw.block))
        steps(draw.block, draw.rows, None)
    files.device.synchronize()
    return time.perf_counter() - began


def _alone(files: _Files, steps: StreamedSteps) -> float:
    """Trains as many batches of the block that lies on the device; returns the seconds."""
    order = EpochOrder(files.heights, steps.batch, seed=0, epoch=2)
    held = steps.number
    assert held is not None
    # The blocks' heights differ a little: the rows of others are folded into the block that is there.
    draws = [draw.rows % files.heights[held] for draw in order.draws()]
    files.device.synchronize()
    began = time.perf_counter()
    for rows in draws:
        steps(held, rows, None)
    files.device.synchronize()
    return time.perf_counter() - began
