"""The bytes and keys of pages: the one place that knows how a table is laid out in Redis.

A page is one string of `PAGE_ROWS` rows, always at full size. A row is a header of six bytes, seq + 1 in big-endian
order (0: never written), then the vector in `STORAGE`, little-endian:

    page p   | row 64 p          | row 64 p + 1      | …
             | seq + 1 |  vector | seq + 1 |  vector | …
    bytes    |    6    |   4 D   |    6    |   4 D   | …

A narrower storage type is a change of `STORAGE` and of the two functions that convert vectors; its name is part of
`table_mark`, so that a reader of another type refuses the table instead of misreading it.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from features.error import StoreError
from serving.store import Float32, Int64, Table

PAGE_ROWS = 64
SEQ_BYTES = 6
STORAGE = np.dtype("<f4")

Call: TypeAlias = tuple[list[bytes], list[bytes | int]]
"""The keys and the arguments of one script call."""


def table_mark(table: Table) -> bytes:
    """What the store keeps under the table's key: shape and layout, compared on every access."""
    return b"rows=%d dim=%d storage=%s page=%d" % (table.rows, table.dim, STORAGE.name.encode(), PAGE_ROWS)


def parse_mark(mark: bytes) -> Table:
    """The table that a mark describes.

    Raises:
        StoreError: its layout is another version's.
    """
    fields = dict(field.partition(b"=")[::2] for field in mark.split())
    if fields.keys() >= {b"rows", b"dim"}:
        table = Table(rows=int(fields[b"rows"]), dim=int(fields[b"dim"]))
        if table_mark(table) == mark:
            return table
    raise StoreError(
        f"the online store's table has the layout {mark.decode(errors='replace')!r}, and this version knows "
        f"storage={STORAGE.name} page={PAGE_ROWS}; drop it with the version that wrote it, then load it again"
    )


def page_count(table: Table) -> int:
    """How many pages a table has; the last may hold rows beyond the table's end, which stay unwritten."""
    return -(-table.rows // PAGE_ROWS)


def row_type(dim: int) -> np.dtype[np.void]:
    """One row as a packed structured type: `seq` (6,) uint8 and `vector` (D,)."""
    return np.dtype([("seq", np.uint8, (SEQ_BYTES,)), ("vector", STORAGE, (dim,))])


def encode_rows(seqs: Int64, vectors: Float32) -> NDArray[np.void]:
    """Lay out (N,) sequence numbers and (N, D) vectors as (N,) rows of `row_type`."""
    rows = np.zeros(len(seqs), dtype=row_type(vectors.shape[1]))
    rows["seq"] = (seqs + 1).astype(">u8").view(np.uint8).reshape(-1, 8)[:, -SEQ_BYTES:]
    rows["vector"] = vectors
    return rows


def decode_vectors(data: bytes, dim: int) -> Float32:
    """Vectors that were cut out of rows, one after another: (N, D) float32, writable."""
    return np.frombuffer(data, dtype=STORAGE).reshape(-1, dim).astype(np.float32)


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


def gather_call(bundle: str, mark: bytes, dim: int, rows: Int64, *, seqs: bool) -> Call:
    """The call of `gather.lua` that reads the headers of rows (N,), or else their vectors."""
    row_size = row_type(dim).itemsize
    skip, size = (0, SEQ_BYTES) if seqs else (SEQ_BYTES, row_size - SEQ_BYTES)
    pages, places = np.divmod(rows, PAGE_ROWS)
    offsets = (places * row_size + skip).astype("<u4").tobytes()
    return [key_of(bundle, "table"), *page_keys(bundle, pages)], [mark, size, offsets]


def write_call(bundle: str, mark: bytes, rows: Int64, seqs: Int64, vectors: Float32) -> Call:
    """The call of `write_rows.lua` for distinct rows (N,)."""
    data = encode_rows(seqs, vectors)
    pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
    # Lua counts from 1, and the first key is the mark's.
    places = np.stack([index + 2, rows % PAGE_ROWS * data.itemsize], axis=1).astype("<u4").tobytes()
    keys = [key_of(bundle, "table"), *page_keys(bundle, pages)]
    return keys, [mark, PAGE_ROWS * data.itemsize, data.itemsize, places, data.tobytes()]


def load_call(bundle: str, mark: bytes, pages: Int64, vectors: Float32, seq: int) -> Call:
    """The call of `load_pages.lua` for consecutive pages of the whole table's vectors (R, D)."""
    part = vectors[int(pages[0]) * PAGE_ROWS : (int(pages[-1]) + 1) * PAGE_ROWS]
    data = encode_rows(np.full(len(part), seq, dtype=np.int64), part)
    size = PAGE_ROWS * data.itemsize
    whole = data.tobytes().ljust(len(pages) * size, b"\0")
    cuts = [whole[start : start + size] for start in range(0, len(whole), size)]
    return [key_of(bundle, "table"), *page_keys(bundle, pages)], [mark, *cuts]
