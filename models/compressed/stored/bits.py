"""Packs small integers into bytes: the stored form of codes and pointers."""

import numpy as np
import torch
from torch import Tensor


def bits_for(choices: int) -> int:
    """Returns the bits that distinguish so many choices, at least one."""
    return max(1, (choices - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Returns the bytes that `pack` needs for so many integers."""
    return -(-count * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Packs integers of any shape in [0, 2**bits) into uint8, low bit first, without gaps."""
    flat = values.numpy().reshape(-1, 1).astype(np.int64)
    one_by_one = (flat >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(one_by_one.astype(np.uint8), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Returns the integers, int64 of the given shape, that `pack` packed."""
    count = int(np.prod(shape))
    one_by_one = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits).reshape(count, bits)
    return torch.from_numpy((one_by_one.astype(np.int64) << np.arange(bits)).sum(axis=1).reshape(shape))
