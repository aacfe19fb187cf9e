"""Snapshots: the stream's whole state at one sequence number, in a directory that is there whole or not at all.

    <directory>/<bundle id>/<seq>/
        manifest.json          seq, positions, sha256 of the other files
        arrays.safetensors     table, optimizer state, row numbers' seqs, histories, admissions
        memory.msgpack         items and users that the stream added, item versions, recent event ids

What a snapshot holds, the log from its positions on continues: table at offset n = snapshot ⊕ deltas[..n].
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.durable import write_directory
from features.errors import BundleError, StreamError
from models.bundle import record
from models.bundle.bundle import Bundle, file_hashes
from models.bundle.delta import Record
from streaming.log.protocol import Positions

FORMAT = 2
"""2 keeps the sightings of values in two generations, 1 in one sketch with the published ones; both are read."""
_ARRAYS, _MEMORY, _MANIFEST = "arrays.safetensors", "memory.msgpack", "manifest.json"
_LOGGER = logging.getLogger(__name__)


class _Manifest(msgspec.Struct, frozen=True):
    format: int
    bundle: str
    seq: int
    deltas: int
    inputs: list[tuple[str, int, int]]
    files: dict[str, str]


class Memory(msgspec.Struct, frozen=True):
    """The part of a snapshot that is not arrays: entities that the stream added, and what it remembers of messages."""

    users: list[str]
    items: list[str]
    item_records: dict[str, bytes]
    item_versions: dict[str, int]
    arrivals: int
    recent: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The state after one micro-batch.

    Attributes:
        bundle: its id.
        seq: of the batch.
        deltas: position in the deltas' topic; what stands before it is in the state.
        inputs: positions in the inputs; what stands before them is in the state.
        arrays: by name; `weight` (R, D) float32, `accumulator` (R,) float32 and `seqs` (R,) int64 are the table.
            `visit_users`, `visit_items` and `visit_times` (V,) int64 are the kept visits, of each user oldest first.
            `visitors` (U,) int64 are the users whose history the stream has changed. `admitted` (K,) uint64 are the
            keys that it admitted, ascending.
        memory: the rest.
    """

    bundle: str
    seq: int
    deltas: int
    inputs: Positions
    arrays: dict[str, NDArray[Any]]
    memory: Memory

    def records(self, bundle: Bundle) -> Iterator[Record]:
        """Yields the newest record of everything that the stream wrote: items, histories, admitted values.

        A store that holds the published bundle and these records is at this snapshot, apart from the rows.

        Args:
            bundle: The snapshot's bundle.
        """
        for name, payload in self.memory.item_records.items():
            yield Record(record.ITEM, name, payload)
        yield from self._histories(bundle)
        for name, payload in record.admitted_records(self.arrays["admitted"]):
            yield Record(record.ADMITTED, name, payload)

    def _histories(self, bundle: Bundle) -> Iterator[Record]:
        """Yields the histories that the stream has changed, in the order of the users' numbers."""
        users, items = ([*known, *new] for known, new in zip(numbered(bundle), self._added(), strict=True))
        order = np.argsort(self.arrays["visit_users"], kind="stable")
        visits = [self.arrays[f"visit_{name}"][order] for name in ("users", "items", "times")]
        visitors = np.sort(self.arrays["visitors"])
        starts, ends = (np.searchsorted(visits[0], visitors, side=side) for side in ("left", "right"))
        for user, start, end in zip(visitors.tolist(), starts.tolist(), ends.tolist(), strict=True):
            names = [items[number] for number in visits[1][start:end].tolist()]
            history = record.HistoryRecord(items=names, times=visits[2][start:end].tolist())
            yield Record(record.HISTORY, users[user], record.encode(history))

    def _added(self) -> tuple[list[str], list[str]]:
        return self.memory.users, self.memory.items


def numbered(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Returns the ids of the users and of the items that a stream starts with, each at its number.

    The published entities come first, then those that only the published histories name, by first appearance.
    """
    users, items = bundle.users["user_id"].to_list(), bundle.items["item_id"].to_list()
    visits = bundle.history
    return (
        list(dict.fromkeys([*users, *visits["user_id"].to_list()])),
        list(dict.fromkeys([*items, *visits["item_id"].to_list()])),
    )


class Snapshots:
    """The snapshots of a directory.

    Args:
        directory: made when the first is written.
        keep: how many of each bundle stay, ≥ 1.
    """

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self._directory = directory
        self._keep = keep

    def write(self, snapshot: Snapshot) -> Path:
        """Writes a snapshot and removes those that are too many; what was there stays when this fails.

        Raises:
            StreamError: the disk did not take it.
        """
        destination = self._directory / snapshot.bundle / f"{snapshot.seq:015d}"

        def fill(directory: Path) -> None:
            save_file({name: np.ascontiguousarray(a) for name, a in snapshot.arrays.items()}, directory / _ARRAYS)
            (directory / _MEMORY).write_bytes(msgspec.msgpack.encode(snapshot.memory))
            manifest = _Manifest(
                format=FORMAT,
                bundle=snapshot.bundle,
                seq=snapshot.seq,
                deltas=snapshot.deltas,
                inputs=[(*place, position) for place, position in snapshot.inputs.items()],
                files=file_hashes(directory),
            )
            (directory / _MANIFEST).write_bytes(msgspec.json.encode(manifest))

        if not destination.exists():
            try:
                write_directory(destination, fill)
            except (OSError, SafetensorError) as error:
                raise StreamError(f"{destination}: the snapshot was not written: {error}; make room") from error
            except (OverflowError, TypeError, ValueError) as error:
                raise StreamError(f"{destination}: the state cannot be encoded: {error}; report this") from error
        for old in self._found(snapshot.bundle)[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)
        return destination

    def newest(self, bundle: Bundle) -> Snapshot | None:
        """The newest snapshot that is whole; a damaged one is skipped, since the log makes up for it."""
        for directory in self._found(bundle.id):
            try:
                return self._load(directory, bundle.id)
            except BundleError as error:
                _LOGGER.warning("%s", error)
        return None

    def oldest_position(self, bundle: Bundle) -> int | None:
        """Returns the position of the oldest kept snapshot; earlier deltas may expire."""
        found = self._found(bundle.id)
        return self._load(found[-1], bundle.id).deltas if found else None

    def _found(self, bundle: str) -> list[Path]:
        """Newest first."""
        directory = self._directory / bundle
        return sorted((path for path in directory.glob("[0-9]*") if path.is_dir()), reverse=True)

    @staticmethod
    def _load(directory: Path, bundle: str) -> Snapshot:
        try:
            manifest = msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=_Manifest)
            if not 1 <= manifest.format <= FORMAT or manifest.bundle != bundle:
                raise BundleError(f"{directory}: made for {manifest.bundle} in format {manifest.format}; not used")
            if file_hashes(directory) != manifest.files:
                raise BundleError(f"{directory}: altered since it was written (sha256 differs); not used")
            memory = msgspec.msgpack.decode((directory / _MEMORY).read_bytes(), type=Memory)
            arrays = load_file(directory / _ARRAYS)
        except (OSError, msgspec.DecodeError, SafetensorError) as error:
            raise BundleError(f"{directory}: {error}; not used") from error
        inputs = {(topic, partition): position for topic, partition, position in manifest.inputs}
        return Snapshot(bundle, manifest.seq, manifest.deltas, inputs, arrays, memory)
