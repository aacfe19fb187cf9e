"""Builds the script calls and commands that write, load and read rows.

A call touches one share. Calls are cut out of arrays that are computed once for all calls, since a write to a cluster
has a call for each share.

Shape letters: N rows of one request, R rows of the table.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

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
_GATHER_ROWS = 4_096  # likewise, about 5 ms


class _Part(NamedTuple):
    """Rows of one call.

    Attributes:
        rows: Positions of the rows in the order of all calls.
        keys: The table's mark in the share, then each page once.
    """

    rows: slice
    keys: list[bytes]


def gather_calls(spread: Spread, table: StoredTable, rows: Int64, *, seqs: bool) -> tuple[Int64, list[Call]]:
    """Returns the calls of `gather.lua` that read the headers of rows (N,) if `seqs` is True, or else the vectors.

    Also returns the order (N,) in which the calls read the rows.
    """
    row_size = row_type(table).itemsize
    skip, size = (0, SEQ_BYTES) if seqs else (SEQ_BYTES, row_size - SEQ_BYTES)
    order, parts, places = _parts(spread, rows, row_size, most=_GATHER_ROWS)
    places[:, 1] += skip
    mark = table_mark(table, spread.shares)
    return order, [(part.keys, [mark, size, places[part.rows].tobytes()]) for part in parts]


def write_calls(
    spread: Spread, table: StoredTable, rows: Int64, seqs: Int64, vectors: Float32, *, again: bool
) -> list[Call]:
    """Returns the calls of `write_rows.lua` for distinct rows (N,)."""
    row_size = row_type(table).itemsize
    order, parts, places = _parts(spread, rows, row_size, most=_WRITE_ROWS)
    data = encode_rows(table, seqs[order], vectors[order])
    mark, sizes = table_mark(table, spread.shares), (PAGE_ROWS * row_size, row_size)
    return [
        (part.keys, [mark, *sizes, places[part.rows].tobytes(), data[part.rows].tobytes(), int(again)])
        for part in parts
    ]


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


def _parts(spread: Spread, rows: Int64, row_size: int, *, most: int) -> tuple[Int64, list[_Part], NDArray[np.uint32]]:
    """Returns the order (N,) of rows by share and page, the rows of each call, and the places of all rows in it.

    The place of a row is the index of its page in the call's keys and its offset in the page, (N, 2). Lua counts from
    1, and the first key is the key of the mark.

    Args:
        spread: Shares of the bundle.
        rows: (N,) rows.
        row_size: Size of a row, bytes.
        most: Largest number of rows of a call.
    """
    pages = rows // PAGE_ROWS
    order = np.lexsort((pages, pages % spread.shares))
    rows, pages = rows[order], pages[order]
    shares = pages % spread.shares
    starts = np.flatnonzero(np.diff(shares, prepend=-1))
    ends = np.append(starts[1:], len(rows))
    if len(rows) > most:
        starts = np.concatenate([np.arange(low, high, most) for low, high in zip(starts, ends, strict=True)])
        ends = np.append(starts[1:], len(rows))
    first = np.diff(pages, prepend=-1) != 0  # of its page in its call
    first[starts] = True
    key = np.cumsum(first) - 1
    places = np.empty((len(rows), 2), dtype="<u4")
    places[:, 0] = key - np.repeat(key[starts], ends - starts) + 2
    places[:, 1] = rows % PAGE_ROWS * row_size
    keys = spread.page_keys(pages[first])
    bounds = zip(starts.tolist(), ends.tolist(), key[starts].tolist(), shares[starts].tolist(), strict=True)
    last = [*key[starts[1:]].tolist(), len(keys)]
    parts = [
        _Part(slice(start, end), [spread.table_keys[share], *keys[low:high]])
        for (start, end, low, share), high in zip(bounds, last, strict=True)
    ]
    return order, parts, places
