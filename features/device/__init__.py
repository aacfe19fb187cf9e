"""Devices: the one package that knows CUDA, its streams and its graphs.

All other code takes a `Device` and calls the same methods on a processor and on a GPU. On a processor a staged array is
a tensor over the same memory, and a captured step runs eagerly.
"""

from features.device.card import (
    CPU,
    Device,
    DeviceChoice,
    label_of,
    missing_part,
    named_faults,
    resolve,
)
from features.device.fault import DeviceError

__all__ = ["CPU", "Device", "DeviceChoice", "DeviceError", "label_of", "missing_part", "named_faults", "resolve"]
