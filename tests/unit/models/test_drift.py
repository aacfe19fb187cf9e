"""Drift of new items, hits of histories, the shape recommended, and the alarm of a collapsed level."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from models.semantic_id.codebook import residual_kmeans
from models.semantic_id.codebook.quantizer import recommended_shape
from models.semantic_id.codebook.residual_kmeans import ResidualKMeansConfig
from models.semantic_id.report.drift import drift
from models.semantic_id.report.health import codebook_health, collapse_alarm
from models.semantic_id.report.hits import hit_rates

RNG = np.random.default_rng(4)
CENTRES = RNG.normal(size=(8, 6))


def drawn(count: int, share: list[float] | None = None, noise: float = 0.1) -> np.ndarray:
    chosen = RNG.choice(8, count, p=share)
    return (CENTRES[chosen] + noise * RNG.normal(size=(count, 6))).astype(np.float32)


FITTED = drawn(2_000)
BOOK = residual_kmeans.fit(FITTED, ResidualKMeansConfig(levels=2, codes=8))


def test_items_of_the_same_kind_do_not_drift() -> None:
    found = drift(BOOK, FITTED, drawn(200))
    assert found is not None
    assert found.flags == ()
    assert found.p_value > 0.01
    assert all(own < 1.15 * chance for own, chance in zip(found.divergence, found.by_chance, strict=True))


def test_items_that_are_coded_worse_are_flagged_by_their_errors() -> None:
    found = drift(BOOK, FITTED, drawn(200, noise=0.4))
    assert found is not None
    assert "coded worse" in found.flags[0]
    assert found.new[0] > 2 * found.known[0]


def test_items_that_crowd_on_few_codes_are_flagged_by_level() -> None:
    found = drift(BOOK, FITTED, drawn(200, share=[0.9, 0.1, 0, 0, 0, 0, 0, 0]))
    assert found is not None
    assert any("other codes of level 1" in flag for flag in found.flags)
    assert not any("coded worse" in flag for flag in found.flags)


def test_a_few_items_say_nothing() -> None:
    assert drift(BOOK, FITTED, drawn(19)) is None


def test_hits_counted_by_hand() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.uint16)
    coded = np.array([True, True, True, True, False])
    rows = [
        (0, [1, 3], 1, "test"),  # shares both codes with item 1
        (2, [0], 1, "test"),  # shares the first code
        (3, [3, 4], 1, "test"),  # itself and an item without codes: no hit
        (1, [0], 0, "test"),  # no positive
        (4, [0], 1, "test"),  # not coded
        (2, [], 1, "test"),  # no history
        *[(0, [0], 1, "train")] * 3,
    ]
    examples = pl.DataFrame(rows, schema=["item", "history", "label", "split"], orient="row")
    examples = examples.cast({"history": pl.List(pl.UInt32), "item": pl.UInt32})
    frequent, rare = hit_rates(codes, coded, examples)
    assert (frequent.group, frequent.events, frequent.rate) == ("frequent", 1, (1.0, 1.0))
    assert (rare.group, rare.events, rare.rate) == ("rare", 2, (0.5, 0.0))
    # The histories one further: item 0 meets [3, 4], item 2 meets [1, 3], item 3 meets [0].
    assert frequent.by_chance == (0.0, 0.0)
    assert rare.by_chance == (0.5, 0.0)


@pytest.mark.parametrize(
    ("items", "shape"), [(100, (3, 8)), (3_883, (3, 64)), (12_101, (3, 128)), (60_000, (3, 256)), (1_000_000, (4, 256))]
)
def test_shapes_of_some_catalogues(items: int, shape: tuple[int, int]) -> None:
    assert recommended_shape(items) == shape


def test_the_alarm_names_the_level_and_the_remedy() -> None:
    health = codebook_health(BOOK, BOOK.encode(FITTED), {})
    assert collapse_alarm(health) == []
    fallen = replace(health, codes=512, usage=(1.0, 0.25), collapsed=(2,))
    (line,) = collapse_alarm(fallen)
    assert line.startswith("level 2 of 2 collapsed: it uses 25% of its 512 codes; refit with codes = 32")
    assert "sinkhorn" in line
