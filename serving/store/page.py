"""The bytes and keys of pages: the one place that knows how a table is laid out in Redis.

A page is one string of `PAGE_ROWS` rows, always at full size. A row is a header of six bytes, seq + 1 in big-endian
order (0: never written), then the vector as the table's storage says, little-endian:

    page p   | row 64 p          | row 64 p + 1      | …
             | seq + 1 |  vector | seq + 1 |  vector | …
    bytes    |    6    |    v    |    6    |    v    | …

where v is 4 D in float32, 2 D in float16, and 4 + D in int8, with the row's scale first.

The storage is part of `table_mark`, so that a reader of another one refuses the table instead of misreading it.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from serving.store.protocol import STORAGES, Float32, Int64, StoredTable

PAGE_ROWS = 64
SEQ_BYTES = 6
_INT8_MOST = 127

Call: TypeAlias = tuple[list[bytes], list[bytes | int]]
"""The keys and the arguments of one script call."""


def table_mark(table: StoredTable) -> bytes:
    """Returns the mark under the table's key: shape and layout, compared on every access."""
    return b"rows=%d dim=%d storage=%s page=%d" % (table.rows, table.dim, table.storage.encode(), PAGE_ROWS)


def parse_mark(mark: bytes) -> StoredTable:
    """The table that a mark describes.

    Raises:
        StoreError: its layout is another version's.
    """
    fields = dict(field.partition(b"=")[::2] for field in mark.split())
    if fields.keys() >= {b"rows", b"dim"} and fields.get(b"storage", b"").decode(errors="replace") in STORAGES:
        table = StoredTable(rows=int(fields[b"rows"]), dim=int(fields[b"dim"]), storage=fields[b"storage"].decode())
        if table_mark(table) == mark:
            return table
    raise StoreError(
        f"the online store's table has the layout {mark.decode(errors='replace')!r}, and this version knows "
        f"storage={'|'.join(STORAGES)} page={PAGE_ROWS}; drop it with the version that wrote it, then load it again"
    )


