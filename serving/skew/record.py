"""The record of one sampled answer: the values, rows and scores of a server, as bytes on the log.

A record holds a digest of each row and of each content vector in place of the numbers, so its size follows the lookups
and not the table's dimension.

Shape letters: n candidates, M distinct rows, D dimension, K lookups, N numeric features.
"""

from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from features.errors import EventError
from features.hashing import splitmix64
from models.bundle.scorer import Lookups
from models.table.batch import Batch
from serving.ranking.inputs import RankingInputs
from serving.retrieval.fusion import source_of
from streaming.log.protocol import Offsets, offset_in

VERSION, OLDEST_VERSION = 2, 1
_NO_LABELS = torch.zeros(0)
Digests = NDArray[np.uint64]


class SkewBatch(msgspec.Struct, frozen=True, array_like=True):
    """Lookups of a part of the features: those that all candidates share, or those of each candidate.

    Attributes:
        values: (V,) little-endian uint32 positions in the record's `rows`, lookup after lookup.
        lengths: (K · B,) little-endian uint32 number of values per lookup and example.
        scale: (B, K) little-endian float32, 1 / count where a feature is pooled by its mean.
    """

    values: bytes
    lengths: bytes
    scale: bytes


class SkewRecord(msgspec.Struct, frozen=True, array_like=True):
    """Inputs and scores of one sampled answer.

    A new field must have a default with the meaning of a record without the field.

    Attributes:
        version: Version of this format.
        id: Id of the request, which its impression has too.
        time_ms: Time of the answer, milliseconds since 1970.
        bundle: Id of the bundle that answered.
        user: Id of the user.
        candidates: Ids of the n candidates.
        context: Context of the request, by column, with defaults.
        at: Time that the request asked for, microseconds since 1970. None if it asked for none.
        now_us: Time that expressions over the clock read, microseconds since 1970.
        retrieved: True if retrieval chose the candidates.
        known_user: False if neither the bundle nor the stream knows the user.
        stale: True if the store did not answer, so that rows or history may be old.
        source: Source of the rows, `mirror` or `store`.
        storage: Format of the rows in the store.
        position: First offset of the deltas' topic that the server may have lacked; a list with the offset of each
            partition if there are several.
        history: Ids of the visited items that the ranking read, oldest first.
        rows: (M,) little-endian uint32 rows of the table.
        digests: (M,) little-endian uint64 digests of the rows' vectors.
        shared: Lookups that all candidates share.
        own: Lookups of each candidate.
        numeric: (n, N) little-endian float32 numeric features.
        content: (n,) little-endian uint64 digests of the content vectors. Empty if the network reads none.
        scores: (n,) little-endian float32 probabilities.
        fields: (n,) values of each field of the candidates, by name, as served.
        labelled: Ids of the user's labelled items that the ranking read, oldest first. Empty without a correction.
        labels: Label of each labelled item, a byte 0 or 1.
        shared_unread: (features,) uint8 number of values without a row, at most 255, by feature that all candidates
            share. Empty if every value has a row. None in records of version 1, which do not say.
        own_unread: (n, features) uint8, the same by candidate.
        sources: Source of each of the n candidates: `towers`, `content`, `both` or `popular`. Empty if the request gave
            the candidates, and in records of earlier releases.
    """

    version: int
    id: str
    time_ms: int
    bundle: str
    user: str
    candidates: list[str]
    context: dict[str, Any]
    at: int | None
    now_us: int
    retrieved: bool
    known_user: bool
    stale: bool
    source: str
    storage: str
    position: int | list[int]
    history: list[str]
    rows: bytes
    digests: bytes
    shared: SkewBatch
    own: SkewBatch
    numeric: bytes
    content: bytes
    scores: bytes
    fields: dict[str, list[Any]] = {}
    labelled: list[str] = []
    labels: bytes = b""
    shared_unread: bytes | None = None
    own_unread: bytes | None = None
    sources: list[str] = []

    @property
    def positions(self) -> Offsets:
        """First offset in each partition of the deltas' topic that the server may have lacked."""
        return tuple(self.position) if isinstance(self.position, list) else (self.position,)

    @property
    def row_numbers(self) -> NDArray[np.int64]:
        """Rows of the table, (M,) int64."""
        return np.frombuffer(self.rows, dtype="<u4").astype(np.int64)

    @property
    def row_digests(self) -> Digests:
        """Digests of the rows' vectors, (M,) uint64."""
        return np.frombuffer(self.digests, dtype="<u8").astype(np.uint64)

    @property
    def content_digests(self) -> Digests:
        """Digests of the content vectors, (n,) uint64, or (0,) if the network reads none."""
        return np.frombuffer(self.content, dtype="<u8").astype(np.uint64)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Scores of the candidates, (n,) float32."""
        return np.frombuffer(self.scores, dtype="<f4").astype(np.float32)

    def numbers(self) -> NDArray[np.float32]:
        """Returns the numeric features, (n, N) float32."""
        return np.frombuffer(self.numeric, dtype="<f4").astype(np.float32).reshape(len(self.candidates), -1)

    def lookups(self, *, visits: int | None, content: torch.Tensor | None) -> Lookups:
        """Returns the lookups as the server had them.

        Args:
            visits: Number of visited items that the network attends to. None if the schema has no attention.
            content: (n, width) content vectors. None if the network reads none.
        """
        numeric = torch.from_numpy(self.numbers())
        first = None if content is None else content[:1]
        shared = _decoded(self.shared, numeric[:1], visits, first)
        return Lookups(self.row_numbers, shared, _decoded(self.own, numeric, visits, content))

    def unread(self, part: Literal["shared", "own"], features: int) -> NDArray[np.int64] | None:
        """Returns the number of values without a row, (B, features) int64; None if the record does not say.

        Args:
            part: `shared` for features that all candidates share, B = 1, or `own` for those of each candidate, B = n.
            features: Number of features of the part.
        """
        data = self.shared_unread if part == "shared" else self.own_unread
        if data is None:
            return None
        size = 1 if part == "shared" else len(self.candidates)
        return np.frombuffer(data or bytes(size * features), dtype=np.uint8).astype(np.int64).reshape(size, features)


def digests(vectors: NDArray[np.float32]) -> Digests:
    """Returns a digest of each vector (N, D), (N,) uint64: vectors with different bits have different digests.

    The digest is a multilinear hash over 32-bit words, mixed once more. Two given vectors collide with a chance of
    about 2**-32.
    """
    if not vectors.shape[1]:
        return np.zeros(len(vectors), dtype=np.uint64)
    words = np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32).astype(np.uint64)
    with np.errstate(over="ignore"):
        factors = splitmix64(np.arange(1, words.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
        return splitmix64((words * factors).sum(axis=1, dtype=np.uint64))


def record_of(
    inputs: RankingInputs, *, id: str, time_ms: int, bundle: str, retrieved: bool, known_user: bool, stale: bool
) -> SkewRecord:
    """Returns the record of a ranking's inputs; see `SkewRecord` for the arguments."""
    lookups = inputs.lookups
    content = lookups.own.content
    return SkewRecord(
        version=VERSION,
        id=id,
        time_ms=time_ms,
        bundle=bundle,
        user=inputs.user,
        candidates=list(inputs.names),
        context=dict(inputs.sent.context),
        at=inputs.at,
        now_us=inputs.now_us,
        retrieved=retrieved,
        known_user=known_user,
        stale=stale,
        source=inputs.source,
        storage=inputs.storage,
        position=list(inputs.position) if len(inputs.position) > 1 else offset_in(inputs.position, 0),
        history=[inputs.item_ids[number] for number in inputs.history.tolist()],
        rows=lookups.rows.astype("<u4").tobytes(),
        digests=digests(inputs.vectors).astype("<u8").tobytes(),
        shared=_encoded(lookups.shared),
        own=_encoded(lookups.own),
        numeric=lookups.own.numeric.numpy().astype("<f4").tobytes(),
        content=b"" if content is None else digests(content.numpy()).astype("<u8").tobytes(),
        scores=inputs.scores.astype("<f4").tobytes(),
        fields={name: list(values) for name, values in inputs.sent.fields.items()},
        labelled=list(inputs.labelled[0]),
        labels=inputs.labelled[1],
        shared_unread=_unread(lookups.shared),
        own_unread=_unread(lookups.own),
        sources=[source_of(one) for one in inputs.ranks],
    )


