"""Laws of the suffix: identifiers are unique, and an append changes none of them."""

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.errors import DatasetError
from models.semantic_id.suffix import suffixes, with_suffix

Codes = list[tuple[int, int]]
CODES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


def table(codes: Codes, start: int = 0) -> pl.DataFrame:
    ids = [f"i{number}" for number in range(start, start + len(codes))]
    return pl.DataFrame({"item_id": ids, "codes": pl.Series([list(c) for c in codes], dtype=pl.List(pl.UInt16))})


def identifiers(numbered: pl.DataFrame) -> dict[str, tuple[int, ...]]:
    kept = numbered.filter(pl.col("item_id").is_not_null())
    return {row["item_id"]: (*row["codes"], row["suffix"]) for row in kept.iter_rows(named=True)}


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(CODES)
def test_a_suffix_counts_the_earlier_items_of_the_same_codes(codes: Codes) -> None:
    found = suffixes(np.array(codes, dtype=np.uint16))
    assert found.tolist() == [codes[:row].count(codes[row]) for row in range(len(codes))]


@settings(deadline=None)
@given(CODES, CODES, st.sets(st.integers(0, 39)), st.randoms())
def test_an_append_keeps_every_identifier_and_adds_unique_ones(old: Codes, new: Codes, gone: set[int], random) -> None:  # type: ignore[no-untyped-def]
    before = with_suffix(table(old))
    assert len(set(identifiers(before).values())) == len(old)
    left = table(old).filter(~pl.Series([row in gone for row in range(len(old))], dtype=pl.Boolean))
    grown = pl.concat([left, table(new, len(old))]).sample(fraction=1.0, shuffle=True, seed=random.randint(0, 99))
    found, kept = identifiers(with_suffix(grown, before)), identifiers(before)
    for name in left["item_id"]:
        assert found[name] == kept[name]
    # Nor does a newcomer get what an item that is gone had.
    newcomers = {value for name, value in found.items() if name not in kept}
    assert len(newcomers) == len(new)
    assert not newcomers & set(kept.values())


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 12), st.tuples(st.integers(0, 1), st.integers(0, 1))), max_size=6))
def test_over_any_exports_an_identifier_means_one_item(days: list[dict[int, tuple[int, int]]]) -> None:
    owners: dict[tuple[int, ...], str] = {}
    before = None
    for day in days:
        codes = pl.Series([list(code) for code in day.values()], dtype=pl.List(pl.UInt16))
        today = pl.DataFrame({"item_id": pl.Series([f"i{n}" for n in day], dtype=pl.String), "codes": codes})
        before = with_suffix(today, before)
        assert before["item_id"][: today.height].to_list() == today["item_id"].to_list()
        assert before["item_id"][today.height :].null_count() == before.height - today.height
        for name, identifier in identifiers(before).items():
            assert owners.setdefault(identifier, name) == name


def test_the_number_of_an_item_that_left_long_ago_is_not_handed_out_again() -> None:
    first = with_suffix(table([(1, 2), (1, 2)]))
    second = with_suffix(table([(1, 2)]), first)
    third = with_suffix(pl.concat([table([(1, 2)]), table([(1, 2)], 7)]), second)
    assert identifiers(third) == {"i0": (1, 2, 0), "i7": (1, 2, 2)}


def test_an_item_of_other_codes_joins_the_other_group() -> None:
    before = with_suffix(table([(0, 0), (1, 1)]))
    assert identifiers(with_suffix(table([(1, 1), (1, 1)]), before)) == {"i0": (1, 1, 1), "i1": (1, 1, 0)}


def test_items_given_twice_and_codes_of_another_codebook_are_refused() -> None:
    with pytest.raises(DatasetError, match="'i0' is there twice"):
        with_suffix(pl.concat([table([(0, 0)]), table([(1, 1)])]))
    before = with_suffix(table([(0, 0)]))
    wider = pl.DataFrame({"item_id": ["i9"], "codes": pl.Series([[1, 2, 3]], dtype=pl.List(pl.UInt16))})
    with pytest.raises(DatasetError, match="have 2 codes each, these 3"):
        with_suffix(wider, before)
