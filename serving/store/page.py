"""The bytes and keys of pages. This module alone defines the layout of a table in Redis.

A page is a string of `PAGE_ROWS` rows, always at full size. A row has a header of six bytes, then the vector. The
header is seq + 1 in big-endian order, and 0 if the row was never written. The vector is little-endian in the table's
storage:

    page p   | row 64 p          | row 64 p + 1      | …
             | seq + 1 |  vector | seq + 1 |  vector | …
    bytes    |    6    |    v    |    6    |    v    | …

Here v is 4 D in float32, 2 D in float16, and 4 + D in int8, with the row's scale first.

The storage is part of `table_mark`, so that a reader with another storage refuses the table instead of misreading it.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from features.errors import StoreError
from serving.store.protocol import STORAGES, Float32, Int64, StoredTable

PAGE_ROWS = 64
SEQ_BYTES = 6
_INT8_MOST = 127


def table_mark(table: StoredTable, shares: int = 1) -> bytes:
    """Returns the value of the table's key. It names shape and layout, and every access compares it.

    Args:
        table: The table.
        shares: Number of shares of the bundle; see `serving.store.redis.spread`.
    """
    mark = b"rows=%d dim=%d storage=%s page=%d" % (table.rows, table.dim, table.storage.encode(), PAGE_ROWS)
    return mark if shares == 1 else b"%b shares=%d" % (mark, shares)


def parse_mark(mark: bytes, shares: int = 1) -> StoredTable:
    """Returns the table that a mark describes.

    Args:
        mark: The mark.
        shares: Number of shares of the bundle.

    Raises:
        StoreError: Another version of Tessera wrote the table, with another layout.
    """
    fields = dict(field.partition(b"=")[::2] for field in mark.split())
    if fields.keys() >= {b"rows", b"dim"} and fields.get(b"storage", b"").decode(errors="replace") in STORAGES:
        table = StoredTable(rows=int(fields[b"rows"]), dim=int(fields[b"dim"]), storage=fields[b"storage"].decode())
        if table_mark(table, shares) == mark:
            return table
    known = f"storage={'|'.join(STORAGES)} page={PAGE_ROWS}" + (f" shares={shares}" if shares > 1 else "")
    raise StoreError(
        f"the online store's table has the layout {mark.decode(errors='replace')!r}, and this version knows {known}; "
        "drop it with the version that wrote it, then load it again"
    )


def page_count(table: StoredTable) -> int:
    """Returns the number of pages. Rows of the last page beyond the table's end are never written."""
    return -(-table.rows // PAGE_ROWS)


def page_bytes(table: StoredTable) -> int:
    """Returns the size of a page, bytes."""
    return PAGE_ROWS * row_type(table).itemsize


def vector_type(table: StoredTable) -> np.dtype[np.void]:
    """Returns the type of a stored vector: `values` (D,), and in int8 the row's `scale`."""
    number = {"float32": "<f4", "float16": "<f2", "int8": "i1"}[table.storage]
    scale = [("scale", "<f4")] if table.storage == "int8" else []
    return np.dtype([*scale, ("values", number, (table.dim,))])


def row_type(table: StoredTable) -> np.dtype[np.void]:
    """Returns the packed type of a stored row: `seq` (6,) uint8 and `vector` of `vector_type`."""
    return np.dtype([("seq", np.uint8, (SEQ_BYTES,)), ("vector", vector_type(table))])


def pack(table: StoredTable, vectors: Float32) -> NDArray[np.void]:
    """Converts vectors (N, D) to stored vectors, (N,) of `vector_type`.

    Numbers beyond the range of float16 become its largest number.
    """
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
    """Converts stored vectors to (N, D) float32, writable."""
    vectors: Float32 = packed["values"].astype(np.float32)
    if packed.dtype.names is not None and "scale" in packed.dtype.names:
        vectors *= packed["scale"][:, None]
    return vectors


def encode_rows(table: StoredTable, seqs: Int64, vectors: Float32) -> NDArray[np.void]:
    """Encodes sequence numbers (N,) and vectors (N, D) as rows (N,) of `row_type`."""
    rows = np.zeros(len(seqs), dtype=row_type(table))
    rows["seq"] = (seqs + 1).astype(">u8").view(np.uint8).reshape(-1, 8)[:, -SEQ_BYTES:]
    rows["vector"] = pack(table, vectors)
    return rows


def decode_vectors(table: StoredTable, data: bytes) -> Float32:
    """Decodes consecutive stored vectors, which were cut out of rows, to (N, D) float32, writable."""
    return unpack(np.frombuffer(data, dtype=vector_type(table)))


def decode_seqs(headers: NDArray[np.uint8]) -> Int64:
    """Decodes headers (N, 6) uint8 to sequence numbers (N,) int64, -1 for rows that were never written."""
    wide = np.zeros((len(headers), 8), dtype=np.uint8)
    wide[:, -SEQ_BYTES:] = headers
    return wide.view(">u8").reshape(-1).astype(np.int64) - 1


def key_of(bundle: str, name: str) -> bytes:
    """Returns the Redis key of a part of a bundle's home. The braces keep the home in one slot of a cluster."""
    return f"tessera:{{{bundle}}}:{name}".encode()


def chunks(values: Int64, size: int) -> Iterator[Int64]:
    """Cuts values into consecutive parts of at most `size` values."""
    return (values[start : start + size] for start in range(0, len(values), size))