def encode(record: SkewRecord) -> bytes:
    """Encodes a record: a msgpack array in the order of the fields. Empty sources have no field."""
    if not record.sources:
        return msgspec.msgpack.encode(msgspec.structs.astuple(record)[:-1])
    return msgspec.msgpack.encode(record)


def decode(data: bytes) -> SkewRecord:
    """Decodes a record.

    Raises:
        EventError: The bytes are no record, or the version is unknown.
    """
    try:
        record = msgspec.msgpack.decode(data, type=SkewRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError(f"skew record: {error}") from error
    if not OLDEST_VERSION <= record.version <= VERSION:
        known = f"this release reads {OLDEST_VERSION} to {VERSION}"
        raise EventError(f"skew record: version {record.version}, {known}", cause="unknown-version")
    return record


def _unread(batch: Batch) -> bytes | None:
    if batch.unread is None:
        return None
    counts = batch.unread.numpy()
    return np.minimum(counts, 255).astype(np.uint8).tobytes() if counts.any() else b""


def _encoded(batch: Batch) -> SkewBatch:
    return SkewBatch(
        batch.values.numpy().astype("<u4").tobytes(),
        batch.lengths.numpy().astype("<u4").tobytes(),
        batch.scale.numpy().astype("<f4").tobytes(),
    )


def _decoded(part: SkewBatch, numeric: torch.Tensor, visits: int | None, content: torch.Tensor | None) -> Batch:
    size = len(numeric)
    scale = np.frombuffer(part.scale, dtype="<f4").astype(np.float32).reshape(size, -1)
    return Batch(
        values=torch.from_numpy(np.frombuffer(part.values, dtype="<u4").astype(np.int64)),
        lengths=torch.from_numpy(np.frombuffer(part.lengths, dtype="<u4").astype(np.int64)),
        scale=torch.from_numpy(scale),
        numeric=numeric,
        labels=_NO_LABELS,
        visits=None if visits is None else torch.full((size,), visits, dtype=torch.int64),
        content=content,
    )


def answered(data: bytes) -> tuple[str, int] | None:
    """Returns the user and the time of a record's answer, microseconds since 1970. None if the bytes are no record."""
    try:
        record = decode(data)
    except EventError:
        return None
    return record.user, 1_000 * record.time_ms
