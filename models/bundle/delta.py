"""The delta: a change of the stream as bytes on the log, and the fold that applies a delta to a table.

    table at offset n = snapshot ⊕ deltas[..n]

All processes that fold the same deltas get the same bits. A delta has whole rows in float32 with their optimizer state,
never increments. A row keeps the highest sequence number that was applied, so replays and repeats change nothing.

Sequence numbers: the published bundle has 0, and the stream's n-th micro-batch since then has n. Every micro-batch
writes at least one delta, and its last delta names the inputs. Batch boundaries change the bits, so a replay must cut
the batches at the same messages.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from features.errors import EventError, OversizedError

VERSION = 2
SNAPSHOT_SEQ = 0
# Stores keep a sequence number plus 1 in six bytes.
_MAX_SEQ = 2**48 - 2
# With this limit a message is far below Kafka's 1 MiB for each table dimension up to 64.
_MAX_ROWS = 2_048
_MAX_RECORDS = 512
DELTA_BYTES = 4 << 20
"""Largest size of a delta of `changed_rows`, bytes. Half of the default limit of a topic."""
# Number of bytes that msgpack adds to a record: the heads of an array, of two texts and of bytes.
_RECORD_HEADS = 16


def record_bytes(limit: int) -> int:
    """Returns the largest size of a record, in bytes, in deltas of at most `limit` bytes."""
    return limit // 2


class Record(msgspec.Struct, frozen=True, array_like=True):
    """Record that replaces the record of the same kind and id: an item, or a user's history."""

    kind: str
    id: str
    payload: bytes


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Messages `first` to `last`, both included, of one partition of an input topic."""

    topic: str
    partition: int
    first: int
    last: int


class Trailer(msgspec.Struct, frozen=True):
    """Inputs of a micro-batch. The batch's last delta has the trailer.

    Attributes:
        times_ms: Times of the messages in the log, Unix milliseconds.
        sources: Ranges of the messages of the batch.
        poison: Topic, partition and offset of each message that the step failed on.
    """

    times_ms: Sequence[int] = ()
    sources: Sequence[Source] = ()
    poison: Sequence[tuple[str, int, int]] = ()


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """Change of one micro-batch in one bundle, or a part of a large change.

    Attributes:
        version: Version of this format.
        bundle: Id of the bundle whose table changed. Readers of other bundles skip the delta.
        seq: Sequence number of the micro-batch, ≥ 1.
        dim: Dimension D of a row.
        rows: (n,) little-endian uint32 row numbers.
        weights: (n, D) little-endian float32.
        accumulators: (n,) little-endian float32 row-wise Adagrad state.
        records: Changed items and histories, and admitted keys.
        times_ms: Append times of the batch's messages, Unix milliseconds, to measure freshness. Only in the last delta.
        sources: Inputs of the micro-batch. Only in the last delta.
        poison: Topic, partition and offset of the inputs that the step must skip. Only in the last delta.
    """

    version: int
    bundle: str
    seq: int
    dim: int
    rows: bytes
    weights: bytes
    accumulators: bytes
    records: list[Record]
    times_ms: list[int]
    sources: list[Source] = []
    poison: list[tuple[str, int, int]] = []

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """Row numbers, (n,) int64."""
        return np.frombuffer(self.rows, dtype="<u4").astype(np.int64)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """Vectors of the rows, (n, D) float32."""
        return np.frombuffer(self.weights, dtype="<f4").reshape(-1, self.dim)

    @property
    def states(self) -> NDArray[np.float32]:
        """Optimizer states of the rows, (n,) float32."""
        return np.frombuffer(self.accumulators, dtype="<f4")


def encode(delta: Delta) -> bytes:
    """Encodes a delta: a msgpack array in the order of the fields."""
    return msgspec.msgpack.encode(delta)


def decode(data: bytes) -> Delta:
    """Decodes a delta.

    Raises:
        EventError: The bytes are no delta, the version is unknown, or the sizes of the arrays differ.
    """
    try:
        delta = msgspec.msgpack.decode(data, type=Delta)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"delta: {error}") from error
    if delta.version not in (1, VERSION):
        raise EventError(f"delta: version {delta.version}, this release reads 1 to {VERSION}", cause="unknown-version")
    if delta.dim < 1 or not SNAPSHOT_SEQ < delta.seq <= _MAX_SEQ:
        raise EventError(f"delta: expected dim >= 1 and 1 <= seq <= {_MAX_SEQ}, got dim {delta.dim}, seq {delta.seq}")
    count = len(delta.rows) // 4
    if (len(delta.rows), len(delta.accumulators), len(delta.weights)) != (4 * count, 4 * count, 4 * count * delta.dim):
        raise EventError(f"delta: {count} rows of {delta.dim} dimensions, but the arrays have other sizes")
    return delta


def changed_rows(
    bundle: str,
    seq: int,
    rows: NDArray[np.int64],
    weight: Tensor,
    accumulator: Tensor,
    *,
    records: Sequence[Record],
    trailer: Trailer = Trailer(),  # noqa: B008 - frozen
    limit: int = DELTA_BYTES,
) -> Iterator[Delta]:
    """Cuts the change of a micro-batch into deltas that are small enough for a message.

    All deltas have the same sequence number.

    Args:
        bundle: Id of the bundle.
        seq: Sequence number of the micro-batch.
        rows: (n,) distinct numbers of the changed rows.
        weight, accumulator: Table after the change, (R, D) and (R,).
        records: Changed records. The first deltas contain them.
        trailer: Inputs of the micro-batch. The last delta contains them, and arrives after all other deltas.
        limit: Largest size of an encoded delta, bytes. Rows get a quarter, records half, everything else a quarter.

    Raises:
        OversizedError: A record is larger than `record_bytes(limit)`.
    """
    dim = weight.shape[1]
    height = max(1, min(_MAX_ROWS, limit // 4 // (4 * dim + 8)))
    parts = [rows[start : start + height] for start in range(0, max(len(rows), 1), height)]
    groups = _groups(records, record_bytes(limit))
    total = max(len(parts), len(groups))
    for number in range(total):
        part = parts[number] if number < len(parts) else rows[:0]
        index = from_numpy(part)
        yield Delta(
            version=VERSION,
            bundle=bundle,
            seq=seq,
            dim=dim,
            rows=part.astype("<u4").tobytes(),
            weights=weight[index].numpy().astype("<f4").tobytes(),
            accumulators=accumulator[index].numpy().astype("<f4").tobytes(),
            records=groups[number] if number < len(groups) else [],
            times_ms=list(trailer.times_ms) if number == total - 1 else [],
            sources=list(trailer.sources) if number == total - 1 else [],
            poison=list(trailer.poison) if number == total - 1 else [],
        )


def shifted(delta: Delta, low: int) -> Delta:
    """Returns a delta whose row numbers are higher by `low`, for a table that begins with row `low`."""
    return delta if not low else msgspec.structs.replace(delta, rows=(delta.row_numbers + low).astype("<u4").tobytes())


def encoded_bytes(record: Record) -> int:
    """Returns the size of a record in a delta, bytes. The result is at most a few bytes too large."""
    return len(record.kind) + len(record.id.encode()) + len(record.payload) + _RECORD_HEADS


def _groups(records: Sequence[Record], limit: int) -> list[list[Record]]:
    """Cuts records, in order, into groups of at most `limit` bytes and `_MAX_RECORDS` records."""
    groups: list[list[Record]] = []
    size = 0
    for record in records:
        added = encoded_bytes(record)
        if added > limit:
            raise OversizedError(
                f"{record.kind} {record.id[:80]!r}: {added} bytes, a record of a delta may have at most {limit}"
            )
        if not groups or size + added > limit or len(groups[-1]) == _MAX_RECORDS:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += added
    return groups


def fold(delta: Delta, weight: Tensor, accumulator: Tensor, seqs: NDArray[np.int64], *, low: int = 0) -> None:
    """Applies a delta in place to a table (R, D), its optimizer state (R,) and the rows' sequence numbers (R,).

    Args:
        delta: The delta. All its rows are in the table.
        weight, accumulator, seqs: The table, or its rows from `low` on.
        low: Number of the first row of `weight`.
    """
    rows = delta.row_numbers - low
    newer = seqs[rows] < delta.seq
    index = from_numpy(rows[newer])
    weight.index_copy_(0, index, from_numpy(delta.vectors[newer]))
    accumulator.index_copy_(0, index, from_numpy(delta.states[newer]))
    seqs[rows[newer]] = delta.seq
