"""Steps of a training whose examples lie on the GPU: one captured graph gathers, looks up, learns and updates.

A part of several blocks passes through the GPU: the next block is on its way while the one before is trained on.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from features.device import CPU, Device
from models.table.batch import Batch
from models.table.device.block import MOST_PADDING, DeviceBlock
from models.table.device.stream import BlockStream


class ResidentSteps:
    """Steps on one block of examples.

    A batch of the full size goes through the captured graph, which reads the numbers of its examples from a buffer. The
    last batch of a block may be smaller, and runs eagerly.

    Args:
        block: Examples on the device.
        step: One training step on a batch.
        batch: B, the full size.
        device: Device of the block.
        hides: True if the steps take limits.
        graph: False runs every step eagerly, as a step outside of a graph.
    """

    def __init__(
        self,
        block: DeviceBlock,
        step: Callable[[Batch], None],
        batch: int,
        device: Device,
        *,
        hides: bool,
        graph: bool = True,
    ) -> None:
        self._block = block
        self._step = step
        self._device = device
        self._index = torch.zeros(batch, dtype=torch.int64, device=device.torch)
        features = block.features
        self._limits = torch.zeros((batch, features), dtype=torch.uint8, device=device.torch) if hides else None
        captured = device.captured if graph else CPU.captured
        self._advance = captured(lambda: step(block.batch(self._index, self._limits)))

    def __call__(self, rows: NDArray[np.int64], limits: NDArray[np.uint8] | None) -> None:
        """Trains on examples `rows` (B,); `limits` (B, F) as in `Assembler.batch`."""
        index = self._device.put(rows)
        hidden = None if limits is None else self._device.put(limits)
        if len(rows) != len(self._index):
            self._step(self._block.batch(index, hidden))
            return
        self._index.copy_(index, non_blocking=True)
        if self._limits is not None and hidden is not None:
            self._limits.copy_(hidden, non_blocking=True)
        self._advance()

    def take_over(self, block: DeviceBlock) -> bool:
        """Trains on the examples of another block from now on, with the same graph; False if the shapes differ."""
        return self._block.take_over(block)


class StreamedSteps:
    """Steps on blocks that follow one another.

    Blocks of one shape share one graph. A block of another shape gets a graph of its own.

    Args:
        stream: Blocks of the part.
        step: One training step on a batch.
        batch: B, the full size.
        device: Device of the blocks.
        room: Most examples of a block.
        hides: True if the steps take limits.

    Attributes:
        number: Number of the block that lies on the device; None before the first.
    """

    def __init__(
        self,
        stream: BlockStream,
        step: Callable[[Batch], None],
        batch: int,
        device: Device,
        *,
        room: int,
        hides: bool,
    ) -> None:
        self._stream = stream
        self._step = step
        self.batch = batch
        self._device = device
        self._room = room
        self._hides = hides
        self.number: int | None = None
        self._steps: ResidentSteps | None = None

    def ask(self, number: int) -> None:
        """Begins to read a block; the order is that in which the steps come."""
        if number != self.number:
            self._stream.ask(number)

    def forget(self) -> None:
        """Takes the next block from its file, even if it lies on the device."""
        self.number = None

    def __call__(self, number: int, rows: NDArray[np.int64], limits: NDArray[np.uint8] | None) -> bool:
        """Trains on examples `rows` (B,) of a block.

        Returns:
            False, and nothing is trained, if the block pads too much to lie on a device.
        """
        if number != self.number:
            self._enter(number)
        if self._steps is None:
            return False
        self._steps(rows, limits)
        return True

    def _enter(self, number: int) -> None:
        block = self._stream.take(number)
        self.number = number
        if block.padding > MOST_PADDING:
            self._steps = None
        elif self._steps is None or not self._steps.take_over(block):
            self._steps = ResidentSteps(
                block.roomy(self._room), self._step, self.batch, self._device, hides=self._hides
            )
