"""Steps of a training whose examples lie on the GPU: one captured graph gathers, looks up, learns and updates."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from features.device import CPU, Device
from models.table.batch import Batch
from models.table.device_block import DeviceBlock


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
