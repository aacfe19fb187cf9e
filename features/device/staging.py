"""Copies ahead of use: bytes go to a GPU on a stream of their own while it computes on earlier ones.

A GPU copies from pinned memory alone without the processor. So two pinned buffers are filled in turn, and each is
filled again when its last copy has ended.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BUFFERS = 2


@dataclass(frozen=True)
class Staged:
    """Bytes on their way to the device.

    Attributes:
        bytes: (n,) uint8 on the device; wait with `ready` before their use.
        copied: Event of the copy; None on a processor.
    """

    bytes: Tensor
    copied: Any = None

    def ready(self) -> Tensor:
        """Returns the bytes. All later work of the calling thread's stream waits for the copy; the thread does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.copied)
            self.bytes.record_stream(stream)
        return self.bytes


class Staging:
    """Way to one device. Not safe for concurrent use.

    Args:
        target: Device of the bytes.
    """

    def __init__(self, target: torch.device) -> None:
        self._target = target
        self._stream = None if target.type == "cpu" else torch.cuda.Stream()
        self._buffers: list[Tensor | None] = [None] * _BUFFERS
        self._events: list[Any] = [None] * _BUFFERS
        self._turn = 0

    def warm(self, size: int) -> None:
        """Pins the buffers for `size` bytes now, which takes longer than a copy."""
        if self._stream is not None:
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]

    def put(self, size: int, fill: Callable[[Tensor], object]) -> Staged:
        """Sends `size` bytes, which `fill` writes into memory of the processor, (size,) uint8."""
        if self._stream is None:
            own = torch.empty(size, dtype=torch.uint8)
            fill(own)
            return Staged(own)
        turn, self._turn = self._turn, (self._turn + 1) % _BUFFERS
        if self._events[turn] is not None:
            self._events[turn].synchronize()
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < size:
            self._buffers[turn] = buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        fill(buffer[:size])
        with torch.cuda.stream(self._stream):
            there = buffer[:size].to(self._target, non_blocking=True)
            self._events[turn] = torch.cuda.Event()
            self._events[turn].record(self._stream)
        return Staged(there, self._events[turn])

    def put_array(self, array: NDArray[Any]) -> Tensor:
        """Returns an array on the device. The device's next work waits for the copy, the calling thread does not."""
        if self._stream is None:
            return torch.from_numpy(np.ascontiguousarray(array))
        source = torch.from_numpy(np.ascontiguousarray(array))
        staged = self.put(array.nbytes, lambda buffer: buffer.view(source.dtype).view(source.shape).copy_(source))
        return staged.ready().view(source.dtype).view(source.shape)
