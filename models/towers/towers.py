"""The two towers of a bundle: vectors of items and of users from rows that the caller reads.

    towers = bundle.towers
    vectors = towers.item_vectors(read_rows, bundle.items)
    asked = towers.user_vectors(read_rows, users, visits)
    scores = asked @ vectors.T

The table's rows are read by a function, so that a server reads them from its store or its mirror.
Shape letters: N items or users, n visits in all, m rows, D dim, W width, L visits that are read.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.table.admission import Admission, Sketch
from models.table.column_rows import gather
from models.table.schema import Schema
from models.towers.config import TowerConfig
from models.towers.inputs import ReadRows, TowerInputs, tower_inputs, tower_reads
from models.towers.network import TowerNetwork, gap_buckets
from models.towers.shape import columns_of

_AT_ONCE = 1 << 16
_USERS_AT_ONCE = 1 << 10


@dataclass(frozen=True)
class Visits:
    """Visits of N users, list after list, oldest first.

    Attributes:
        vectors: (n, W) float32 vectors of the visited items. A visit without a vector is a row of zeros.
        times: (n,) int64 times of the visits, in the unit of the frame's `time`.
        lengths: (N,) int64 number of each user's visits.
        now: (N,) int64 time of each request, in the same unit.
    """

    vectors: NDArray[np.float32]
    times: NDArray[np.int64]
    lengths: NDArray[np.int64]
    now: NDArray[np.int64]


class Towers:
    """Trained towers. The same rows give the same vectors.

    Args:
        schema: Schema of the towers, see `tower_schema`.
        config: Shape.
        network: Trained dense part.
        sketch: Sightings of the values in training; a value without any reads no row.
        start: First row of the towers' range in the unified table.
        id: Id of the stored form; empty before it is stored.
    """

    def __init__(
        self, schema: Schema, config: TowerConfig, network: TowerNetwork, sketch: Sketch, *, start: int, id: str = ""
    ) -> None:
        self.schema, self.config, self.start, self.id = schema, config, start, id
        self.sketch = sketch
        self.network = network.eval().requires_grad_(False)
        self._admission = Admission(sketch, schema.admission)

    @property
    def width(self) -> int:
        """W, the width of all vectors."""
        return self.config.width

    @property
    def length(self) -> int:
        """L, the newest visits of a user that are read."""
        return self.schema.history_length

    @property
    def content_weight(self) -> float:
        """Weight of content's reciprocal ranks beside those of the towers, which weigh 1."""
        return 1.0 if self.config.content_weight is None else self.config.content_weight

    @cached_property
    def item_columns(self) -> tuple[str, ...]:
        """Columns of items that are read, beside `content_vector`."""
        return columns_of(self.schema, "item")

    @cached_property
    def user_columns(self) -> tuple[str, ...]:
        """Columns of users that are read."""
        return columns_of(self.schema, "user")

    def at(self, start: int) -> "Towers":
        """Returns the same towers with their range at another place of the table."""
        return Towers(self.schema, self.config, self.network, self.sketch, start=start, id=self.id)

    def item_rows(self, items: pl.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the rows of the table that each item's vector reads, (n,) one item after the other, and counts (N,).

        Args:
            items: As in `item_vectors`.
        """
        return self._inputs("item", items).rows()

    def item_vectors(self, read_rows: ReadRows, items: pl.DataFrame) -> NDArray[np.float32]:
        """Returns the vectors (N, W) of items, of unit length; 0 for an item that training did not see in any part.

        Args:
            read_rows: Reads rows of the table.
            items: One row for each item: `item_columns`, and `content_vector` as the ranker reads it. A column that is
                absent is missing for all items.
        """
        found = np.zeros((items.height, self.width), dtype=np.float32)
        for low in range(0, items.height, _AT_ONCE):
            part = items[low : low + _AT_ONCE]
            inputs, table = _with_rows(self._inputs("item", part), read_rows, self.schema.dim)
            with torch.inference_mode():
                found[low : low + part.height] = self.network.items(inputs.parts(table)).numpy()
        return found

    def user_vectors(self, read_rows: ReadRows, users: pl.DataFrame, visits: Visits) -> NDArray[np.float32]:
        """Returns the vectors (N, W) of users, of unit length; 0 for a user without visits.

        Args:
            read_rows: Reads rows of the table.
            users: One row for each user: `user_columns`.
            visits: Visits of these users; the newest L are read.
        """
        found = np.zeros((users.height, self.width), dtype=np.float32)
        ends = np.cumsum(visits.lengths)
        for low in range(0, users.height, _USERS_AT_ONCE):
            part = slice(low, low + _USERS_AT_ONCE)
            inputs, table = _with_rows(self._inputs("user", users[part]), read_rows, self.schema.dim)
            lengths = np.minimum(visits.lengths[part], self.length)
            if not lengths.any():
                continue
            place = gather(ends[part] - lengths, lengths)
            with torch.inference_mode():
                own = self._users(inputs, table, visits.vectors[place], visits.times[place], lengths, visits.now[part])
            found[part] = np.where(lengths[:, None] > 0, own, 0)
        return found

    def _users(
        self,
        inputs: TowerInputs,
        table: Tensor,
        vectors: NDArray[np.float32],
        times: NDArray[np.int64],
        lengths: NDArray[np.int64],
        now: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        most = int(lengths.max())
        held = np.arange(most) < lengths[:, None]
        visited = np.zeros((*held.shape, self.width), dtype=np.float32)
        visited[held] = vectors
        clock = np.repeat(now[:, None], most + 1, axis=1)
        clock[:, :-1][held] = times
        gaps = gap_buckets(torch.from_numpy(np.diff(clock, axis=1)))
        count = torch.from_numpy(lengths)
        states = self.network.states(torch.from_numpy(visited), gaps, count)
        newest = states[torch.arange(len(count)), (count - 1).clamp(min=0)]
        return np.asarray(self.network.users(newest, inputs.parts(table)).numpy())

    def _inputs(self, of: str, frame: pl.DataFrame) -> TowerInputs:
        return tower_inputs(self.schema, of, frame, self._admission, start=self.start)  # type: ignore[arg-type]


def empty_network(schema: Schema, config: TowerConfig, *, seed: int = 0) -> TowerNetwork:
    """Returns an untrained dense part for a schema."""
    return TowerNetwork(config, tower_reads(schema), schema.history_length, seed=seed)


def _with_rows(inputs: TowerInputs, read_rows: ReadRows, dim: int) -> tuple[TowerInputs, Tensor]:
    """Reads the rows of inputs. Returns the inputs with the rows' places among those read, and the rows (m, D)."""
    numbers = np.unique(
        np.concatenate([np.zeros(0, dtype=np.int64), *(one.rows.reshape(-1) for one in inputs.columns)])
    )
    rows = read_rows(numbers) if len(numbers) else np.zeros((0, dim), dtype=np.float32)
    return inputs.numbered(numbers), torch.from_numpy(np.array(rows, dtype=np.float32))
