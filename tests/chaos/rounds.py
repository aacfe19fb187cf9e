"""Rounds of faults on a real broker and a real Redis: after each, nothing lost, nothing twice, the same bits.

    python -m tests.chaos.rounds DIRECTORY ROUNDS

Each round is seeded by its number: while events come in, repeated, shuffled and broken here and there, one thing after
another goes wrong. A process of its own, since the Kafka client leaves threads and sockets behind when its broker dies.
"""

import contextlib
import json
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
from kafka import KafkaConsumer, TopicPartition

from features.errors import LogError
from models.bundle import delta
from models.bundle.delta import Source
from serving.store.redis.store import RedisStore
from serving.store.verify import verify
from serving.store.writer import position_of
from streaming.fold import Fold
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.restore import group_of
from streaming.step import Step
from tessera.terminal import one_thread
from tests.chaos.cluster import Cluster, Process, until
from tests.chaos.worker import FENCED
from tests.integration.world import World, make_world

EVENTS = 400
PREFIX = "chaos-"
TOPICS = Topics(PREFIX)


class Place:
    """The cluster, the stream's processes on it, and what was sent."""

    def __init__(self, cluster: Cluster, world: World) -> None:
        self.cluster, self.world = cluster, world
        self.log = KafkaLog(cluster.kafka_address)
        self.log.create_topics(TOPICS.partitions(2))
        bundle = world.bundle.directory
        self.trainer = cluster.worker("trainer", "trainer", bundle, PREFIX)
        self.writers = [cluster.worker(f"writer{n}", "writer", bundle, PREFIX) for n in range(2)]
        self.zombies: list[Process] = []
        self.sent = 0
        self._messages = world.messages(10_000)

    def start(self) -> None:
        for process in (self.trainer, *self.writers):
            process.start()

    def send(self, chance: random.Random) -> None:
        """Sends a round's events, some twice, some broken, none far from its turn, keyed by user."""
        count = len(self._messages)
        parts = [json.loads(self._messages[(self.sent + place) % count]) for place in range(EVENTS)]
        # A second apart, so that no shuffling makes an event late.
        start = json.loads(self._messages[-1])["time"] + self.sent
        values = [
            (part["user_id"], json.dumps(part | {"time": start + place, "_event_id": self.sent + place}).encode())
            for place, part in enumerate(parts)
        ]
        self.sent += EVENTS
        values += [chance.choice(values) for _ in range(EVENTS // 10)] + [("r", b"{broken")] * (EVENTS // 50)
        near = {id(value): place + chance.uniform(0, 30) for place, value in enumerate(values)}
        values.sort(key=lambda value: near[id(value)])
        for at in range(0, len(values), 40):
            batch = [(user.encode(), value) for user, value in values[at : at + 40]]
            while True:
                try:
                    self.log.append(TOPICS.events, batch)
                    break
                except Exception:
                    # The broker is away: what was in flight may come twice, which the events' ids make good.
                    time.sleep(0.3)
            time.sleep(0.1)

    def settle(self) -> None:
        """Waits until trainer and writers have done everything."""
        if not self.trainer.alive():
            self.trainer.start()
        for writer in self.writers:
            if not writer.alive():
                writer.start()
        group = group_of(self.world.bundle, TOPICS.events)

        def read() -> bool:
            if not self.answers():
                return False
            ends = self.log.end_offsets(TOPICS.events)
            at = self.log.committed([TOPICS.events], group=group)
            if not self.trainer.alive():
                self.trainer.start()
            return (
                all(at.get((TOPICS.events, partition), 0) >= end - 3 for partition, end in ends.items())
                and not self._left()
            )

        until(read, seconds=240, doing="the trainer's catching up")

    def answers(self) -> bool:
        """Returns whether the broker is back for this process's own client."""
        with contextlib.suppress(LogError):
            return bool(self.log.end_offsets(TOPICS.deltas))
        return False

    def wake_zombies(self) -> None:
        """One that had nothing left to do when it woke up is fenced by the next message, and ends.

        One that woke up to an outage begins again, as any trainer does, and fences the other; that one begins again
        too.
        """

        def ended(zombie: Process) -> bool:
            if not self.trainer.alive():
                self.trainer.start()
            if zombie.alive() and self.answers():
                self.log.append(TOPICS.events, [(b"r", b"{broken")])
                time.sleep(0.5)
            return not zombie.alive()

        for zombie in self.zombies:
            until(lambda zombie=zombie: ended(zombie), seconds=180, doing="the zombie's end")
            assert zombie.running is not None
            assert zombie.running.returncode in (FENCED, -signal.SIGKILL)
        self.zombies.clear()

    def _left(self) -> bool:
        """Returns whether messages, not mere marks of transactions, stand behind the group's positions."""
        at = self.log.committed([TOPICS.events], group=group_of(self.world.bundle, TOPICS.events))
        ends = self.log.end_offsets(TOPICS.events)
        starts = {n: at.get((TOPICS.events, n), 0) for n in ends}
        return any(True for n, end in ends.items() for _ in self.log.read(TOPICS.events, n, starts[n], end))

    def close(self) -> None:
        for process in (self.trainer, *self.writers, *self.zombies):
            process.kill()
        self.log.close()


# Faults.


def kill_trainer(place: Place, chance: random.Random) -> None:
    place.trainer.kill()
    place.trainer.start()


def kill_inside_a_transaction(place: Place, chance: random.Random) -> None:
    place.trainer.kill()
    place.trainer.start("die=0.2", f"seed={chance.randrange(1 << 30)}")
    assert place.trainer.running is not None
    with contextlib.suppress(Exception):
        place.trainer.running.wait(30)
    place.trainer.kill()
    place.trainer.start()


def kill_writer(place: Place, chance: random.Random) -> None:
    writer = chance.choice(place.writers)
    writer.kill()
    time.sleep(chance.uniform(0, 1))
    writer.start()


def kill_redis(place: Place, chance: random.Random) -> None:
    place.cluster.redis.kill()
    time.sleep(chance.uniform(0, 1))
    place.cluster.start_redis()


def kill_broker(place: Place, chance: random.Random) -> None:
    place.cluster.broker.kill()
    time.sleep(chance.uniform(0, 1))
    place.cluster.start_broker()


def zombie_trainer(place: Place, chance: random.Random) -> None:
    """The trainer stalls, another one takes over, and the first wakes up."""
    zombie = place.trainer
    if not zombie.alive():
        zombie.start()
        time.sleep(6)
    zombie.signal(signal.SIGSTOP)
    place.trainer = place.cluster.worker("trainer", "trainer", place.world.bundle.directory, PREFIX)
    place.trainer.start()
    time.sleep(chance.uniform(6, 8))
    zombie.signal(signal.SIGCONT)
    place.zombies.append(zombie)


def alien_in_the_group(place: Place, chance: random.Random) -> None:
    """A stranger joins the trainer's group, which is given partitions, and leaves again."""
    group = group_of(place.world.bundle, TOPICS.events)
    # Before this fault the broker may have been killed, and it may not be ready yet.
    with contextlib.suppress(Exception):
        with contextlib.closing(place.log.reader([TOPICS.events], group=group)) as stranger:
            stranger.poll(10, 1)


def disk_full(place: Place, chance: random.Random) -> None:
    place.trainer.kill()
    place.trainer.start("full")
    time.sleep(8)
    place.trainer.kill()
    place.trainer.start()


FAULTS = [
    kill_trainer,
    kill_inside_a_transaction,
    kill_writer,
    kill_redis,
    kill_broker,
    zombie_trainer,
    alien_in_the_group,
    disk_full,
]


def play(place: Place, number: int) -> str:
    """One round; returns what went wrong in it, in words."""
    chance = random.Random(number)
    # Every fault has its turn within eight rounds, and two more by chance.
    faults = [FAULTS[number % len(FAULTS)], FAULTS[(3 * number + 1) % len(FAULTS)], chance.choice(FAULTS)]
    sender = threading.Thread(target=place.send, args=(chance,))
    sender.start()
    for fault in faults:
        time.sleep(chance.uniform(0.2, 1.5))
        fault(place, chance)
    sender.join()
    place.wake_zombies()
    place.settle()
    _check(place)
    return ", ".join(fault.__name__.replace("_", " ") for fault in faults)


def _check(place: Place) -> None:
    log, bundle = place.log, place.world.bundle
    with contextlib.closing(RedisStore(place.cluster.redis_address)) as store:
        end = log.end_offsets(TOPICS.deltas)[0]

        def written() -> bool:
            for writer in place.writers:
                if not writer.alive():
                    writer.start()
            found = position_of(store, bundle.id, TOPICS.deltas)
            return (found or (0,))[0] >= end - 3

        until(written, seconds=180, doing="the writers' catching up")
        done = verify(log, bundle, store, TOPICS)
        assert done.difference == "", done.difference
        fold = Fold(log, bundle, TOPICS)
        fold.advance()
        stale = store.read_seqs(bundle.id, np.arange(bundle.schema.rows)) < fold.seqs
        assert stale.sum() == 0, f"{stale.sum()} stale rows"
    changes = [delta.decode(message.value) for message in log.read(TOPICS.deltas, 0, 0, end)]
    inputs = _inputs(log)
    taken = Counter(
        (source.topic, source.partition, offset)
        for change in changes
        for source in change.sources
        for offset in _between(inputs, source)
    )
    assert set(taken.values()) == {1}, "a message is in two batches"
    assert taken.keys() == inputs.keys(), "a message is in no batch"
    assert [change.seq for change in changes if change.sources] == list(range(1, fold.seq + 1)), "a batch is missing"
    calm = Step(bundle, TOPICS)
    applied = 0
    for change in changes:
        if change.sources:
            batch = [
                inputs[source.topic, source.partition, n] for source in change.sources for n in _between(inputs, source)
            ]
            applied += calm.apply(batch, poison=frozenset(change.poison)).events
    same = np.array_equal(calm.ranker.table.weight.numpy(), fold.weight)
    assert same, "the table is not the undisturbed run's"
    ids = {json.loads(m.value)["_event_id"] for m in inputs.values() if m.value.startswith(b'{"')}
    assert applied == len(ids) == place.sent, f"{place.sent} sent, {applied} applied"


def _inputs(log: KafkaLog) -> dict[tuple[str, int, int], Message]:
    return {
        (topic, partition, message.offset): message
        for topic in (TOPICS.items, TOPICS.events)
        for partition, stop in log.end_offsets(topic).items()
        for message in log.read(topic, partition, 0, stop)
    }


def _between(inputs: dict[tuple[str, int, int], Message], source: Source) -> list[int]:
    return [n for n in range(source.first, source.last + 1) if (source.topic, source.partition, n) in inputs]


def show_teeth(place: Place) -> int:
    """Without transactions there would have been duplicates: how many a reader of the uncommitted sees."""
    kill_inside_a_transaction_until_it_shows(place)
    place.settle()
    _check(place)
    return _uncommitted_repeats(place)


def kill_inside_a_transaction_until_it_shows(place: Place) -> None:
    chance = random.Random(77)
    for _ in range(4):
        sender = threading.Thread(target=place.send, args=(chance,))
        sender.start()
        kill_inside_a_transaction(place, chance)
        sender.join()
        if _uncommitted_repeats(place):
            break
    assert _uncommitted_repeats(place) > 0, "nothing died inside a transaction"


def _uncommitted_repeats(place: Place) -> int:
    """Counts the inputs that two batches hold, for a reader that ignores transactions."""
    consumer = KafkaConsumer(
        bootstrap_servers=place.cluster.kafka_address, isolation_level="read_uncommitted", enable_auto_commit=False
    )
    where = TopicPartition(TOPICS.deltas, 0)
    consumer.assign([where])
    end = consumer.end_offsets([where])[where]
    consumer.seek(where, 0)
    batches: Counter[tuple[str, int, int]] = Counter()
    give_up = time.monotonic() + 30
    while consumer.position(where) < end and time.monotonic() < give_up:
        for found in consumer.poll(timeout_ms=500).get(where, ()):
            for source in delta.decode(found.value).sources:
                batches[source.topic, source.partition, source.first] += 1
    consumer.close()
    return sum(count - 1 for count in batches.values())


def main() -> None:
    directory, rounds = Path(sys.argv[1]), int(sys.argv[2])
    # As the stream's processes do: with another number the network's sums are other ones in the last bit.
    one_thread()
    world = make_world(directory / "world")
    with (
        contextlib.closing(Cluster(directory / "cluster")) as cluster,
        contextlib.closing(Place(cluster, world)) as place,
    ):
        place.start()
        for number in range(rounds):
            began = time.monotonic()
            went_wrong = play(place, number)
            sys.stdout.write(f"round {number}: {went_wrong}; sound after {time.monotonic() - began:.0f} s\n")
            sys.stdout.flush()
        sys.stdout.write(f"uncommitted repeats: {show_teeth(place)}; committed: 0\n")


if __name__ == "__main__":
    main()
