"""Laws of predictions that are told the place, and of the choice of the position path."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from models.ranker.evaluate import at_places, quality
from models.ranker.reads import choose_path
from models.table.placement import PlacementColumn, place_numbers
from tests.build import SMALL_TRAIN
from tests.unit.models.test_placement import COLUMNS, PLAIN, placed_frame

POSITION = (PlacementColumn("position", positions=4),)
rows = st.lists(st.tuples(st.floats(-6, 6, width=32), st.booleans(), st.integers(0, 4)), min_size=1, max_size=40)


def _rate(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


@settings(max_examples=60, deadline=None)
@given(rows)
def test_each_place_has_the_constant_that_a_root_finder_finds(found: list[tuple[float, bool, int]]) -> None:
    logits, clicked, places = (np.array(column) for column in zip(*found, strict=True))
    labels = clicked.astype(np.float32)
    told = at_places(1 / (1 + np.exp(-logits)), labels, places.astype(np.int64))
    for place in set(places.tolist()):
        own = np.flatnonzero(places == place)

        def slope(constant: float, own: np.ndarray = own) -> float:
            return sum(float(labels[row]) - _rate(logits[row] + constant) for row in own) - constant / 9

        constant = brentq(slope, -60, 60)
        for row in own:
            assert math.isclose(told[row], _rate(logits[row] + constant), rel_tol=1e-5, abs_tol=1e-7)


def test_a_model_that_knows_the_place_gains_nothing() -> None:
    """The order of items at one place decides, however much a model knows about places."""
    rng = np.random.default_rng(0)
    places = rng.integers(0, 4, 20_000)
    relevance, path = rng.normal(0, 1, 20_000), np.array([2.0, 0.5, -1.0, -2.0])
    labels = (rng.random(20_000) < 1 / (1 + np.exp(-(relevance + path[places])))).astype(np.float32)
    blind, knows = (1 / (1 + np.exp(-logits)) for logits in (relevance, relevance + path[places]))
    first, second = quality(labels, blind), quality(labels, knows)
    assert second.auc > first.auc + 0.05  # type: ignore[operator]
    first, second = (quality(labels, at_places(found, labels, places)) for found in (blind, knows))
    assert second.auc == pytest.approx(first.auc, abs=1e-3)
    assert second.log_loss == pytest.approx(first.log_loss, abs=1e-3)


def test_places_are_equal_where_all_cells_are() -> None:
    frame = pl.DataFrame(
        {"position": [0, 9, 3, None, 0, 0], "surface": ["home", "cart", "cart", "home", "new", "home"]}
    )
    found = place_numbers(COLUMNS, frame)
    assert found is not None
    assert found[0] == found[5]
    assert found[1] == found[2]
    assert len(set(found.tolist())) == 4
    assert place_numbers(COLUMNS, frame.drop("surface")) is None


def test_the_path_stays_only_where_users_look_at_positions_differently() -> None:
    """Items lie at their own positions most of the time, so that position and relevance are confounded."""
    config = replace(SMALL_TRAIN, max_epochs=3)
    examined = np.array([0.95, 0.4, 0.1, 0.03])
    steep = placed_frame(examined=examined, events=12_000)
    found = choose_path(replace(PLAIN, placement=POSITION), steep, config)
    assert found.kept
    assert found.gain > 2 * found.error > 0
    assert found.rows == steep.height("validation")
    flat = placed_frame(examined=np.full(4, 0.5), events=12_000)
    assert not choose_path(replace(PLAIN, placement=POSITION), flat, config).kept
