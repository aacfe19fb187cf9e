"""Laws of the position path: a bias that only the place decides, which no order of items at one place depends on."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.device import CPU
from features.frame import Frame
from models.ranker.loading import assembler, examples
from models.ranker.placement import PlacementPath
from models.ranker.train import Trained, predict, train
from models.table.admission import Admission
from models.table.batch import Assembler
from models.table.device.block import of_examples
from models.table.placement import PlacementColumn, placement_cells
from models.table.schema import Schema
from tests.build import SMALL_TRAIN, coloured_frame, coloured_schema

POSITION, SURFACE = (
    PlacementColumn("position", positions=4),
    PlacementColumn("surface", vocabulary=("cart", "home")),
)
COLUMNS = (POSITION, SURFACE)
EXAMINED = np.array([0.9, 0.5, 0.3, 0.1])


def placed_frame(*, confounded: float = 0.7, examined: NDArray[np.float64] = EXAMINED, events: int = 1500) -> Frame:
    """Coloured frame whose labels are clicks: of a liked colour, if the user looked at its position.

    A share of the examples has the item's own position, so that position and item are confounded.
    """
    frame, rng = coloured_frame(events=events), np.random.default_rng(3)
    rows = frame.examples.height
    item = frame.examples["item"].to_numpy()
    position = np.where(rng.random(rows) < confounded, item % 4, rng.integers(0, 4, rows))
    clicked = (frame.examples["label"].to_numpy() > 0) & (rng.random(rows) < examined[position])
    return frame.replace(
        examples=frame.examples.with_columns(
            position=pl.Series(position, dtype=pl.Int32),
            surface=pl.Series(np.where(rng.random(rows) < 0.5, "home", "cart")),
            label=pl.Series(clicked).cast(pl.Int8),
        )
    )


FRAME = placed_frame()
PLAIN = coloured_schema(FRAME)
SCHEMA = replace(PLAIN, placement=COLUMNS)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=6))


def source_of(model: Trained, part: pl.DataFrame, schema: Schema = SCHEMA) -> Assembler:
    return assembler(schema, FRAME, part, Admission(model.sketch, schema.admission))


cells_of_row = st.tuples(st.integers(-3, 9) | st.none(), st.sampled_from(["cart", "home", "new", None]))


@settings(max_examples=50, deadline=None)
@given(st.lists(cells_of_row, min_size=1, max_size=8))
def test_path_equals_a_loop_over_its_terms(rows: list[tuple[int | None, str | None]]) -> None:
    frame = pl.DataFrame(rows, schema={"position": pl.Int64, "surface": pl.String}, orient="row")
    cells = placement_cells(COLUMNS, frame)
    assert cells is not None
    twin = [
        [0 if position is None else min(max(position, 0), 3) + 1, {"cart": 1, "home": 2}.get(surface or "", 0)]
        for position, surface in rows
    ]
    assert cells.tolist() == twin
    path = PlacementPath(COLUMNS)
    weight = torch.arange(len(path.weight)).float() / 8
    path.weight.data.copy_(weight)
    # Five cells of positions, three of surfaces, then a cell for each pair of both.
    expected = [16 * float(weight[p] + weight[5 + s] + weight[8 + 3 * p + s]) for p, s in twin]
    assert path(torch.from_numpy(cells)).tolist() == expected


def test_a_frame_without_places_has_no_cells() -> None:
    assert placement_cells(COLUMNS, pl.DataFrame({"position": [1]})) is None
    assert placement_cells((), pl.DataFrame({"position": [1]})) is None


def test_the_place_adds_the_same_to_every_item_and_user(trained: Trained) -> None:
    part = FRAME.part("test").head(60)
    served = source_of(trained, part.drop("position")).batch(examples(part))
    assert served.placement is None
    ranker, path = trained.ranker, trained.ranker.network.placement
    with torch.no_grad():
        constant = ranker(served)
        for position in range(4):
            at = source_of(trained, part.with_columns(position=pl.lit(position), surface=pl.lit("home")))
            added = ranker(at.batch(examples(part))) - constant
            bias = path(torch.tensor([[position + 1, 2]])) - path.reference
            assert torch.allclose(added, bias.expand(60), atol=1e-5)


def test_examination_is_learnt_apart_from_the_items(trained: Trained) -> None:
    curve = [row["logit"] for row in trained.ranker.network.placement.curves() if row["column"] == "position"]
    assert curve == sorted(curve, reverse=True)  # type: ignore[type-var]
    assert float(curve[0]) - float(curve[3]) > 1.0
    parts = FRAME.part("train")
    rows = source_of(trained, parts).batch(examples(parts))
    assert rows.placement is not None
    with torch.no_grad():
        mean = trained.ranker.network.placement(rows.placement).mean()
    assert float(trained.ranker.network.placement.reference) == pytest.approx(float(mean), abs=1e-4)


def test_training_with_places_is_the_same_twice(trained: Trained) -> None:
    again = train(SCHEMA, FRAME, replace(SMALL_TRAIN, max_epochs=6))
    for name, own in trained.ranker.state_dict().items():
        assert torch.equal(own, again.ranker.state_dict()[name]), name


def test_a_network_without_a_placement_is_as_before() -> None:
    model = train(PLAIN, FRAME, SMALL_TRAIN)
    assert not [name for name in model.ranker.network.state_dict() if "placement" in name]
    part = FRAME.part("test")
    dropped = part.drop("position", "surface")
    with_places = predict(model.ranker, source_of(model, part, PLAIN), examples(part))
    assert np.array_equal(with_places, predict(model.ranker, source_of(model, dropped, PLAIN), examples(dropped)))


def test_a_schema_of_an_earlier_release_has_no_placement() -> None:
    written = PLAIN.to_json()
    del written["placement"]
    assert Schema.from_json(written) == PLAIN
    assert Schema.from_json(SCHEMA.to_json()) == SCHEMA


def test_batches_on_a_device_have_the_same_cells(trained: Trained) -> None:
    part = FRAME.part("test")
    source, rows = source_of(trained, part), examples(part)
    index = np.array([5, 0, 5, 17], dtype=np.int64)
    expected = source.batch(rows.take(index)).placement
    found = of_examples(source, rows, CPU).batch(torch.from_numpy(index)).placement
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)