def page_count(table: StoredTable) -> int:
    """Returns the number of pages; the last may hold rows beyond the table's end, which stay unwritten."""
    return -(-table.rows // PAGE_ROWS)


def page_bytes(table: StoredTable) -> int:
    """The size of a page."""
    return PAGE_ROWS * row_type(table).itemsize


def vector_type(table: StoredTable) -> np.dtype[np.void]:
    """A row's numbers as they are kept: `values` (D,), and in int8 the row's `scale`."""
    kept = {"float32": "<f4", "float16": "<f2", "int8": "i1"}[table.storage]
    scale = [("scale", "<f4")] if table.storage == "int8" else []
    return np.dtype([*scale, ("values", kept, (table.dim,))])


def row_type(table: StoredTable) -> np.dtype[np.void]:
    """One row as a packed structured type: `seq` (6,) uint8 and `vector` of `vector_type`."""
    return np.dtype([("seq", np.uint8, (SEQ_BYTES,)), ("vector", vector_type(table))])


def pack(table: StoredTable, vectors: Float32) -> NDArray[np.void]:
    """Vectors (N, D) as they are kept, (N,) of `vector_type`; what float16 cannot hold becomes its largest number."""
    packed = np.zeros(len(vectors), dtype=vector_type(table))
    if table.storage == "int8":
        packed["scale"] = np.abs(vectors).max(axis=1, initial=0) / _INT8_MOST
        scale = np.where(packed["scale"] > 0, packed["scale"], np.float32(1))
        packed["values"] = np.rint(np.clip(vectors / scale[:, None], -_INT8_MOST, _INT8_MOST))
    elif table.storage == "float16":
        most = np.finfo(np.float16).max
        packed["values"] = np.clip(vectors, -most, most)
    else:
        packed["values"] = vectors
    return packed


def unpack(packed: NDArray[np.void]) -> Float32:
    """Returns stored vectors: (N, D) float32, writable."""
    found: Float32 = packed["values"].astype(np.float32)
    if packed.dtype.names is not None and "scale" in packed.dtype.names:
        found *= packed["scale"][:, None]
    return found


def encode_rows(table: StoredTable, seqs: Int64, vectors: Float32) -> NDArray[np.void]:
    """Lay out (N,) sequence numbers and (N, D) vectors as (N,) rows of `row_type`."""
    rows = np.zeros(len(seqs), dtype=row_type(table))
    rows["seq"] = (seqs + 1).astype(">u8").view(np.uint8).reshape(-1, 8)[:, -SEQ_BYTES:]
    rows["vector"] = pack(table, vectors)
    return rows


def decode_vectors(table: StoredTable, data: bytes) -> Float32:
    """Vectors that were cut out of rows, one after another: (N, D) float32, writable."""
    return unpack(np.frombuffer(data, dtype=vector_type(table)))


def decode_seqs(headers: NDArray[np.uint8]) -> Int64:
    """Headers (N, 6) uint8 as (N,) int64 sequence numbers, -1 where never written."""
    wide = np.zeros((len(headers), 8), dtype=np.uint8)
    wide[:, -SEQ_BYTES:] = headers
    return wide.view(">u8").reshape(-1).astype(np.int64) - 1


def key_of(bundle: str, name: str) -> bytes:
    """The Redis key of a part of a bundle; the braces keep a bundle in one slot of a cluster."""
    return f"tessera:{{{bundle}}}:{name}".encode()


def page_keys(bundle: str, pages: Int64) -> list[bytes]:
    """The keys of pages (N,) int64, in their order."""
    prefix = key_of(bundle, "page:")
    return [b"%b%d" % (prefix, page) for page in pages.tolist()]


def chunks(values: Int64, size: int) -> Iterator[Int64]:
    """`values` in consecutive parts of at most `size`."""
    return (values[start : start + size] for start in range(0, len(values), size))


def gather_call(bundle: str, table: StoredTable, rows: Int64, *, seqs: bool) -> Call:
    """The call of `gather.lua` that reads the headers of rows (N,), or else their vectors."""
    row_size = row_type(table).itemsize
    skip, size = (0, SEQ_BYTES) if seqs else (SEQ_BYTES, row_size - SEQ_BYTES)
    pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
    # Lua counts from 1, and the first key is the mark's.
    places = np.stack([index + 2, rows % PAGE_ROWS * row_size + skip], axis=1).astype("<u4").tobytes()
    return [key_of(bundle, "table"), *page_keys(bundle, pages)], [table_mark(table), size, places]


def write_call(bundle: str, table: StoredTable, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool) -> Call:
    """The call of `write_rows.lua` for distinct rows (N,)."""
    data = encode_rows(table, seqs, vectors)
    pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
    # Lua counts from 1, and the first key is the mark's.
    places = np.stack([index + 2, rows % PAGE_ROWS * data.itemsize], axis=1).astype("<u4").tobytes()
    keys = [key_of(bundle, "table"), *page_keys(bundle, pages)]
    return keys, [table_mark(table), PAGE_ROWS * data.itemsize, data.itemsize, places, data.tobytes(), int(again)]


def load_call(bundle: str, table: StoredTable, pages: Int64, vectors: Float32, seq: int) -> Call:
    """The call of `load_pages.lua` for consecutive pages of the whole table's vectors (R, D)."""
    part = vectors[int(pages[0]) * PAGE_ROWS : (int(pages[-1]) + 1) * PAGE_ROWS]
    data = encode_rows(table, np.full(len(part), seq, dtype=np.int64), part)
    size = PAGE_ROWS * data.itemsize
    whole = data.tobytes().ljust(len(pages) * size, b"\0")
    cuts = [whole[start : start + size] for start in range(0, len(whole), size)]
    return [key_of(bundle, "table"), *page_keys(bundle, pages)], [table_mark(table), *cuts]
