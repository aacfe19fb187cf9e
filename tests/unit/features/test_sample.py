"""The sample of a fit is a function of the catalogue's ids alone, and a small catalogue is its own sample."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from features.hashing import fingerprint
from features.jobs import sample
from features.jobs.sample import sample_rows, take_rows

IDS = pl.Series([f"SKU-{number}" for number in range(200)])
MOST = 40


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_ITEMS", MOST)
    monkeypatch.setattr(sample, "_BLOCK", 7)


def chosen(ids: pl.Series) -> set[str]:
    rows = sample_rows(ids)
    assert (np.diff(rows) > 0).all()
    return set(ids[rows])


def test_a_catalogue_up_to_the_bound_is_its_own_sample_in_its_order(small: None) -> None:
    for count in (0, 1, MOST):
        np.testing.assert_array_equal(sample_rows(IDS.head(count)), np.arange(count))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(3))
def test_the_sample_does_not_depend_on_the_order_of_the_rows(seed: int) -> None:
    found = chosen(IDS)
    assert len(found) == MOST
    assert chosen(IDS.shuffle(seed)) == found
    assert chosen(IDS.reverse()) == found


def test_an_append_only_displaces_items(small: None) -> None:
    before, after = chosen(IDS.head(150)), chosen(IDS)
    assert after - before <= set(IDS[150:])
    # One in four items is new, and so is about one in four of the sample.
    assert 0.1 < len(after - before) / MOST < 0.45


def test_the_sample_is_the_same_in_every_release(small: None) -> None:
    assert sorted(chosen(IDS))[:5] == ["SKU-10", "SKU-100", "SKU-103", "SKU-113", "SKU-114"]


def test_equal_hashes_are_told_apart_by_the_id(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(values: list[str]) -> NDArray[np.uint64]:
        return fingerprint(values) % np.uint64(3)

    monkeypatch.setattr(sample, "fingerprint", coarse)
    found = chosen(IDS)
    assert len(found) == MOST
    assert chosen(IDS.shuffle(1)) == found


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.data())
def test_rows_of_shards_are_the_rows_of_the_whole(heights: list[int], data: st.DataObject) -> None:
    whole = pl.DataFrame({"number": range(sum(heights)), "text": [f"t{number}" for number in range(sum(heights))]})
    ends = np.cumsum(heights)
    frames = [whole.slice(end - height, height) for height, end in zip(heights, ends, strict=True)]
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, whole.height - 1)) if whole.height else st.just(set()))))
    rows = rows.astype(np.int64)
    assert take_rows(iter(frames), rows).equals(whole[rows])
