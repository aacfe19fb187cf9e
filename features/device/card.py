"""Devices: the choice of one, its memory, and the names of its faults.

torch is imported on use, since a worker that encodes with LSA does not load it.
"""

import gc
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from features.device.fault import DeviceError

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch import device as TorchDevice

    from features.device.staging import Staging

DeviceChoice = Literal["auto", "cpu", "cuda"]
_SPARE_BYTES = 1 << 30
_PINNED_BYTES = 1 << 24


@dataclass(frozen=True)
class Device:
    """Device that computes.

    Attributes:
        name: `cpu` or `cuda`.
        about: Name of the card or processor, driver and versions, for the lineage of what the device makes.
    """

    name: Literal["cpu", "cuda"]
    about: Mapping[str, str]

    @property
    def is_cpu(self) -> bool:
        """True for the processor, whose results are the same bits on each machine."""
        return self.name == "cpu"

    @property
    def label(self) -> str:
        """Name for people: `cpu`, or the card with its driver and versions."""
        return label_of(self.about)

    @property
    def torch(self) -> "TorchDevice":
        """Device of torch."""
        import torch

        return torch.device(self.name)

    def put(self, array: "NDArray[Any] | Tensor") -> "Tensor":
        """Returns an array on the device. A small copy to a GPU goes through pinned memory and does not wait.

        The copy is ordered before all later work of the calling thread's stream. Pinning a large array costs more than
        it saves.
        """
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array)) if isinstance(array, np.ndarray) else array
        if self.is_cpu:
            return tensor
        small = tensor.numel() * tensor.element_size() <= _PINNED_BYTES
        return tensor.pin_memory().to(self.torch, non_blocking=True) if small else tensor.to(self.torch)

    def staging(self) -> "Staging":
        """Returns a way for arrays to the device that does not stop its work."""
        from features.device.staging import Staging

        return Staging(self.torch)

    def generator(self, seed: int) -> "Generator":
        """Returns a seeded generator of random numbers on the device. The same device gives the same numbers twice."""
        import torch

        return torch.Generator(device=self.torch).manual_seed(seed)

    def synchronize(self) -> None:
        """Waits until all work on the device is done.

        Raises:
            DeviceError: The device failed.
        """
        if self.is_cpu:
            return
        import torch

        with named_faults():
            torch.cuda.synchronize()

    def free_bytes(self) -> int | None:
        """Returns the free memory of the card in bytes. None for the processor."""
        if self.is_cpu:
            return None
        import torch

        return int(torch.cuda.mem_get_info()[0])

    def require(self, wanted: int, what: str) -> None:
        """Checks that the card holds `wanted` bytes, beside a spare gigabyte.

        Raises:
            DeviceError: The card has less free memory. Names both sizes and the ways to need less.
        """
        free = self.free_bytes()
        if free is not None and wanted + _SPARE_BYTES > free:
            raise DeviceError(
                f"{what}: needs {wanted:,} bytes and the card has {free:,} free; use "
                'training.row_precision = "float16", a smaller table.budget, or device = "cpu", where --processes '
                "divides the table"
            )

    def captured(self, step: Callable[[], Any]) -> Callable[[], None]:
        """Returns a function that does the step once per call.

        On a GPU the first calls run the step on a side stream. Then one call captures it as a graph, and each later
        call replays the graph. The step must read its inputs from tensors that stay at their place, and must not wait
        for the device.
        """
        if self.is_cpu:
            return lambda: _discard(step())
        from features.device.graph import Graph

        return Graph(step)

    def peak_bytes(self) -> int:
        """Returns the most bytes that tensors took on the card since `reset_peak`; 0 for the processor."""
        if self.is_cpu:
            return 0
        import torch

        return int(torch.cuda.max_memory_allocated())

    def reset_peak(self) -> None:
        """Releases unused memory of the card and starts a new measurement of its peak."""
        if self.is_cpu:
            return
        import torch

        # A captured step and its tensors name each other, so only the collector frees them.
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def named_faults() -> Iterator[None]:
    """Names faults of a card that occur inside the block. Other errors pass through.

    Raises:
        DeviceError: The card has no memory left, or failed.
    """
    try:
        yield
    except RuntimeError as error:
        if fault := _fault(error):
            raise DeviceError(fault) from error
        raise


