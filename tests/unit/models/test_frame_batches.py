"""A plain DataFrame as batches of a unified table, which trains inside another model."""

import doctest

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from features.errors import DatasetError
from models.table import frame_batches
from models.table.frame_batches import FrameBatches, frame_schema
from models.table.reference import ReferenceTable
from models.table.unified import UnifiedTable

SCHEMA = frame_schema({"user": 2, "tags": 1}, rows=64, dim=4)
FRAME = pl.DataFrame({"user": ["a", "b", "a", None], "tags": [["x", "y"], [], ["y"], ["x"]]})


def test_the_examples_in_the_docstrings_hold() -> None:
    failed, tried = doctest.testmod(frame_batches)
    assert (failed, tried > 3) == (0, True)


def test_equal_values_read_equal_rows_and_missing_ones_none() -> None:
    out = ReferenceTable(SCHEMA, learning_rate=0.1)(FrameBatches(SCHEMA, FRAME).batch()).detach()
    assert out.shape == (4, 12)
    assert torch.equal(out[0, :8], out[2, :8])
    assert not out[3, :8].any()
    assert not out[1, 8:].any()
    torch.testing.assert_close(out[0, 8:], (out[2, 8:] + out[3, 8:]) / 2)


def test_numbers_and_their_text_are_one_value() -> None:
    schema = frame_schema({"item": 1}, rows=64, dim=4)
    table = ReferenceTable(schema, learning_rate=0.1)
    found = [
        table(FrameBatches(schema, pl.DataFrame({"item": values})).batch()) for values in ([7], [7.0], ["7"], [[7]])
    ]
    assert all(torch.equal(found[0], other) for other in found)


def test_a_batch_is_its_rows_in_any_order() -> None:
    batches, table = FrameBatches(SCHEMA, FRAME), ReferenceTable(SCHEMA, learning_rate=0.1)
    whole, index = table(batches.batch()), np.array([2, 0, 2])
    torch.testing.assert_close(table(batches.batch(index)), whole[index])


def test_the_table_trains_inside_another_model_and_comes_back_from_its_state_dict() -> None:
    batches = FrameBatches(SCHEMA, FRAME)
    model = nn.Sequential(UnifiedTable(SCHEMA, learning_rate=0.1), nn.Linear(12, 1))
    table = model[0]
    before = table.weight.clone()
    optimizer = torch.optim.Adam(model.parameters())
    model(batches.batch()).sum().backward()
    optimizer.step()
    assert (table.weight != before).any()
    other = nn.Sequential(UnifiedTable(SCHEMA, learning_rate=0.1, seed=9), nn.Linear(12, 1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[0].weight, table.weight)
    assert torch.equal(other[0].accumulator, table.accumulator)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DatasetError, match="no column 'tags'; the columns are: user"):
        FrameBatches(SCHEMA, FRAME.drop("tags"))
