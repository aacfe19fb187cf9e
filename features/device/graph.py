"""Steps as CUDA graphs: a step that is captured once costs one launch instead of hundreds."""

from collections.abc import Callable
from typing import Any

import torch

from features.device.fault import DeviceError

# A step allocates its buffers and compiles its kernels in these runs, before it is captured.
_WARM_UP = 5


class Graph:
    """Step that is captured as a CUDA graph after its warm-up. Each call does one step."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= _WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._step()
            torch.cuda.current_stream().wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Recording does not run the step: the replay below does.
            try:
                # A thread that loads the next block may use the card meanwhile.
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._step()
            except RuntimeError as error:
                raise DeviceError(f"device cuda: the step cannot be captured as a graph: {error}") from error
        self._graph.replay()