def _fault(error: RuntimeError) -> str | None:
    """Returns the message for a fault of a card; None for any other error."""
    import torch

    first = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"device cuda: the card has no memory left: {first}; use a smaller training.batch, "
            'training.row_precision = "float16", a smaller table.budget, or device = "cpu"'
        )
    lost = getattr(torch, "AcceleratorError", None)
    if (lost is not None and isinstance(error, lost)) or "CUDA" in first:
        return f"device cuda: the card failed: {first}; run again, training continues at its checkpoint"
    return None


CPU = Device("cpu", {"device": "cpu", "processor": platform.processor() or platform.machine()})


def resolve(choice: DeviceChoice = "auto", *, fused: bool = True) -> Device:
    """Returns the device of a choice.

    Args:
        choice: `auto` takes the GPU if torch, and with `fused` fbgemm, can use it.
        fused: True if the work needs fbgemm's kernels, as the table does.

    Raises:
        DeviceError: `cuda` is chosen and a part is missing; names the part.
    """
    if choice not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device: expected auto, cpu or cuda, got {choice!r}")
    if choice == "cpu":
        return CPU
    missing = missing_part(fused=fused)
    if missing is None:
        return Device("cuda", _about_card())
    if choice == "auto":
        return CPU
    raise DeviceError(f'device = "cuda": {missing}')


def label_of(about: Mapping[str, str]) -> str:
    """Returns the name for people of a device's description, `Device.about`; nothing is known of it: `cpu`."""
    if "card" not in about:
        return "cpu"
    named = ("driver", "cuda", "torch", "fbgemm")
    return ", ".join([about["card"], *(f"{name} {about[name]}" for name in named if name in about)])


def missing_part(*, fused: bool = True) -> str | None:
    """Returns the part that a GPU lacks, with the remedy; None if all parts are there."""
    import torch

    if torch.version.cuda is None:
        return "this build of torch has no CUDA; install tessera[cuda] from requirements-cuda.txt"
    if not torch.cuda.is_available():
        return (
            "torch finds no card; check nvidia-smi and the driver, which must be as new as CUDA " + torch.version.cuda
        )
    return _missing_kernels() if fused else None


def _missing_kernels() -> str | None:
    """Returns the fault of fbgemm's CUDA build; None if its table kernels load."""
    try:
        import fbgemm_gpu
    except (ImportError, OSError, AttributeError) as error:
        return f"fbgemm_gpu does not load ({error}); install fbgemm-gpu for this torch, not fbgemm-gpu-cpu"
    if getattr(fbgemm_gpu, "__variant__", "cuda") == "cpu":
        return "fbgemm_gpu is the build for processors; replace fbgemm-gpu-cpu by fbgemm-gpu of the same version"
    return None


@cache
def _about_card() -> dict[str, str]:
    import torch

    found = torch.cuda.get_device_properties(0)
    about = {
        "device": "cuda",
        "card": found.name,
        "memory_bytes": str(found.total_memory),
        "capability": f"{found.major}.{found.minor}",
        "driver": _driver(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
    }
    try:
        import fbgemm_gpu
    except (ImportError, OSError, AttributeError):
        return about
    return about | {"fbgemm": str(getattr(fbgemm_gpu, "__version__", "unknown"))}


def _driver() -> str:
    """Returns the version of the card's driver; `unknown` if `nvidia-smi` is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "unknown"
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (found.stdout.split() or ["unknown"])[0]


def _discard(value: Any) -> None:
    """Drops the result of a step."""
