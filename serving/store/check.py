"""Checks the arguments of an online store before anything is written, alike in all implementations.

Letters: N rows of one request, R rows of the table, M distinct rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from features.errors import StoreError
from serving.store.protocol import FOLLOWED, MAX_SEQ, Float32, Int64, StoredTable


def check_name(argument: str, name: str) -> None:
    """Refuse a bundle or kind that cannot be part of a key."""
    if not isinstance(name, str) or not name or any(c in "{}" for c in name) or not name.isprintable():
        raise StoreError(f"{argument} must be a non-empty printable string without braces, not {name!r}")


def check_rows(table: StoredTable, rows: Int64) -> None:
    """Refuse rows that are not (N,) int64 in 0..R-1."""
    _check_array("rows", rows, dtype=np.int64, shape=(None,))
    if rows.size and (rows.min() < 0 or rows.max() >= table.rows):
        position = int(np.argmax((rows < 0) | (rows >= table.rows)))
        raise StoreError(
            f"rows[{position}] is {rows[position]}, but the table has rows 0..{table.rows - 1}; "
            "hash with the HashSpec of the same bundle"
        )


def check_write(table: StoredTable, rows: Int64, seqs: Int64, vectors: Float32) -> None:
    """Refuse rows, sequence numbers and vectors that do not fit the table or each other."""
    check_rows(table, rows)
    _check_array("seqs", seqs, dtype=np.int64, shape=(len(rows),))
    if seqs.size:
        check_seq("seqs", int(seqs.min()))
        check_seq("seqs", int(seqs.max()))
    check_vectors(vectors, rows=len(rows), dim=table.dim)


def check_vectors(vectors: Float32, *, rows: int, dim: int) -> None:
    """Refuse vectors that are not (rows, dim) finite float32: one NaN in a table spreads to every score it meets."""
    _check_array("vectors", vectors, dtype=np.float32, shape=(rows, dim))
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        position = int(np.argmin(finite))
        raise StoreError(f"vectors[{position}] holds NaN or infinity; find the step that diverged, and do not store it")


def check_followed(kind: str) -> None:
    """Refuse a kind whose writes are not listed."""
    if kind not in FOLLOWED:
        raise StoreError(f"kind must be one of {', '.join(sorted(FOLLOWED))} to be followed, not {kind!r}")


def check_seq(argument: str, seq: int) -> None:
    """Refuse a sequence number outside 0..MAX_SEQ."""
    if not isinstance(seq, int) or not 0 <= seq <= MAX_SEQ:
        raise StoreError(f"{argument} must be whole numbers in 0..2**48-2, not {seq!r}")


def newest_rows(rows: Int64, seqs: Int64) -> Int64:
    """Positions of the row versions to keep: (M,) int64, one for each distinct row, ascending by row.

    The highest sequence number is kept, of equal ones the first, as if the versions were written one after another.
    """
    order = np.lexsort((-seqs, rows))
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.diff(rows[order]) != 0
    return order[first]


def newest_records(
    ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes]
) -> list[tuple[bytes, int, bytes]]:
    """Check records and keep the newest version of each: (id as UTF-8, seq, payload) in order of first appearance."""
    if not len(ids) == len(seqs) == len(payloads):
        raise StoreError(
            f"ids, seqs and payloads must be equally long, not {len(ids)}, {len(seqs)} and {len(payloads)}"
        )
    newest: dict[bytes, tuple[int, bytes]] = {}
    for name, seq, payload in zip(encode_ids(ids), seqs, payloads, strict=True):
        check_seq("seqs", seq)
        if not isinstance(payload, bytes):
            raise StoreError(f"payloads must be bytes, not {type(payload).__name__}; encode them first")
        if name not in newest or seq > newest[name][0]:
            newest[name] = (seq, payload)
    return [(name, seq, payload) for name, (seq, payload) in newest.items()]


def encode_ids(ids: Sequence[str]) -> list[bytes]:
    """The ids as UTF-8, which a lone surrogate from a JSON escape does not have."""
    if isinstance(ids, str):
        raise StoreError(f"ids must be a sequence of strings, not the one string {ids!r}; put it in a list")
    try:
        return [name.encode() for name in ids]
    except (AttributeError, UnicodeEncodeError) as error:
        raise StoreError(f"ids must be strings that UTF-8 can write: {error}") from error


def not_loaded(bundle: str) -> StoreError:
    """The error for a table that the store does not hold."""
    return StoreError(f"bundle {bundle!r} is not loaded in the online store; call create_table and load_rows first")


def _check_array(argument: str, array: Any, *, dtype: type, shape: tuple[int | None, ...]) -> None:
    wanted = (
        f"a numpy array of {np.dtype(dtype).name} and shape ({', '.join('N' if n is None else str(n) for n in shape)})"
    )
    if not isinstance(array, np.ndarray):
        raise StoreError(f"{argument} must be {wanted}, not {type(array).__name__}")
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or not fits:
        raise StoreError(f"{argument} must be {wanted}, not {array.dtype} and shape {array.shape}")
