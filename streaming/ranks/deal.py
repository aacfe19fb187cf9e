"""The deal: P partitions of the inputs and P row ranges of the table, dealt to N processes.

P is the number of partitions of the deltas' topic and stays for the topic's life. N may change at every start, since
no result depends on N.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.errors import StreamError
from models.table.row_files import RowRange, row_ranges


@dataclass(frozen=True)
class Deal:
    """Share of one process.

    Attributes:
        partitions: Number P of partitions and of row ranges, ≥ 1.
        processes: Number N of processes, 1 to P.
        rank: Number of this process, 0 to N - 1. Process 0 is the leader.

    Raises:
        StreamError: There are more processes than partitions.
    """

    partitions: int = 1
    processes: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.processes > self.partitions:
            raise StreamError(
                f"{self.processes} processes, but the deltas' topic has {self.partitions} partitions; start at most "
                f"{self.partitions} processes, or begin a stream with TESSERA_PARTITIONS={self.processes} or more"
            )
        if not 0 <= self.rank < self.processes:
            raise StreamError(f"rank {self.rank}: expected 0 to {self.processes - 1}")

    @property
    def own(self) -> range:
        """Numbers of this process's partitions, which are also the numbers of its row ranges."""
        return self.of(self.rank)

    def of(self, rank: int) -> range:
        """Returns the numbers of a process's partitions. Each process has at least one."""
        first, last = (number * self.partitions // self.processes for number in (rank, rank + 1))
        return range(first, last)

    def ranges(self, rows: int) -> list[RowRange]:
        """Returns the row ranges of a table of R rows, by number."""
        return row_ranges(rows, self.partitions)

    def own_rows(self, rows: int) -> RowRange:
        """Returns the consecutive rows of this process's row ranges."""
        ranges = self.ranges(rows)
        return RowRange(ranges[self.own[0]].low, ranges[self.own[-1]].high)

    def edges(self, rows: int) -> NDArray[np.int64]:
        """Returns the first row of each process, and R: (N + 1,)."""
        ranges = self.ranges(rows)
        return np.array([ranges[self.of(rank)[0]].low for rank in range(self.processes)] + [rows], dtype=np.int64)

    def parts_of(self, partitions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the parts of messages, given the partitions of the topic. A topic may have more partitions."""
        return partitions % self.partitions
