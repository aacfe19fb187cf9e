"""Laws of consumed items: nothing is lost within the bound, records hold the state, and a restored state goes on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import EventError
from features.shown.consumed import (
    FULL,
    HEAD,
    PAGE,
    PAGES,
    ConsumedItems,
    Keys,
    decode_head,
    decode_page,
    page_id,
    page_ids,
    page_user,
)

Batch = list[tuple[int, int]]
IDS = ["ann", "0.ann", "Ж", ""]


@st.composite
def batches_of_events(draw: st.DrawFn) -> list[Batch]:
    """Draws batches that fill a few pages of each user."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(0, 120), max_size=6))
    return [list(zip(rng.integers(0, 4, n).tolist(), rng.integers(0, 99, n).tolist(), strict=True)) for n in sizes]


BATCHES = batches_of_events()


def slowly(batches: list[Batch]) -> dict[int, list[list[int]]]:
    """Returns the pages of each user, the head last, one event at a time."""
    found: dict[int, list[list[int]]] = {}
    for batch in batches:
        heads = {user: set(found.get(user, [[]])[-1]) for user, _ in batch}
        for user, key in batch:
            pages = found.setdefault(user, [[]])
            # An item of the batch or of the head before it is not added again.
            if key in heads[user]:
                continue
            heads[user].add(key)
            pages[-1].append(key)
            if len(pages[-1]) == PAGE:
                pages.append([])
    return found


def advanced(batches: list[Batch], records: dict[tuple[str, str], bytes] | None = None) -> ConsumedItems:
    """Returns the state after batches, and notes the newest record of each kind and id."""
    state = ConsumedItems()
    for batch in batches:
        users, keys = (np.array(column, dtype=np.int64) for column in (zip(*batch, strict=True) if batch else ([], [])))
        changed, filled = state.advance(users, keys.astype(np.uint64))
        for kind, name, payload in state.records(changed, filled, IDS):
            if records is not None:
                records[kind, name] = payload
    return state


def held(records: dict[tuple[str, str], bytes], user: str) -> list[list[int]]:
    """Returns the pages of a user in records, the head last."""
    full, head = decode_head(records[HEAD, user])
    pages: list[Keys] = [decode_page(records[FULL, name]) for name in page_ids(user, full)]
    return [page.tolist() for page in (*pages, head)]


@settings(max_examples=150)
@given(BATCHES)
def test_records_hold_what_the_slow_twin_holds(batches: list[Batch]) -> None:
    records: dict[tuple[str, str], bytes] = {}
    state = advanced(batches, records)
    expected = slowly(batches)
    assert {name for kind, name in records if kind == HEAD} == {IDS[user] for user in expected}
    for user, pages in expected.items():
        assert held(records, IDS[user]) == pages
        assert state.full_pages(user) == len(pages) - 1
    assert {(kind, name): data for kind, name, data in state.all_records(IDS)} == records


@settings(max_examples=100)
@given(BATCHES, BATCHES)
def test_a_restored_state_goes_on_alike(before: list[Batch], after: list[Batch]) -> None:
    state, records = advanced(before), {}
    again = ConsumedItems.restored(state.arrays())
    for one in (state, again):
        for batch in after:
            users = np.array([user for user, _ in batch], dtype=np.int64)
            one.advance(users, np.array([key for _, key in batch], dtype=np.uint64))
        records[id(one)] = list(one.all_records(IDS))
    assert sorted(records[id(state)]) == sorted(records[id(again)])


@settings(max_examples=100)
@given(BATCHES, BATCHES, st.sets(st.integers(0, 5)))
def test_a_forgotten_user_leaves_nothing_and_the_others_stay(
    batches: list[Batch], after: list[Batch], gone: set[int]
) -> None:
    state = advanced(batches)
    left = advanced([[(user, key) for user, key in batch if user not in gone] for batch in batches])
    state.forget(np.array(sorted(gone), dtype=np.int64))
    assert sorted(state.all_records(IDS)) == sorted(left.all_records(IDS))
    assert all(state.full_pages(user) is None for user in gone)
    # A forgotten user begins again without a page.
    for one in (state, left):
        for batch in after:
            users = np.array([user for user, _ in batch], dtype=np.int64)
            one.advance(users, np.array([key for _, key in batch], dtype=np.uint64))
    assert sorted(state.all_records(IDS)) == sorted(left.all_records(IDS))


def test_the_newest_pages_are_kept_under_the_ids_of_older_ones() -> None:
    count = PAGE * (PAGES + 3) + 5
    state, records = ConsumedItems(), {}
    for start in range(0, count, 1_000):
        keys = np.arange(start, min(start + 1_000, count))
        changed, filled = state.advance(np.zeros(len(keys), dtype=np.int64), keys.astype(np.uint64))
        records |= {(kind, name): data for kind, name, data in state.records(changed, filled, ["u"])}
    pages = held(records, "u")
    assert len(records) == PAGES + 1
    assert [key for page in pages for key in page] == list(range(3 * PAGE, count))
    assert {(kind, name): data for kind, name, data in state.all_records(["u"])} == records
    assert len(state.arrays()["consumed_pages"]) == PAGES


def test_ids_of_pages_name_their_user() -> None:
    assert [page_user(page_id(user, PAGES + 7)) for user in IDS] == IDS
    with pytest.raises(EventError, match="expected 8 bytes a key after 8 bytes, got 9 bytes"):
        decode_head(b"123456789")
