"""Snapshots: the stream's whole state at one sequence number, in a directory that is written atomically.

    <directory>/<bundle id>/<seq>/
        manifest.json          seq, positions, sha256 of the other files
        arrays.safetensors     table, optimizer state, sequence numbers of rows, histories, admissions
        memory.msgpack         items and users that the stream added, item versions, recent event ids

The log continues a snapshot from the snapshot's positions: table at offset n = snapshot ⊕ deltas[..n].
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from features.aggregate.aggregator import Aggregator
from features.aggregate.stored import OWNERS, restore_aggregates
from features.durable import write_directory
from features.errors import BundleError, StorageError, StreamError
from features.shown.consumed import ConsumedItems
from features.storage.copy import files_below
from features.storage.folders import Folders
from features.storage.location import Remote
from features.storage.sender import BackgroundSender
from features.value.forgotten import Forgotten
from models.bundle import aggregate_record, record
from models.bundle.bundle import Bundle, file_hashes
from models.bundle.delta import Record
from models.encoder.meaning.neighbours import LABELLED
from streaming.log.protocol import Offsets, Positions

FORMAT = 7
"""Format 2 keeps the sightings of values in two generations; format 1 adds them to the published sketch.

Format 3 names forgotten users, and format 4 has labelled items. Format 5 has owners of the pairs of distinct counts,
and the past values of items. Format 6 has positions in several partitions of the deltas. Format 7 has consumed items. A
snapshot is written in the lowest format that has its state, 2 at least. All formats are read.
"""
PAST = "past."
"""Opening of the names of arrays of past values of items."""
_ARRAYS, _MEMORY, _MANIFEST = "arrays.safetensors", "memory.msgpack", "manifest.json"
_LOGGER = logging.getLogger(__name__)


class _Manifest(msgspec.Struct, frozen=True):
    format: int
    bundle: str
    seq: int
    deltas: int | Offsets
    inputs: list[tuple[str, int, int]]
    files: dict[str, str]


class ForgottenUser(msgspec.Struct, frozen=True):
    """Forgotten user in a snapshot.

    Attributes:
        request: The request.
        seq: Number of the micro-batch that removed the user.
    """

    request: Forgotten
    seq: int


class Memory(msgspec.Struct, frozen=True):
    """Part of a snapshot that is not arrays.

    Attributes:
        users: Ids of the users that the stream added, in the order of their numbers.
        items: Ids of the items that the stream added, in the order of their numbers.
        item_records: Record that the stream last wrote of each item, by item id.
        item_versions: Version of the last applied message about each item, by item id.
        arrivals: Number of events so far, as `FreshEvents.arrivals`.
        recent: Recent event times and ids, as `EventWindow.state` returns them.
        forgotten: Forgotten users.
        dead: Numbers of forgotten users, which have no id.
        removed: Number of the micro-batch that removed each record of aggregates, by the record's id.
        item_texts: Hash of the text behind each record of `item_records` that a message gave, by item id. A snapshot of
            a release before 0.2 has none, so the next message about an item encodes its text.
    """

    users: list[str]
    items: list[str]
    item_records: dict[str, bytes]
    item_versions: dict[str, int]
    arrivals: int
    recent: dict[str, Any]
    forgotten: list[ForgottenUser] = []
    dead: list[int] = []
    removed: dict[str, int] = {}
    item_texts: dict[str, bytes] = {}


@dataclass(frozen=True)
class Snapshot:
    """The state after one micro-batch.

    Attributes:
        bundle: Id of the bundle.
        seq: Sequence number of the batch.
        deltas: Positions in the deltas' topic. The state contains all deltas before these positions.
        inputs: Positions in the inputs. The state contains all messages before these positions.
        arrays: Arrays by name. `weight` (R, D) float32, `accumulator` (R,) float32 and `seqs` (R,) int64 are the table.
            `visit_users`, `visit_items` and `visit_times` (V,) int64 are the kept visits, of each user oldest first.
            `labelled_users`, `labelled_items` and `labelled_times` (W,) int64 are the users' labelled items, each item
            with its label by `coded_labels`; only if the bundle corrects new items.
            `consumed_…` are the arrays of `ConsumedItems`; only if a policy leaves consumed items out.
            `past.PART` (N,) int64 are the keys of the values of items that updates replaced.
            `visitors` (U,) int64 are the users whose history the stream has changed. `admitted` (K,) uint64 are the
            keys that the stream admitted, ascending.
        memory: State that is not arrays.
    """

    bundle: str
    seq: int
    deltas: Offsets
    inputs: Positions
    arrays: dict[str, NDArray[Any]]
    memory: Memory

    def records(self, bundle: Bundle) -> Iterator[Record]:
        """Yields the newest record of each item and history that the stream wrote, and all admitted values.

        A store with the published bundle and these records has the state of this snapshot, except for the rows.

        Args:
            bundle: Bundle of the snapshot.
        """
        for item_id, payload in self.memory.item_records.items():
            yield Record(record.ITEM, item_id, payload)
        yield from self._histories(bundle)
        if "consumed_users" in self.arrays:
            users = [*numbered(bundle)[0], *self.memory.users]
            visitors = np.sort(self.arrays["visitors"])
            for row in ConsumedItems.restored(self.arrays).all_records(users, visitors):
                yield Record(*row)
        for name, payload in record.admitted_records(self.arrays["admitted"]):
            yield Record(record.ADMITTED, name, payload)
        published = bundle.aggregates()
        state = Aggregator(published.plan)
        restore_aggregates(state, self.arrays)
        yield from aggregate_record.state_records(state, published)

    def _histories(self, bundle: Bundle) -> Iterator[Record]:
        """Yields the histories that the stream has changed, in the order of the users' numbers."""
        known_users, known_items = numbered(bundle)
        users, items = [*known_users, *self.memory.users], [*known_items, *self.memory.items]
        visitors = np.sort(self.arrays["visitors"])
        visits = self._events("visit", visitors)
        labelled = self._events("labelled", visitors) if "labelled_users" in self.arrays else None
        for place, user in enumerate(visitors.tolist()):
            visited, times = visits[place]
            coded = [] if labelled is None else labelled[place][0].tolist()[-LABELLED:]
            history = record.HistoryRecord(
                items=[items[number] for number in visited.tolist()],
                times=times.tolist(),
                labelled=[items[value // 2] for value in coded],
                labels=bytes(value % 2 for value in coded),
            )
            yield Record(record.HISTORY, users[user], record.encode(history))

    def _events(self, name: str, visitors: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Returns the items and times of each visitor in the arrays of a name."""
        order = np.argsort(self.arrays[f"{name}_users"], kind="stable")
        users, items, times = (self.arrays[f"{name}_{column}"][order] for column in ("users", "items", "times"))
        starts, ends = (np.searchsorted(users, visitors, side=side) for side in ("left", "right"))
        return [(items[start:end], times[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]


def numbered(bundle: Bundle) -> tuple[list[str], list[str]]:
    """Returns the ids of the users and the ids of the items with which a stream starts, in the order of their numbers.

    The published entities come first. Entities that only the published histories and labelled items name follow, by
    first appearance.
    """
    users, items = bundle.users["user_id"].to_list(), bundle.items["item_id"].to_list()
    for events in (bundle.history, bundle.labelled):
        users += events["user_id"].to_list()
        items += events["item_id"].to_list()
    return list(dict.fromkeys(users)), list(dict.fromkeys(items))


def _format(snapshot: Snapshot) -> int:
    """Returns the lowest format that has the snapshot's state."""
    if "consumed_users" in snapshot.arrays:
        return FORMAT
    if len(snapshot.deltas) > 1:
        return FORMAT - 1
    if any(name.startswith((OWNERS, PAST)) for name in snapshot.arrays):
        return FORMAT - 2
    if "labelled_users" in snapshot.arrays:
        return FORMAT - 3
    return FORMAT - 4 if snapshot.memory.forgotten else FORMAT - 5


class Snapshots:
    """Snapshots in a directory, with copies at an object store if an address is given.

    A snapshot is written on this machine first. A thread sends it to the store, so that a slow store does not delay the
    stream. If several snapshots wait, the newest is sent. A machine without the directory fetches from the store.

    Args:
        directory: Directory of the snapshots. The first `write` creates it.
        keep: Number of newest snapshots to keep of each bundle, ≥ 1.
        address: Folder at an object store for the copies. None: the snapshots are on this machine alone.
    """

    def __init__(self, directory: Path, *, keep: int = 2, address: Remote | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self._directory, self._address = directory, address
        self._keep = keep
        self._sender = BackgroundSender(self._send)

    def write(self, snapshot: Snapshot) -> Path:
        """Writes a snapshot, then removes the oldest snapshots beyond `keep`.

        If the snapshot cannot be written, no snapshot is removed. The copy is sent later; see `await_sent`.

        Returns:
            Directory of the snapshot.

        Raises:
            StreamError: The disk refused the files, or the state cannot be encoded.
        """
        destination = self._directory / snapshot.bundle / _name(snapshot.seq)

        def fill(directory: Path) -> None:
            save_file({name: np.ascontiguousarray(a) for name, a in snapshot.arrays.items()}, directory / _ARRAYS)
            (directory / _MEMORY).write_bytes(msgspec.msgpack.encode(snapshot.memory))
            manifest = _Manifest(
                format=_format(snapshot),
                bundle=snapshot.bundle,
                seq=snapshot.seq,
                deltas=snapshot.deltas if len(snapshot.deltas) > 1 else snapshot.deltas[0],
                inputs=[(*partition, position) for partition, position in snapshot.inputs.items()],
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
        here = Folders(self._directory / snapshot.bundle, record=_MANIFEST)
        for name in _numbered(here.here())[: -self._keep]:
            here.remove(name)
        if self._address is not None:
            self._sender.ask(snapshot.bundle, destination.name)
        return destination

    def await_sent(self, bundle: str) -> None:
        """Waits until the newest snapshot of a bundle is at the store. Does nothing without an address.

        Raises:
            StreamError: The store did not take it. The snapshot is on this machine.
        """
        error = self._sender.wait(bundle)
        if error is not None:
            raise StreamError(str(error)) from error

    def _send(self, bundle: str, name: str) -> None:
        """Sends a snapshot of a bundle, then removes older copies beyond `keep` and unfinished older copies."""
        folders = self._folders(bundle)
        try:
            folders.send(name)
            older = _numbered(folders.complete())[: -self._keep]
            for one in older + [each for each in folders.unfinished() if each < name]:
                folders.remove_copy(one)
        except OSError as error:
            raise StorageError(f"snapshot {bundle}/{name} was not sent ({error}); the next one is tried too") from error

    def newest(self, bundle: Bundle) -> Snapshot | None:
        """Returns the newest intact snapshot, or None.

        A damaged snapshot is skipped with a warning, since the log has everything that a snapshot holds.

        Raises:
            StorageError: The store does not answer, and no snapshot is on this machine.
        """
        folders = self._folders(bundle.id)
        for name in reversed(_numbered(folders.names())):
            try:
                return self._load(folders, name, bundle.id)
            except BundleError as error:
                _LOGGER.warning("%s", error)
        return None

    def memories(self) -> Iterator[tuple[Path | Remote, Memory | None]]:
        """Yields the place and the memory of each snapshot of all bundles, None for a damaged memory."""
        bundles = {path.name for path in self._directory.glob("*") if path.is_dir()}
        if self._address is not None:
            bundles |= {
                file.address.removeprefix(f"{self._address}/").partition("/")[0] for file in files_below(self._address)
            }
        for bundle in sorted(bundles):
            here = Folders(self._directory / bundle, record=_MANIFEST)
            for name in _numbered(here.here()):
                yield here.directory / name, _memory(here.directory / name)
            if self._address is not None:
                for name in _numbered(Folders(here.directory, self._address / bundle, record=_MANIFEST).complete()):
                    place = self._address / bundle / name
                    yield place, _memory(place)

    def prune(self, bundle: Bundle, seq: int) -> int:
        """Removes the snapshots of a bundle that are older than a micro-batch, and their copies.

        Returns:
            Number of removed snapshots.
        """
        folders = self._folders(bundle.id)
        older = [name for name in _numbered(folders.names()) if int(name) < seq]
        for name in older:
            folders.remove(name)
        return len(older)

    def oldest_position(self, bundle: Bundle) -> Offsets | None:
        """Returns the positions of the oldest kept snapshot in the deltas' topic. Earlier deltas may expire."""
        folders = self._folders(bundle.id)
        names = _numbered(folders.names())
        return self._load(folders, names[0], bundle.id).deltas if names else None

    def _folders(self, bundle: str) -> Folders:
        address = self._address / bundle if self._address is not None else None
        return Folders(self._directory / bundle, address, record=_MANIFEST)

    @staticmethod
    def _load(folders: Folders, name: str, bundle: str) -> Snapshot:
        try:
            directory = folders.fetch(name)
            manifest = msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=_Manifest)
            if not 1 <= manifest.format <= FORMAT or manifest.bundle != bundle:
                raise BundleError(
                    f"{directory}: expected a snapshot of {bundle} in format 1 to {FORMAT}, "
                    f"got {manifest.bundle} in format {manifest.format}; the snapshot is skipped"
                )
            memory = msgspec.msgpack.decode((directory / _MEMORY).read_bytes(), type=Memory)
            arrays = load_file(directory / _ARRAYS)
        except (OSError, msgspec.DecodeError, SafetensorError) as error:
            raise BundleError(f"{folders.directory / name}: {error}; the snapshot is skipped") from error
        inputs = {(topic, partition): position for topic, partition, position in manifest.inputs}
        deltas = (manifest.deltas,) if isinstance(manifest.deltas, int) else manifest.deltas
        return Snapshot(bundle, manifest.seq, deltas, inputs, arrays, memory)


def _name(seq: int) -> str:
    return f"{seq:015d}"


def _numbered(names: list[str]) -> list[str]:
    """Returns the names of snapshots among the names of folders, oldest first."""
    return sorted(name for name in names if name.isdigit())


def _memory(place: Path | Remote) -> Memory | None:
    try:
        return msgspec.msgpack.decode((place / _MEMORY).read_bytes(), type=Memory)
    except (OSError, msgspec.DecodeError) as error:
        _LOGGER.warning("%s: %s", place, error)
        return None
