"""Inputs of a network: the table's output and the other inputs of a batch of examples.

Shape letters: B batch, F fields, D dim of a row, N numbers, L history length, W width of an item of the history.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class NetworkInputs(NamedTuple):
    """Inputs of a batch of examples, float32, or bfloat16 if the training multiplies so.

    Attributes:
        fields: (B, F, D) a vector for each lookup of each feature, 0 where the value has no row.
        numbers: (B, N) numeric features, whose mean is 0, and the projected content vector of the item.
        candidate: (B, W) the candidate's vectors of the features that the history has too. None without a history.
        history: (B, L, W) the visited items, oldest first. None without a history, or for a network that is no
            sequence model: its fields then hold the history's weighted sum.
        visits: (B,) int64 number of visited items. Later slots of `history` mean nothing. None as for `history`.
    """

    fields: Tensor
    numbers: Tensor
    candidate: Tensor | None = None
    history: Tensor | None = None
    visits: Tensor | None = None


@dataclass(frozen=True)
class NetworkReads:
    """Shapes of a network's inputs.

    Attributes:
        fields: Number F of fields.
        dim: Dimension D of a field.
        numbers: Number N of numbers. May be 0.
        width: Width W of an item of the history. 0 without a history.
        history: Length L of the history. 0 without a history.
        tasks: Number T of tasks, each with an output.
    """

    fields: int
    dim: int
    numbers: int
    width: int = 0
    history: int = 0
    tasks: int = 1

    @property
    def flat(self) -> int:
        """Width of the fields and numbers of an example together, F · D + N."""
        return self.fields * self.dim + self.numbers


class RankerNetwork(Protocol):
    """Network of a ranker: a torch module from `NetworkInputs` to logits.

    The constructor takes `NetworkReads`, and the options of `[run.ranker.options]` by keyword. A class attribute
    `sequence = True` asks for the history as a sequence. The weights are set from the run's seed before the constructor
    is called. An example's logit must depend on no other example of the batch.
    """

    def __call__(self, inputs: NetworkInputs) -> Tensor:
        """Returns logits (B,), or (B, T) if `NetworkReads.tasks` is more than 1."""
        ...
