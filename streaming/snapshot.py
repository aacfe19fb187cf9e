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
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.durable import write_directory
from features.errors import BundleError, StreamError
from features.history import EventColumns
from models.bundle import record
from models.bundle.bundle import Bundle, file_hashes
from models.bundle.delta import Record
from streaming.log.protocol import Positions
from streaming.step import Step

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


class _Memory(msgspec.Struct, frozen=True):
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
    """

    bundle: str
    seq: int
    deltas: int
    inputs: Positions
    arrays: dict[str, NDArray[Any]]
    memory: _Memory

    @staticmethod
    def of(step: Step, *, deltas: int, inputs: Positions) -> "Snapshot":
        """Copies a step's state."""
        table, catalogue, visits = step.ranker.table, step.catalogue, step.history.state()
        arrays = {
            "weight": table.weight.numpy().copy(),
            "accumulator": table.accumulator.numpy().copy(),
            "seqs": step.seqs.copy(),
            "visit_users": visits.user.copy(),
            "visit_items": visits.item.copy(),
            "visit_times": visits.time.copy(),
            "visitors": np.array(sorted(step.visitors), dtype=np.int64),
        } | catalogue.admission.state()
        memory = _Memory(
            users=catalogue.user_ids[step.published_users :],
            items=catalogue.item_ids[step.published_items :],
            item_records=dict(step.item_records),
            item_versions=dict(step.item_versions),
            arrivals=step.arrivals,
            recent=msgspec.to_builtins(step.recent.state()),
        )
        return Snapshot(step.bundle.id, step.seq, deltas, dict(inputs), arrays, memory)

    def restore(self, step: Step) -> None:
        """Brings a step that stands at its bundle to this state."""
        arrays, memory, catalogue = self.arrays, self.memory, step.catalogue
        table = step.ranker.table
        table.weight.copy_(torch.from_numpy(arrays["weight"]))
        table.accumulator.copy_(torch.from_numpy(arrays["accumulator"]))
        step.seqs = arrays["seqs"].copy()
        catalogue.admission.restore(arrays)
        catalogue.number_users(memory.users)
        catalogue.number_items(memory.items)
        written = {name: data for name, data in memory.item_records.items() if data != record.TOMBSTONE}
        catalogue.put_items({name: record.decode_item(data) for name, data in written.items()})
        catalogue.remove_items([name for name in memory.item_records if name not in written])
        step.history = type(step.history)(step.history.length)
        users, items, times = (arrays[f"visit_{name}"] for name in ("users", "items", "times"))
        step.history.advance(EventColumns(users, items, times, np.ones(len(users), dtype=np.bool_)))
        step.visitors = set(arrays["visitors"].tolist())
        step.recent.restore(memory.recent)
        step.item_records, step.item_versions = dict(memory.item_records), dict(memory.item_versions)
        step.arrivals, step.seq = memory.arrivals, self.seq


def records(step: Step) -> Iterator[Record]:
    """What a store holds beside the rows, for a store that has lost it: what the stream wrote, at its latest."""
    for name, payload in step.item_records.items():
        yield Record(record.ITEM, name, payload)
    for user in sorted(step.visitors):
        yield Record(record.HISTORY, step.catalogue.user_ids[user], record.encode(step.history_record(user)))
    for name, payload in record.admitted_records(step.catalogue.admission.added):
        yield Record(record.ADMITTED, name, payload)


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
        """The newest snapshot that is whole; a damaged one is passed over, since the log makes up for it."""
        for directory in self._found(bundle.id):
            try:
                return self._load(directory, bundle.id)
            except BundleError as error:
                _LOGGER.warning("%s", error)
        return None

    def oldest_position(self, bundle: Bundle) -> int | None:
        """Where the deltas of the oldest kept snapshot begin; those before it may expire."""
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
            memory = msgspec.msgpack.decode((directory / _MEMORY).read_bytes(), type=_Memory)
            arrays = load_file(directory / _ARRAYS)
        except (OSError, msgspec.DecodeError, SafetensorError) as error:
            raise BundleError(f"{directory}: {error}; not used") from error
        inputs = {(topic, partition): position for topic, partition, position in manifest.inputs}
        return Snapshot(bundle, manifest.seq, manifest.deltas, inputs, arrays, memory)
