"""The vector of one user is that of the slow twin, for every user, any visits and any times."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.table.admission import Sketch
from models.table.schema import Feature
from models.towers.config import TowerConfig
from models.towers.one_user import OneUser
from models.towers.shape import tower_schema
from models.towers.towers import Towers, Visits, empty_network
from tests.build import coloured_dataset
from tests.unit.models.towers.test_towers import LENGTH, walked_frame

START = 7


@pytest.fixture(scope="module")
def made() -> tuple[Towers, pl.DataFrame, np.ndarray]:
    """Towers whose weights are all random, norms and biases too, with their users and the whole table."""
    frame = walked_frame()
    config = TowerConfig(width=16, blocks=2)
    schema = tower_schema(coloured_dataset(), frame, config, dim=4, length=LENGTH)
    # A column of lists, which are pooled by their mean.
    tags = Feature("towers.user.tags", "user", "tags", "towers.user.tags", 1, "mean")
    schema = replace(schema, features=(*schema.features, tags))
    lists = [[f"t{tag}" for tag in range(number % 4)] for number in range(frame.users.height)]
    users = frame.users.with_columns(pl.Series("tags", lists, dtype=pl.List(pl.String)))
    network = empty_network(schema, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    # Half of the values have no sighting, and read no row.
    cells = np.random.default_rng(3).random(Sketch.wide(1 << 10).cells.shape) < 0.85
    sketch = Sketch(cells.astype(np.uint8))
    towers = Towers(schema, config, network, sketch, start=START)
    table = np.random.default_rng(1).normal(size=(START + schema.rows, schema.dim)).astype(np.float32)
    return towers, users, table


visits = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 10**15)), max_size=LENGTH + 4)


@given(visits, st.integers(-5, 10**15), st.integers(0, 59) | st.sampled_from(["u0", "nobody", "日本"]))
def test_one_user_is_the_slow_twin(
    made: tuple[Towers, pl.DataFrame, np.ndarray], seen: list[tuple[int, int]], now: int, user: int | str
) -> None:
    towers, users, table = made
    items = np.random.default_rng(2).normal(size=(10, towers.width)).astype(np.float32)
    items[3] = 0
    ordered = sorted(seen, key=lambda one: one[1])
    vectors = items[[item for item, _ in ordered]].reshape(-1, towers.width)
    times = np.array([time for _, time in ordered], dtype=np.int64)
    frame = users[user] if isinstance(user, int) else pl.DataFrame({"user_id": [user]})
    asked = Visits(vectors, times, np.array([len(times)]), np.array([now]))
    expected = towers.user_vectors(table.__getitem__, frame, asked)[0]
    fast = OneUser(towers, users, table[START:]).vector(user, vectors, times, now)
    np.testing.assert_allclose(fast, expected, rtol=0, atol=1e-6)
