"""The protocol of an embedding method: vectors for values within a budget of bytes, all counted by one rule.

The bytes of a method are those that serving must keep to give the same vectors: every tensor of `stored()`, in its
stored type, including the value dictionary if a method needs a value's own id. They exclude the method's configuration
(field names and a few integers per field) and whatever the hash contract recomputes, such as the rows of a hashed
value.

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
    """Error of a method that cannot work within so few bytes.

    Attributes:
        least: Fewest bytes that the method needs.
    """

    def __init__(self, method: str, least: int, budget: int) -> None:
        super().__init__(f"{method}: needs at least {least:,} bytes, the budget is {budget:,}; raise the budget")
        self.least = least


def footprint(stored: Mapping[str, Tensor]) -> int:
    """Returns the bytes that serving must keep: the one rule for every method."""
    return sum(tensor.nbytes for tensor in stored.values())


class EmbeddingMethod(nn.Module, ABC):
    """Method that gives vectors for the values of several fields.

    By default `stored()` holds the module's state: parameters and persistent buffers. A tensor that the hash contract
    recomputes is a buffer with `persistent=False`.
    """

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def at(cls, fields: Fields, dim: int, budget: int, *, seed: int) -> Self:
        """Builds the method as close to a budget as its own knob allows, never above it.

        Args:
            fields: Names, sizes, fingerprints and training counts of the values; the examples are not used.
            dim: D.
            budget: Most bytes of `stored()`.
            seed: Seed of the start; addresses do not depend on it.

        Raises:
            BudgetError: The method needs more bytes than the budget.
        """

    @abstractmethod
    def forward(self, codes: Tensor) -> Tensor:
        """Returns vectors (B, F, D) float32 of value ids (B, F) int64 in [0, N); column f holds ids of field f."""

    def stored(self) -> dict[str, Tensor]:
        """Returns copies of exactly the tensors that serving must keep."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def restore(self, stored: Mapping[str, Tensor]) -> None:
        """Restores tensors that `stored` returned; the instance may have been built with another seed."""
        self.load_state_dict(dict(stored))

    # Three hooks of the training loop; most methods need none.

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimizer step with the steps done since the start (from 1) and the steps of one epoch."""

    def after_epoch(self, epoch: int) -> None:
        """Called between epochs, after epoch `epoch` (from 0) has been validated."""

    def loss(self) -> Tensor:
        """Returns the term that is added to the loss of the batch that `forward` has just processed."""
        return torch.zeros(())


def uniform(shape: tuple[int, ...], generator: torch.Generator, bound: float = INIT_BOUND) -> nn.Parameter:
    """Returns a float32 parameter, uniform in ±bound."""
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)


def seeded(seed: int) -> torch.Generator:
    """Returns a new generator, so that building a method does not change the process's random state."""
    return torch.Generator().manual_seed(seed)


def largest(name: str, sizes: range, bytes_at: Callable[[int], int], budget: int) -> int:
    """Returns the largest knob whose bytes, which grow with it, are within the budget.

    Args:
        name: Name of the method, for the error.
        sizes: Values of the knob, ascending, at least one.
        bytes_at: Bytes for a value of the knob.

    Raises:
        BudgetError: Even the first value exceeds the budget.
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
