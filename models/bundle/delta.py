"""The delta: a change of the stream as bytes on the log, and the fold that applies it.

    table at offset n = snapshot ⊕ deltas[..n]

All processes that fold the same deltas get the same bits. A delta carries whole rows in float32 with their optimizer
state, never increments, and a row keeps the highest sequence number it has seen, so replays and repeats change nothing.

Sequence numbers: the published bundle is 0; the stream's n-th micro-batch since then is n. Every micro-batch writes at
least one delta, whose header names its inputs. Batch boundaries change the bits, so a replay of the batches must cut
them at the same messages.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from features.errors import EventError, OversizedError

VERSION = 2
SNAPSHOT_SEQ = 0
# Stores keep a sequence number plus one in six bytes.
_MAX_SEQ = 2**48 - 2
# A message stays well below Kafka's 1 MiB with any table dimension up to 64.
_MAX_ROWS = 2_048
_MAX_RECORDS = 512
DELTA_BYTES = 4 << 20
"""Size of a delta in bytes that `changed_rows` stays below: half of the default limit of a topic."""
# Bytes msgpack adds to a record: the heads of an array, of two texts and of bytes.
_RECORD_HEADS = 16


def record_bytes(limit: int) -> int:
    """Returns the size in bytes that one record may have in deltas of at most `limit` bytes."""
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
    """Inputs of a micro-batch, which its last delta names.

    Attributes:
        times_ms: Times of the messages in the log, Unix milliseconds.
        sources: Ranges of messages that the batch was made of.
        poison: Topic, partition and offset of each message that the step failed on.
    """

    times_ms: Sequence[int] = ()
    sources: Sequence[Source] = ()
    poison: Sequence[tuple[str, int, int]] = ()


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """Part of the change that one micro-batch made in one bundle.

    Attributes:
        version: Version of this format.
        bundle: Id of the bundle whose table changed; a reader of another bundle skips the delta.
        seq: Sequence number of the micro-batch, ≥ 1.
        dim: D.
        rows: (n,) little-endian uint32 row numbers.
        weights: (n, D) little-endian float32.
        accumulators: (n,) little-endian float32 row-wise Adagrad state.
        records: Items and histories that changed.
        times_ms: Times when the messages behind this delta were appended to their topics, for freshness.
        sources: Inputs of the micro-batch, in its last delta.
        poison: Positions (topic, partition, offset) among the inputs at which the step fails and which it skips.
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
        """(n,) int64."""
        return np.frombuffer(self.rows, dtype="<u4").astype(np.int64)

    @property
    def vectors(self) -> NDArray[np.float32]:
        """(n, D) float32."""
        return np.frombuffer(self.weights, dtype="<f4").reshape(-1, self.dim)

    @property
    def states(self) -> NDArray[np.float32]:
        """(n,) float32."""
        return np.frombuffer(self.accumulators, dtype="<f4")


def encode(delta: Delta) -> bytes:
    """Encodes a delta: a msgpack array in the order of the fields."""
    return msgspec.msgpack.encode(delta)


def decode(data: bytes) -> Delta:
    """Decodes a delta.

    Raises:
        EventError: Not a delta, another version, or arrays that do not fit each other.
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
        raise EventError(f"delta: {count} rows of {delta.dim} dimensions, but the arrays are of other sizes")
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
    """Cuts the change of a micro-batch into deltas of one sequence number, each small enough for a message.

    Args:
        rows: (n,) distinct row numbers.
        weight, accumulator: Live table, (R, D) and (R,).
        records: Other changes; they travel in the first deltas.
        trailer: Inputs of the micro-batch; they travel in the last delta, which arrives after all others.
        limit: Size of an encoded delta in bytes. A quarter is for rows, half for records, a quarter for the rest.

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


def encoded_bytes(record: Record) -> int:
    """Returns the size in bytes of a record in a delta, at most a few bytes too many."""
    return len(record.kind) + len(record.id.encode()) + len(record.payload) + _RECORD_HEADS


def _groups(records: Sequence[Record], limit: int) -> list[list[Record]]:
    """Cuts records, in order, into groups of at most `limit` bytes and `_MAX_RECORDS` records."""
    groups: list[list[Record]] = []
    size = 0
    for record in records:
        own = encoded_bytes(record)
        if own > limit:
            raise OversizedError(f"{record.kind} {record.id[:80]!r}: {own} bytes, a delta takes records of {limit}")
        if not groups or size + own > limit or len(groups[-1]) == _MAX_RECORDS:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += own
    return groups


def fold(delta: Delta, weight: Tensor, accumulator: Tensor, seqs: NDArray[np.int64]) -> None:
    """Applies a delta in place to a table (R, D), its optimizer state (R,) and the rows' sequence numbers (R,)."""
    rows = delta.row_numbers
    newer = seqs[rows] < delta.seq
    index = from_numpy(rows[newer])
    weight.index_copy_(0, index, from_numpy(delta.vectors[newer]))
    accumulator.index_copy_(0, index, from_numpy(delta.states[newer]))
    seqs[rows[newer]] = delta.seq
