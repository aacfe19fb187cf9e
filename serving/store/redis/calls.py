"""Builds the script calls and commands that write, load and read rows.

A call touches one share. Calls are cut out of arrays that are computed once for all calls, since a write to a cluster
has a call for each share.

Shape letters: N rows of one request, R rows of the table.
"""

from collections.abc import Iterator

import numpy as np

from serving.store.page import (
    PAGE_ROWS,
    SEQ_BYTES,
    encode_rows,
    row_type,
    table_mark,
)
from serving.store.protocol import Float32, Int64, StoredTable
from serving.store.redis.commands import Packet
from serving.store.redis.scripts import Call
from serving.store.redis.spread import Spread

_WRITE_ROWS = 1_000  # rows of one script call, during which Redis answers no other client


def gather_call(spread: Spread, table: StoredTable, rows: Int64, *, seqs: bool) -> Call:
    """Returns the call of `gather.lua` that reads the headers of rows (N,) if `seqs` is True, or else the vectors.

    The bundle has one share.
    """
    row_size = row_type(table).itemsize
    skip, size = (0, SEQ_BYTES) if seqs else (SEQ_BYTES, row_size - SEQ_BYTES)
    pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
    # Lua counts from 1, and the first key is the key of the mark.
    offsets = np.stack([index + 2, rows % PAGE_ROWS * row_size + skip], axis=1).astype("<u4").tobytes()
    return [spread.key(0, "table"), *spread.page_keys(pages)], [table_mark(table), size, offsets]


def write_calls(
    spread: Spread, table: StoredTable, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool
) -> Iterator[Call]:
    """Yields calls of `write_rows.lua` for distinct rows (N,), ascending."""
    if not len(rows):
        return
    order, bounds = _by_share(spread, rows // PAGE_ROWS)
    starts = np.concatenate([np.arange(low, high, _WRITE_ROWS) for low, high in bounds])
    rows = rows[order]
    pages = rows // PAGE_ROWS
    data = encode_rows(table, seqs[order], vectors[order])
    first = np.diff(pages, prepend=-1) != 0  # of its page in its call
    first[starts] = True
    key = np.cumsum(first) - 1
    ends = np.append(starts[1:], len(rows))
    index = key - np.repeat(key[starts], ends - starts)
    # Lua counts from 1, and the first key is the key of the mark.
    places = np.stack([index + 2, rows % PAGE_ROWS * data.itemsize], axis=1).astype("<u4")
    keys, mark = spread.page_keys(pages[first]), table_mark(table, spread.shares)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        table_key = spread.key(int(pages[start]) % spread.shares, "table")
        own = keys[int(key[start]) : int(key[end - 1]) + 1]
        sizes = (PAGE_ROWS * data.itemsize, data.itemsize)
        yield [table_key, *own], [mark, *sizes, places[start:end].tobytes(), data[start:end].tobytes(), int(again)]


def load_calls(
    spread: Spread, table: StoredTable, pages: Int64, vectors: Float32, seq: int
) -> Iterator[tuple[Int64, Call]]:
    """Yields the pages (P,) and the call of `load_pages.lua` for each share of consecutive pages.

    Args:
        spread: Shares of the bundle.
        table: Table of the bundle.
        pages: Numbers of the pages, consecutive.
        vectors: (R, D) float32 vectors of the whole table.
        seq: Sequence number of the rows.
    """
    part = vectors[int(pages[0]) * PAGE_ROWS : (int(pages[-1]) + 1) * PAGE_ROWS]
    data = encode_rows(table, np.full(len(part), seq, dtype=np.int64), part)
    size = PAGE_ROWS * data.itemsize
    whole = data.tobytes().ljust(len(pages) * size, b"\0")
    order, bounds = _by_share(spread, pages)
    for low, high in bounds:
        own = pages[order[low:high]]
        cuts = [whole[at * size : (at + 1) * size] for at in order[low:high].tolist()]
        key = spread.key(int(own[0]) % spread.shares, "table")
        yield own, ([key, *spread.page_keys(own)], [table_mark(table, spread.shares), *cuts])


def range_packets(spread: Spread, table: StoredTable, rows: Int64, *, seqs: bool) -> tuple[Int64, list[Packet]]:
    """Returns packets that cut rows (N,) out of their pages, one for each share, and the order (N,) of their replies.

    A packet's first and last reply is the share's mark. Its pages were of this table if both are the table's mark.
    """
    size = row_type(table).itemsize
    skip, wanted = (0, SEQ_BYTES) if seqs else (SEQ_BYTES, size - SEQ_BYTES)
    order, bounds = _by_share(spread, rows // PAGE_ROWS)
    rows = rows[order]
    pages, index = np.unique(rows // PAGE_ROWS, return_inverse=True)
    keys = spread.page_keys(pages)
    offsets = rows % PAGE_ROWS * size + skip
    cuts = [
        ("GETRANGE", keys[page], low, low + wanted - 1)
        for page, low in zip(index.tolist(), offsets.tolist(), strict=True)
    ]
    packets = []
    for low, high in bounds:
        share = int(rows[low]) // PAGE_ROWS % spread.shares
        mark = ("GET", spread.key(share, "table"))
        packets.append(Packet(spread.slot(share), [mark, *cuts[low:high], mark]))
    return order, packets


def page_packets(spread: Spread, pages: Int64) -> tuple[Int64, list[Packet]]:
    """Returns packets that read whole pages (P,), one for each share, and the order (P,) of their replies.

    The reply of a packet is the share's mark and the pages, all of one moment.
    """
    order, bounds = _by_share(spread, pages)
    packets = []
    for low, high in bounds:
        own = pages[order[low:high]]
        share = int(own[0]) % spread.shares
        command = ("MGET", spread.key(share, "table"), *spread.page_keys(own))
        packets.append(Packet(spread.slot(share), [command]))
    return order, packets


def _by_share(spread: Spread, pages: Int64) -> tuple[Int64, list[tuple[int, int]]]:
    """Returns the order (N,) of pages by share, in each share as they were, and the bounds of each present share."""
    shares = pages % spread.shares
    order = np.argsort(shares, kind="stable")
    starts = np.flatnonzero(np.diff(shares[order], prepend=-1)).tolist()
    return order, list(zip(starts, [*starts[1:], len(pages)], strict=True))
