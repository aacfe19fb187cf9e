"""Laws of the hash contract, for any values; its frozen values are in `tests/golden`."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from features.errors import BundleError
from features.hashing import HashSpec, fingerprint

VALUES = st.lists(st.text(max_size=20), min_size=1, max_size=20)
SALTS = st.text(max_size=10)
ROWS = st.integers(1, 2**32 - 1) | st.integers(1, 20)
CHUNKS = st.integers(1, 4)
MASK = 2**64 - 1


def slow_row(salt: str, chunk: int, value: str, rows: int) -> int:
    """The contract once more, in Python's integers, as its docstring says it."""
    x = xxhash.xxh3_64_intdigest(value.encode()) ^ xxhash.xxh3_64_intdigest(f"{salt}\x1f{chunk}".encode())
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    x ^= x >> 31
    return (x >> 32) * rows >> 32


@given(VALUES, SALTS, CHUNKS, ROWS)
def test_rows_are_what_the_contract_says_and_in_range(values: list[str], salt: str, chunks: int, rows: int) -> None:
    found = HashSpec(rows).lookup(salt, chunks, fingerprint(values))
    assert found.shape == (len(values), chunks)
    assert found.dtype == np.int64
    assert ((found >= 0) & (found < rows)).all()
    assert found.tolist() == [[slow_row(salt, chunk, value, rows) for chunk in range(chunks)] for value in values]


@given(VALUES, SALTS, CHUNKS, ROWS)
def test_a_batch_of_values_is_looked_up_as_one_by_one(values: list[str], salt: str, chunks: int, rows: int) -> None:
    spec = HashSpec(rows)
    alone = [spec.lookup(salt, chunks, fingerprint([value])) for value in values]
    np.testing.assert_array_equal(spec.lookup(salt, chunks, fingerprint(values)), np.concatenate(alone))


@given(VALUES, SALTS, CHUNKS, ROWS)
def test_more_chunks_add_lookups_and_change_none(values: list[str], salt: str, chunks: int, rows: int) -> None:
    spec, prints = HashSpec(rows), fingerprint(values)
    wider = spec.lookup(salt, chunks + 1, prints)
    np.testing.assert_array_equal(wider[:, :chunks], spec.lookup(salt, chunks, prints))


def test_no_values_have_no_rows() -> None:
    assert HashSpec(7).lookup("a", 3, fingerprint([])).shape == (0, 3)


def test_salts_and_chunks_read_different_rows() -> None:
    prints = fingerprint([f"value {number}" for number in range(2_000)])
    spec = HashSpec(1_000_000)
    looked_up = [spec.lookup(salt, 2, prints)[:, chunk] for salt in ("item.genre", "user.age") for chunk in (0, 1)]
    for first in range(4):
        for second in range(first):
            assert (looked_up[first] == looked_up[second]).mean() < 0.005


@pytest.mark.parametrize("rows", [64, 100, 1_000])
def test_rows_are_drawn_evenly(rows: int) -> None:
    seeded = np.random.default_rng(7).integers(0, 2**60, 50 * rows)
    # Both kinds of values that catalogues have: consecutive numbers and strings without order.
    for values in ([str(number) for number in range(50 * rows)], [f"{number:x}" for number in seeded]):
        for chunk in HashSpec(rows).lookup("item_id", 2, fingerprint(values)).T:
            counts = np.bincount(chunk, minlength=rows)
            chi_square = ((counts - 50) ** 2 / 50).sum()
            # Mean rows - 1, variance 2 (rows - 1): five deviations.
            assert abs(chi_square - (rows - 1)) < 5 * np.sqrt(2 * (rows - 1))


@pytest.mark.parametrize("rows", [0, -1, 2**32])
def test_a_table_of_no_or_too_many_rows_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match=f"rows: expected .* got {rows}"):
        HashSpec(rows)


def test_another_version_of_the_contract_is_refused() -> None:
    with pytest.raises(BundleError, match="version 2"):
        HashSpec(10, version=2)
