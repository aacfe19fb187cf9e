"""A release under load: bundles to publish, a sender of events, and a check of every followed table."""

import contextlib
import json
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from features.dataset.label import Label
from features.errors import LogError
from models.bundle import delta
from models.bundle.bundle import Bundle, BundleParts, LogPosition, write_bundle
from models.bundle.delta import Delta
from models.registry.release import CHALLENGER, CHAMPION, PREVIOUS
from serving.rollout.lifecycle import promoted
from serving.store.verify import verify
from serving.store.writer import position_of
from streaming.log.protocol import EventLog, Message, ends_of, offset_in
from streaming.restore import start_of
from streaming.step import Step
from streaming.trainer import TrainerOptions
from tessera.settings import Settings
from tests.build import coloured_parts
from tests.servers import until

MODEL = "coloured"
OPTIONS = TrainerOptions(batch=64, wait_s=0.02, lateness_s=1e9, snapshot_every_s=2.0)


class ReleaseUnderLoad:
    """A home with a registry, and events that keep coming.

    Attributes:
        settings: Settings of the home.
        bundles: Published bundles, oldest first.
        sent: Number of sent events.
        trained: True gives each new bundle the present ends of the topics, or a little less, as the positions it was
            trained up to. False: its stream starts at the oldest message.
    """

    def __init__(self, settings: Settings, directory: Path) -> None:
        self.settings = settings
        self.registry = settings.open_registry()
        self.bundles: list[Bundle] = []
        self.sent = 0
        self.trained = False
        self._directory = directory
        self._parts: BundleParts = coloured_parts(directory / "parts", name=MODEL, epochs=0, events=200)
        self._stop = threading.Event()
        self._deltas: dict[str, list[Delta]] = {}
        self._read: dict[int, int] = {}
        self.log: EventLog = settings.open_log()
        self.log.create_topics(settings.topics.partitions())

    def make(self, label: str = "") -> Bundle:
        """Returns a new bundle with a table of its own.

        Args:
            label: Column of the label, if another than the events have.
        """
        number = len(self.bundles)
        generator = torch.Generator().manual_seed(number)
        table = self._parts.ranker.table
        table.weight.copy_(torch.randn(table.weight.shape, generator=generator) / 10)
        parts = replace(self._parts, metrics={"number": number}, positions=self._positions(300 * (number % 3)))
        if label:
            events = parts.dataset.events.model_copy(update={"label": Label(column=label)})
            parts = replace(parts, dataset=parts.dataset.model_copy(update={"events": events}))
        bundle = write_bundle(parts, self._directory / f"bundle-{number}" / "bundle")
        self.bundles.append(bundle)
        return bundle

    def _positions(self, before: int) -> list[LogPosition]:
        topics = self.settings.topics
        return [
            LogPosition(topic, self.log.identity(topic), number, max(0, end - before))
            for topic in (topics.items, topics.events, topics.deltas)
            for number, end in self.log.end_offsets(topic).items()
            if self.trained
        ]

    def publish(self, label: str = "") -> Bundle:
        """Publishes a new bundle as the challenger; the first one as the champion."""
        bundle = self.make(label)
        release = self.registry.publish(bundle, params={}, metrics={})
        if CHAMPION not in release.aliases:
            self.registry.challenge(release, verdict={})
        return bundle

    def promote(self) -> None:
        promoted(self.registry, self.registry.resolve(MODEL, CHALLENGER))

    def roll_back(self) -> None:
        promoted(self.registry, self.registry.resolve(MODEL, PREVIOUS))

    def retire_challenger(self) -> None:
        self.registry.end_challenge(self.registry.resolve(MODEL, CHALLENGER), why="the test")

    def aliased(self) -> list[str]:
        """Returns the ids of the bundles that an alias names."""
        return [one.bundle for one in self.registry.releases(MODEL) if one.aliases]

    def send(self, count: int) -> None:
        """Sends events, one second of event time apart."""
        messages: list[tuple[bytes | None, bytes]] = []
        for number in range(self.sent, self.sent + count):
            user, item = f"u{number % 20}", f"i{number * 7 % 40}"
            event = {"user_id": user, "item_id": item, "time": 10_000 + number, "label": number % 3 == 0}
            messages.append((user.encode(), json.dumps(event | {"_event_id": number}).encode()))
        while True:
            try:
                self.log.append(self.settings.topics.events, messages)
                break
            except LogError:
                # A broker of a busy machine may answer late. Messages that it has nevertheless are repeats by their id.
                time.sleep(1)
        self.sent += count

    @contextlib.contextmanager
    def load(self, *, every_s: float = 0.02, count: int = 10) -> Iterator[None]:
        """Sends events from a thread while the body runs."""

        def send() -> None:
            while not self._stop.wait(every_s):
                self.send(count)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            self._stop.set()
            sender.join()
            self._stop.clear()

    def deltas(self) -> dict[str, list[Delta]]:
        """Returns all deltas by bundle, in order. Messages that an earlier call has read are not read again."""
        for number, end in self.log.end_offsets(self.settings.topics.deltas).items():
            for message in self.log.read(self.settings.topics.deltas, number, self._read.get(number, 0), end):
                change = delta.decode(message.value)
                self._deltas.setdefault(change.bundle, []).append(change)
                self._read[number] = message.offset + 1
        return self._deltas

    def await_delta(self, bundle: Bundle, after: int = 0) -> None:
        """Waits until the log has a delta of a bundle at an offset or later."""
        at = {number: max(after, 0) for number in self.log.end_offsets(self.settings.topics.deltas)}

        def arrived() -> bool:
            for number, end in self.log.end_offsets(self.settings.topics.deltas).items():
                for message in self.log.read(self.settings.topics.deltas, number, at[number], end):
                    at[number] = message.offset + 1
                    if delta.decode(message.value).bundle == bundle.id:
                        return True
            return False

        until(arrived, 120)

    def await_store(self, bundle: Bundle) -> None:
        """Waits until the store is filled with a bundle, so that the stream has read its files."""
        with contextlib.closing(self.settings.open_store()) as store:
            until(lambda: position_of(store, bundle.id, self.settings.topics.deltas) is not None, 120)

    def await_written(self) -> None:
        """Waits until the store has every delta that the log has now, of every bundle with an alias."""
        topic = self.settings.topics.deltas
        # Marks of transactions have offsets too, and the store's position is behind the last delta.
        ends = [
            max((one.offset + 1 for one in self.log.read(topic, number, max(0, end - 20), end)), default=0)
            for number, end in enumerate(ends_of(self.log, topic))
        ]
        with contextlib.closing(self.settings.open_store()) as store:

            def written() -> bool:
                found = [position_of(store, bundle, topic) or () for bundle in self.aliased()]
                return all(offset_in(at, number) >= end for at in found for number, end in enumerate(ends))

            until(written, 120)

    def settle(self, *, seconds: float = 180) -> None:
        """Waits until every bundle with an alias has a delta for the last event."""
        ends = self.log.end_offsets(self.settings.topics.events)
        last = {
            number: max(
                (one.offset for one in self.log.read(self.settings.topics.events, number, max(0, end - 20), end)),
                default=-1,
            )
            for number, end in ends.items()
        }

        def done() -> bool:
            changes = self.deltas()
            return all(self._reached(changes.get(bundle, []), last) for bundle in self.aliased())

        until(done, seconds)

    @staticmethod
    def _reached(changes: list[Delta], last: dict[int, int]) -> bool:
        at: dict[int, int] = {}
        for source in (source for change in changes for source in change.sources if source.topic.endswith("events")):
            at[source.partition] = max(at.get(source.partition, -1), source.last)
        return all(at.get(number, -1) >= offset for number, offset in last.items())

    def check(self) -> dict[str, int]:
        """Checks every table that was ever followed. Returns the number of applied events by bundle.

        Of each bundle: every message from its start on is in one batch, up to the end or, for a retired bundle, up to
        its last batch; the batches done again without any fault give the same bits; the store equals the fold. Each
        bundle costs as much as its own deltas and inputs, so the check is linear in the number of bundles.
        """
        log, topics = self.log, self.settings.topics
        inputs = {
            (topic, number): list(log.read(topic, number, 0, end))
            for topic in (topics.items, topics.events)
            for number, end in log.end_offsets(topic).items()
        }
        aliased, changes, applied = self.aliased(), self.deltas(), {}
        for bundle in (one for one in self.bundles if one.id in changes):
            applied[bundle.id] = self._check_table(bundle, changes[bundle.id], inputs, whole=bundle.id in aliased)
        with contextlib.closing(self.settings.open_store()) as store:
            for bundle in (one for one in self.bundles if one.id in aliased):
                assert verify(log, bundle, store, topics).difference == "", bundle.id
        return applied

    def _check_table(
        self, bundle: Bundle, changes: list[Delta], inputs: dict[tuple[str, int], list[Message]], *, whole: bool
    ) -> int:
        start = start_of(self.log, bundle, self.settings.topics)
        assert [c.seq for c in changes if c.sources] == list(range(1, changes[-1].seq + 1)), "a batch is missing"
        offsets = {place: [message.offset for message in messages] for place, messages in inputs.items()}
        # Places of the next message in `inputs`: a batch must begin there, since no message is in two or in none.
        after = {place: bisect_left(offsets[place], first) for place, first in start.positions.items()}
        calm = Step(bundle, self.settings.topics, lateness_s=1e9, trained_until=start.trained_until)
        weight = torch.from_numpy(bundle.rows().copy())
        accumulator, seqs = torch.zeros(len(weight)), np.zeros(len(weight), dtype=np.int64)
        count = 0
        for change in changes:
            delta.fold(change, weight, accumulator, seqs)
            batch: list[Message] = []
            for source in change.sources:
                place = source.topic, source.partition
                low, high = bisect_left(offsets[place], source.first), bisect_right(offsets[place], source.last)
                assert low >= after[place], f"{bundle.id}: a message is in two batches"
                assert low == after[place], f"{bundle.id}: a message is in no batch"
                after[place] = high
                batch += inputs[place][low:high]
            if change.sources:
                count += calm.apply(batch, poison=frozenset(change.poison)).events
        ends = {place: len(messages) for place, messages in inputs.items()}
        assert not whole or after == ends, f"{bundle.id}: a message is in no batch"
        assert torch.equal(calm.ranker.table.weight, weight), f"{bundle.id}: not the table of an undisturbed run"
        return count

    def close(self) -> None:
        self.log.close()
