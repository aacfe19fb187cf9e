"""Checks the arguments of an online store before a write. All implementations use the same checks.

Shape letters: N rows of one request, R rows of the table, M distinct rows.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from features.errors import StoreError
from serving.store.protocol import FOLLOWED, MAX_SEQ, Float32, Int64, StoredTable


def check_name(argument: str, name: str) -> None:
    """Raises StoreError if the name of a bundle or kind cannot be part of a key."""
    if not isinstance(name, str) or not name or any(c in "{}" for c in name) or not name.isprintable():
        raise StoreError(f"{argument} must be a non-empty printable string without braces, not {name!r}")


def check_rows(table: StoredTable, rows: Int64) -> None:
    """Raises StoreError unless rows are (N,) int64 in 0..R-1."""
    _check_array("rows", rows, dtype=np.int64, shape=(None,))
    if rows.size and (rows.min() < 0 or rows.max() >= table.rows):
        position = int(np.argmax((rows < 0) | (rows >= table.rows)))
        raise StoreError(
            f"rows[{position}] is {rows[position]}, but the table has rows 0..{table.rows - 1}; "
            "hash with the HashSpec of the same bundle"
        )


def check_write(table: StoredTable, rows: Int64, seqs: Int64, vectors: Float32) -> None:
    """Raises StoreError unless rows, sequence numbers and vectors fit the table and each other."""
    check_rows(table, rows)
    _check_array("seqs", seqs, dtype=np.int64, shape=(len(rows),))
    if seqs.size:
        check_seq("seqs", int(seqs.min()))
        check_seq("seqs", int(seqs.max()))
    check_vectors(vectors, rows=len(rows), dim=table.dim)


def check_vectors(vectors: Float32, *, rows: int, dim: int) -> None:
    """Raises StoreError unless vectors are (rows, dim) finite float32. A NaN in a table would spread to many scores."""
    _check_array("vectors", vectors, dtype=np.float32, shape=(rows, dim))
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        position = int(np.argmin(finite))
        raise StoreError(f"vectors[{position}] holds NaN or infinity; find the step that diverged, and do not store it")


def check_followed(kind: str) -> None:
    """Raises StoreError if the store does not list the writes of a kind for followers."""
    if kind not in FOLLOWED:
        raise StoreError(f"kind must be one of {', '.join(sorted(FOLLOWED))} to be followed, not {kind!r}")


def check_seq(argument: str, seq: int) -> None:
    """Raises StoreError if a sequence number is outside 0..MAX_SEQ."""
    if not isinstance(seq, int) or not 0 <= seq <= MAX_SEQ:
        raise StoreError(f"{argument} must be whole numbers in 0..2**48-2, not {seq!r}")


def newest_rows(rows: Int64, seqs: Int64) -> Int64:
    """Returns the positions of the newest versions of rows, (M,) int64, ascending by row.

    The newest version has the highest sequence number. Among equal numbers the first version counts, as if the versions
    were written one after another.
    """
    order = np.lexsort((-seqs, rows))
    first = np.ones(len(order), dtype=bool)
    first[1:] = np.diff(rows[order]) != 0
    return order[first]


def newest_records(
    ids: Sequence[str], seqs: Sequence[int], payloads: Sequence[bytes]
) -> list[tuple[bytes, int, bytes]]:
    """Checks records and returns the newest version of each, in order of first appearance.

    Returns:
        Id as UTF-8, sequence number and payload of each record.

    Raises:
        StoreError: The lists differ in length, or a value has a wrong type.
    """
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
    """Encodes ids as UTF-8.

    Raises:
        StoreError: An id is not a string, or has a lone surrogate, such as from a JSON escape.
    """
    if isinstance(ids, str):
        raise StoreError(f"ids must be a sequence of strings, not the string {ids!r}; put the string in a list")
    try:
        return [name.encode() for name in ids]
    except (AttributeError, UnicodeEncodeError) as error:
        raise StoreError(f"ids must be strings that UTF-8 can write: {error}") from error


def not_loaded(bundle: str) -> StoreError:
    """Returns the error for a bundle that is not in the store."""
    return StoreError(f"bundle {bundle!r} is not loaded in the online store; call create_table and load_rows first")


def _check_array(argument: str, array: Any, *, dtype: type, shape: tuple[int | None, ...]) -> None:
    expected = (
        f"a numpy array of {np.dtype(dtype).name} and shape ({', '.join('N' if n is None else str(n) for n in shape)})"
    )
    if not isinstance(array, np.ndarray):
        raise StoreError(f"{argument} must be {expected}, not {type(array).__name__}")
    fits = array.ndim == len(shape) and all(n is None or n == m for n, m in zip(shape, array.shape, strict=False))
    if array.dtype != dtype or not fits:
        raise StoreError(f"{argument} must be {expected}, not {array.dtype} and shape {array.shape}")
