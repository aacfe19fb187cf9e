"""Laws of the suffix: identifiers are unique, and an append changes none of them."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.error import DatasetError
from models.semantic_id.suffix import suffixes, with_suffix

Codes = list[tuple[int, int]]
CODES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=40)


def table(codes: Codes, start: int = 0) -> pl.DataFrame:
    ids = [f"i{number}" for number in range(start, start + len(codes))]
    return pl.DataFrame({"item_id": ids, "codes": pl.Series([list(c) for c in codes], dtype=pl.List(pl.UInt16))})


def identifiers(numbered: pl.DataFrame) -> dict[str, tuple[int, ...]]:
    return {row["item_id"]: (*row["codes"], row["suffix"]) for row in numbered.iter_rows(named=True)}


@given(CODES)
def test_a_suffix_counts_the_earlier_items_of_the_same_codes(codes: Codes) -> None:
    found = suffixes(np.array(codes, dtype=np.uint16))
    assert found.tolist() == [codes[:row].count(codes[row]) for row in range(len(codes))]


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
