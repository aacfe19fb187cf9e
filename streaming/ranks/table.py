"""Table of one process among several: it holds its rows, and asks the owners of other rows for their values.

A step of all processes:

1. Each process asks the owners for the rows that its partitions read.
2. Each partition runs forward and backward alone. Its gradient is one vector for each distinct row.
3. The gradients go to the owners, which add them in the order of the partitions.
4. Each owner applies row-wise Adagrad to its rows.

The sum inside a partition depends on the partition, and the sum over partitions has one order. So no bit depends on the
number of processes.

Shape letters: R rows, D dim, P partitions, N processes, n rows of one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.bundle.bundle import Bundle
from models.networks.tasks import summed_loss
from models.ranker.network import DensePart
from models.table.batch import Batch
from models.table.reference import EPSILON, pool
from models.table.row_files import load_rows
from streaming.ranks.deal import Deal
from streaming.ranks.peers import StreamPeers, concatenated, together

Shares = Sequence[tuple[int, Batch]]
"""Batches of a step by the number of their partition, in the order of the partitions."""


@dataclass(frozen=True)
class StepOutput:
    """Result of a step on the table.

    Attributes:
        rows: Changed rows of this process, ascending.
        labels: (B,) labels of the examples of this process; of several tasks those of the judged task.
        logits: (B,) logits before the update, of the same task.
    """

    rows: NDArray[np.int64]
    labels: NDArray[np.float32]
    logits: NDArray[np.float32]


class RangedTable(nn.Module):
    """Rows of one process, with their optimizer state.

    Attributes:
        low: Number of the first own row.
        weight: (n, D) float32 own rows.
        accumulator: (n,) float32 row-wise Adagrad state.

    Args:
        bundle: Bundle with the first values.
        deal: Share of this process.
        peers: Connections to the other processes.
        learning_rate: Rate of row-wise Adagrad. Default: the bundle's.
    """

    def __init__(self, bundle: Bundle, deal: Deal, peers: StreamPeers, *, learning_rate: float | None = None) -> None:
        super().__init__()
        schema, training = bundle.schema, bundle.manifest.training
        own = deal.own_rows(schema.rows)
        self.low = own.low
        self.weight = torch.empty(len(own), schema.dim)
        self.accumulator = torch.zeros(len(own))
        load_rows(bundle.directory, schema, {"weight": self.weight, "accumulator": self.accumulator}, own)
        self._deal, self._peers = deal, peers
        self._edges = deal.edges(schema.rows)
        self._rate = np.float32(training.table_rate if learning_rate is None else learning_rate)
        self._mean_of = training.batch
        self._sum = np.zeros((len(own), schema.dim), dtype=np.float32)

    def learn(self, network: DensePart, shares: Shares) -> StepOutput:
        """Does one step on the batches of this process's partitions. Every process calls it once a step.

        Args:
            network: The frozen dense part.
            shares: Batches of the own partitions. A partition without examples has none.
        """
        read = [(part, batch, *np.unique(batch.values.numpy(), return_inverse=True)) for part, batch in shares]
        needed = np.unique(concatenated([rows for _, _, rows, _ in read], np.zeros(0, dtype=np.int64)))
        vectors = self._ask(needed)
        labels, logits, gradients = [], [], []

        def backward() -> None:
            for part, batch, rows, inverse in read:
                leaf = torch.from_numpy(vectors[np.searchsorted(needed, rows)]).requires_grad_()
                narrow = replace(batch, values=torch.from_numpy(inverse.astype(np.int64)))
                logit = network(pool(leaf, narrow), narrow)
                loss = summed_loss(network.tasks, logit, batch.labels)
                (loss / self._mean_of).backward()
                assert leaf.grad is not None
                labels.append(network.judged(batch.labels.numpy()))
                logits.append(network.judged(logit.detach().numpy()))
                gradients.append((part, rows, leaf.grad.numpy()))

        together(self._peers, backward)
        heads, found = self._send(gradients)
        nothing = np.zeros(0, dtype=np.float32)
        touched = self._update(heads, found)
        return StepOutput(touched, concatenated(labels, nothing), concatenated(logits, nothing))

    def _ask(self, needed: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns the vectors of rows (m,), ascending, from their owners: (m, D)."""
        asked = self._peers.swap(self._cut(needed, needed))
        weight = self.weight.numpy()
        return np.concatenate(self._peers.swap([weight[rows - self.low] for rows in asked]))

    def _cut(self, rows: NDArray[np.int64], values: NDArray) -> list[NDArray]:  # type: ignore[type-arg]
        """Cuts values of ascending rows by the owner of each row."""
        cuts = np.searchsorted(rows, self._edges)
        return [values[first:last] for first, last in pairwise(cuts)]

    def _send(
        self, gradients: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float32]]]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Sends gradients to the owners. Returns the received heads (partition, row), and their gradients.

        Processes have consecutive partitions and are in order, so the result is in the order of the partitions.
        """
        heads: list[list[NDArray[np.int64]]] = [[] for _ in self._edges[1:]]
        values: list[list[NDArray[np.float32]]] = [[] for _ in self._edges[1:]]
        for part, rows, gradient in gradients:
            named = np.stack([np.full(len(rows), part, dtype=np.int64), rows], axis=1)
            for owner, (head, value) in enumerate(zip(self._cut(rows, named), self._cut(rows, gradient), strict=True)):
                heads[owner].append(head)
                values[owner].append(value)
        no_head, no_value = np.zeros((0, 2), dtype=np.int64), np.zeros((0, self.weight.shape[1]), dtype=np.float32)
        return (
            np.concatenate(self._peers.swap([concatenated(own, no_head) for own in heads])),
            np.concatenate(self._peers.swap([concatenated(own, no_value) for own in values])),
        )

    def _update(self, heads: NDArray[np.int64], gradients: NDArray[np.float32]) -> NDArray[np.int64]:
        """Adds gradients in the order of the partitions, and applies row-wise Adagrad. Returns the changed rows."""
        rows = heads[:, 1] - self.low
        bounds = np.searchsorted(heads[:, 0], np.arange(self._deal.partitions + 1))
        for first, last in pairwise(bounds):
            # A partition names each row once, so no addition gets lost.
            self._sum[rows[first:last]] += gradients[first:last]
        touched = np.unique(rows)
        sums = self._sum[touched]
        weight, accumulator = self.weight.numpy(), self.accumulator.numpy()
        accumulator[touched] += (sums * sums).mean(axis=1, dtype=np.float32)
        scale = self._rate / (np.sqrt(accumulator[touched]) + np.float32(EPSILON))
        weight[touched] -= scale[:, None] * sums
        self._sum[touched] = 0
        return touched + self.low

    def forward(self, batch: Batch) -> Tensor:
        """Refuses to look rows up, since rows of other processes are not here. `learn` asks their owners."""
        raise TypeError("a table of one process among several only trains; call learn")

    def step(self) -> None:
        """Does nothing: `learn` has updated the rows."""
