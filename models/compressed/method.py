"""What an embedding method is: vectors for values out of a given number of bytes, all counted by one rule.

Counted is what serving must keep to give the same vectors: every tensor of `stored()`, in its stored type, the value
dictionary included where a method needs a value's own id. Not counted are the method's configuration (field names and
a few integers per field) and whatever the hash contract gives anew, such as the rows of a hashed value.

Shape letters: B batch, F fields, D dim, N values of all fields, R rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from features.errors import TesseraError
from models.compressed.fields import Fields

INIT_BOUND = 0.05
INIT_STD = INIT_BOUND / 3**0.5
FLOAT_BYTES = 4


class BudgetError(TesseraError):
    """A method cannot work in so few bytes.

    Attributes:
        least: bytes that would do.
    """

    def __init__(self, method: str, least: int, budget: int) -> None:
        super().__init__(f"{method}: needs at least {least:,} bytes, the budget is {budget:,}; raise the budget")
        self.least = least


def footprint(stored: Mapping[str, Tensor]) -> int:
    """Bytes of what serving must keep: the one rule for every method."""
    return sum(tensor.nbytes for tensor in stored.values())


class EmbeddingMethod(nn.Module, ABC):
    """Vectors for the values of several fields.

    What `stored()` holds is by default the module's state: parameters and persistent buffers. What the hash contract
    gives anew is a buffer with `persistent=False`.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        """Builds the method as close to a budget as its own knob allows, never above it.

        Args:
            fields: names, sizes, fingerprints and training counts of the values; the examples are not looked at.
            dim: D.
            budget: bytes of `stored()` at most.
            seed: of the start; addresses do not depend on it.

        Raises:
            BudgetError: the least that the method needs is more than the budget.
        """

    @abstractmethod
    def forward(self, codes: Tensor) -> Tensor:
        """Vectors (B, F, D) float32 of values given as ids (B, F) int64 in [0, N); column f holds ids of field f."""

    def stored(self) -> dict[str, Tensor]:
        """Copies of exactly what serving must keep."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Puts back what `stored` gave; the instance may have been built with another seed."""
        self.load_state_dict(dict(stored))

    # Three hooks of the training loop; most methods need none.

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step with the steps done since the start (from 1) and those of one epoch."""

    def after_epoch(self, epoch: int) -> None:
        """Called between epochs, after epoch `epoch` (from 0) has been validated."""

    def loss(self) -> Tensor:
        """What is added to the loss of the batch that `forward` has just seen."""
        return torch.zeros(())


def uniform(shape: tuple[int, ...], generator: torch.Generator, bound: float = INIT_BOUND) -> nn.Parameter:
    """Returns a float32 parameter, uniform in ±bound."""
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)


def seeded(seed: int) -> torch.Generator:
    """Returns a generator of its own, so that building a method leaves the process's random state alone."""
    return torch.Generator().manual_seed(seed)


def largest(name: str, sizes: range, bytes_at: Callable[[int], int], budget: int) -> int:
    """Returns the largest knob whose bytes, which grow with it, are within the budget.

    Args:
        name: of the method, for the error.
        sizes: the knob's values, ascending, at least one.
        bytes_at: bytes for a value of the knob.

    Raises:
        BudgetError: not even the first is.
    """
    if bytes_at(sizes[0]) > budget:
        raise BudgetError(name, bytes_at(sizes[0]), budget)
    low, high = 0, len(sizes) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if bytes_at(sizes[middle]) <= budget:
            low = middle
        else:
            high = middle - 1
    return sizes[low]
