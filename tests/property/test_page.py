"""Laws of the page layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from features.errors import StoreError
from serving.store.check import newest_rows
from serving.store.page import (
    PAGE_ROWS,
    chunks,
    decode_seqs,
    decode_vectors,
    encode_rows,
    pack,
    page_count,
    parse_mark,
    row_type,
    table_mark,
    unpack,
)
from serving.store.protocol import MAX_SEQ, NEVER, STORAGES, StoredTable

sizes = st.integers(0, 40)


@given(data=st.data(), count=sizes, dim=st.integers(1, 9))
def test_decode_of_encode_is_the_same_bits(data: st.DataObject, count: int, dim: int) -> None:
    seqs = data.draw(arrays(np.int64, count, elements=st.integers(NEVER, MAX_SEQ)))
    vectors = data.draw(arrays(np.uint32, (count, dim))).view(np.float32)
    table = StoredTable(rows=64, dim=dim)
    rows = encode_rows(table, seqs, vectors)
    assert rows.nbytes == count * (6 + 4 * dim)
    np.testing.assert_array_equal(decode_seqs(rows["seq"]), seqs)
    assert decode_vectors(table, rows["vector"].tobytes()).tobytes() == vectors.tobytes()


@given(seqs=st.lists(st.integers(NEVER, MAX_SEQ), min_size=2, max_size=2))
def test_headers_order_as_their_numbers(seqs: list[int]) -> None:
    low, high = sorted(seqs)
    headers = encode_rows(StoredTable(rows=2, dim=1), np.array([low, high]), np.zeros((2, 1), np.float32))["seq"]
    assert headers[0].tobytes() <= headers[1].tobytes()


@given(data=st.data(), storage=st.sampled_from(["float16", "int8"]), dim=st.integers(1, 9))
def test_narrow_storage_is_as_near_as_its_bits_allow_and_stays_when_kept_again(
    data: st.DataObject, storage: str, dim: int
) -> None:
    table = StoredTable(rows=64, dim=dim, storage=storage)
    vectors = data.draw(arrays(np.float32, (3, dim), elements=st.floats(-1e4, 1e4, width=32)))
    kept = unpack(pack(table, vectors))
    most = np.abs(vectors).max(axis=1, keepdims=True)
    step = np.abs(vectors) * 2.0**-11 + 2.0**-24 if storage == "float16" else np.broadcast_to(most / 254, vectors.shape)
    assert (np.abs(kept - vectors) <= step * 1.001 + 1e-37).all()
    np.testing.assert_allclose(unpack(pack(table, kept)), kept, rtol=1e-6)


def test_bytes_of_a_row() -> None:
    sizes = {name: row_type(StoredTable(rows=64, dim=16, storage=name)).itemsize for name in STORAGES}
    assert sizes == {"float32": 70, "float16": 38, "int8": 26}


def test_a_number_beyond_float16_becomes_its_largest() -> None:
    table = StoredTable(rows=64, dim=2, storage="float16")
    assert unpack(pack(table, np.array([[1e30, -1e30]], dtype=np.float32))).tolist() == [[65504.0, -65504.0]]


@given(rows=st.integers(1, 10**9), dim=st.integers(1, 4096), storage=st.sampled_from(STORAGES))
def test_a_mark_gives_back_its_table_and_pages_cover_it(rows: int, dim: int, storage: str) -> None:
    table = StoredTable(rows=rows, dim=dim, storage=storage)
    assert parse_mark(table_mark(table)) == table
    assert 0 <= page_count(table) * PAGE_ROWS - rows < PAGE_ROWS


@pytest.mark.parametrize("mark", [b"", b"nonsense", b"rows=1 dim=1 storage=int4 page=64"])
def test_a_mark_of_another_layout_is_refused(mark: bytes) -> None:
    with pytest.raises(StoreError, match="layout"):
        parse_mark(mark)


@given(versions=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3))))
def test_newest_rows_equals_writing_one_version_after_another(versions: list[tuple[int, int]]) -> None:
    held: dict[int, int] = {}
    for position, (row, seq) in enumerate(versions):
        if row not in held or seq > versions[held[row]][1]:
            held[row] = position
    rows, seqs = np.array(versions, dtype=np.int64).reshape(-1, 2).T
    assert newest_rows(rows, seqs).tolist() == [held[row] for row in sorted(held)]


@given(count=sizes, size=st.integers(1, 10))
def test_chunks_concatenate_to_the_whole(count: int, size: int) -> None:
    parts = list(chunks(np.arange(count), size))
    assert [value for part in parts for value in part] == list(range(count))
    assert all(0 < len(part) <= size for part in parts)
