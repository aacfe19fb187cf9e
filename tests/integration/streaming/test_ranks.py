"""Laws of several trainers: no bit of the table depends on their number, and a fault of one is a fault of all."""

import hashlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch

from features.errors import LogError, StreamError
from models.bundle import delta
from serving.background import Rounds
from serving.metrics import Metrics
from serving.ranking.mirror import Mirror
from serving.ranking.mirror_feed import mirror_feed
from serving.store.fill import fill_store
from serving.store.lag import deltas_behind
from serving.store.memory import MemoryStore
from serving.store.verify import replay, verify
from serving.store.writer import position_of
from streaming.fold import Fold
from streaming.log.protocol import EventLog, Message, ends_of
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.ranks.deal import Deal
from streaming.ranks.gloo import Card, meet
from streaming.ranks.peers import PeerFaultError, together
from streaming.ranks.pins import messages_of
from streaming.ranks.seat import Seat
from streaming.snapshot import Snapshots
from streaming.step import Step
from streaming.step_result import StepResult
from streaming.trainer import Trainer, TrainerOptions
from tessera.stream_service import StreamConnections, StreamService
from tessera.terminal import one_thread
from tests.integration.world import World
from tests.servers import free_port

P = 4
TOPICS = Topics("ranks-")


class Threads:
    """StreamPeers between threads of one process, for laws without sockets."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=60)
        self.board: list[Any] = [None] * count

    def of(self, rank: int) -> "ThreadPeers":
        return ThreadPeers(self, rank)


class ThreadPeers:
    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads, self._rank = threads, rank
        self.rank, self.processes = rank, len(threads.board)

    def _post(self, value: Any) -> list[Any]:
        try:
            self._threads.board[self._rank] = value
            self._threads.barrier.wait()
            found = list(self._threads.board)
            self._threads.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise StreamError("another process went away") from error
        return found

    def swap(self, parts: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [sent[self._rank].copy() for sent in self._post(list(parts))]

    def share(self, value: bytes) -> bytes:
        return bytes(self._post(value)[0])

    def gather(self, value: bytes) -> list[bytes]:
        return self._post(value)

    def close(self) -> None: ...


def in_processes(count: int, work: Callable[[Seat], Any], *, partitions: int = P) -> list[Any]:
    """Runs the work of each rank in a thread."""
    threads = Threads(count)
    seats = [Seat(Deal(partitions, count, rank), threads.of(rank)) for rank in range(count)]

    def alone(seat: Seat) -> Any:
        # The number of threads is each thread's own.
        one_thread()
        return work(seat)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(alone, seats))


class Crash(BaseException):
    """Death of one process: its peers see a broken barrier, as they would see a closed connection."""


def stream(
    world: World,
    log: EventLog,
    count: int,
    failpoint: Callable[[int, str], None] = lambda rank, at: None,
    batch: int = 40,
) -> str:
    """Drains a log by N trainers in threads. Returns the sha256 of table and optimizer state."""

    def work(seat: Seat) -> tuple[Any, Any] | None:
        peers, rank = seat.peers, seat.deal.rank
        options = TrainerOptions(batch=batch, wait_s=0.0, most_bad=1, peers=peers)
        try:
            with closing(
                Trainer(log, world.bundle, topics=TOPICS, options=options, failpoint=lambda at: failpoint(rank, at))
            ) as trainer:
                if rank == 0:
                    while not trainer.drained():
                        trainer.run_once()
                    trainer.end()
                else:
                    while trainer.follow():
                        pass
                return trainer.step.ranker.table.weight.numpy(), trainer.step.ranker.table.accumulator.numpy()
        except (Crash, StreamError) as error:
            if isinstance(error, StreamError) and "went away" not in str(error):
                raise
            peers._threads.barrier.abort()  # type: ignore[attr-defined]
            return None

    found = in_processes(count, work)
    return "" if None in found else digest_of(found)


def digest_of(tables: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for place in (0, 1):
        for one in tables:
            digest.update(one[place].tobytes())
    return digest.hexdigest()


MESSAGES = 301


def filled(path: Path, world: World) -> LocalLog:
    log = LocalLog(path)
    log.create_topics(Topics(TOPICS.prefix, P).partitions())
    lines = world.messages(MESSAGES - 1)
    keyed = [(str(json.loads(line)["user_id"]).encode(), line) for line in lines]
    log.append(TOPICS.events, [*keyed[:57], (b"x", b"{broken"), *keyed[57:]])
    return log


def test_every_number_of_trainers_leaves_the_same_table_and_the_same_log(world: World, tmp_path: Path) -> None:
    found = {}
    for count in (1, 2, 4):
        with closing(filled(tmp_path / f"{count}.db", world)) as log:
            digest = stream(world, log, count)
            deltas = [
                m.value for n in range(P) for m in log.read(TOPICS.deltas, n, 0, log.end_offsets(TOPICS.deltas)[n])
            ]
            fold = Fold(log, world.bundle, TOPICS)
            fold.advance()
            assert fold.seq == 8
            found[count] = digest, without_times(deltas), fold.weight.tobytes()
    assert found[1] == found[2] == found[4]


def without_times(deltas: Sequence[bytes]) -> list[Any]:
    return [msgspec.structs.replace(delta.decode(one), times_ms=[]) for one in deltas]


PLACES = ("before pin", "after pin", "after step", "after produce", "after offsets", "after commit", "after batch")


@pytest.mark.parametrize("seed", range(int(os.environ.get("RANKS_ROUNDS", "3"))))
def test_a_death_of_any_process_at_any_point_loses_nothing(world: World, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with closing(filled(tmp_path / "log.db", world)) as log:
        count, deaths = chance.choice((1, 2, 3, 4)), []
        for number in range(4):
            place = PLACES[(4 * seed + number) % len(PLACES)]
            dies = 0 if place in LEADS else chance.randrange(count)
            left = [chance.randrange(2)]

            def failpoint(rank: int, at: str, dies: int = dies, place: str = place, left: list[int] = left) -> None:
                if (rank, at) == (dies, place):
                    left[0] -= 1
                    if left[0] < 0:
                        raise Crash

            # Another size of batches, so that a step that is done again could get other inputs.
            if not stream(world, log, count, failpoint, batch=chance.randint(20, 60)):
                deaths.append((count, dies, place))
            count = chance.choice((1, 2, 3, 4))
        assert len(deaths) > 1
        assert stream(world, log, count) == undisturbed(world, log), deaths


LEADS = ("before pin", "after pin", "after offsets")


def undisturbed(world: World, log: EventLog) -> str:
    """Returns the digest of the log's steps, done by one process. Each message must be in one step of each range."""
    one_thread()
    steps = []
    for number in range(P):
        changes = [delta.decode(one.value) for one in log.read(TOPICS.deltas, number, 0, 1 << 40)]
        steps.append([change for change in changes if change.sources])
        assert [one.seq for one in steps[-1]] == list(range(1, len(steps[-1]) + 1)), "a step is missing, or is twice"
    assert [[(one.seq, one.sources, one.poison) for one in own] for own in steps] == [
        [(one.seq, one.sources, one.poison) for one in steps[0]]
    ] * P
    calm, taken = Step(world.bundle, TOPICS, seat=Seat(Deal(P))), 0
    for one in steps[0]:
        batch = messages_of(log, one.sources)
        taken += calm.apply(batch, poison=frozenset(one.poison)).rows
    assert taken == sum(log.end_offsets(TOPICS.events).values()) == MESSAGES
    table = calm.ranker.table
    return digest_of([(table.weight.numpy(), table.accumulator.numpy())])


def batches(world: World, count: int = 240, each: int = 40) -> list[list[Message]]:
    """Events in two batches or more, keyed by user as a log would, with offsets of their partitions."""
    ends = [0] * P
    messages = []
    for value in world.messages(count):
        part = int(hashlib.sha256(str(json.loads(value)["user_id"]).encode()).hexdigest(), 16) % P
        messages.append(Message(TOPICS.events, part, ends[part], None, value, 2_000_000_000_000))
        ends[part] += 1
    return [messages[start : start + each] for start in range(0, count, each)]


def state_of(world: World, count: int, parts: Sequence[Sequence[Message]]) -> tuple[list[bytes], str]:
    """Returns the deltas by range, and the sha256 of table and optimizer state, after N processes did the batches."""

    def work(seat: Seat) -> tuple[list[list[tuple[int, bytes]]], torch.Tensor, torch.Tensor]:
        step = Step(world.bundle, TOPICS, seat=seat)
        done: list[StepResult] = [step.apply(batch) for batch in parts]
        table = step.ranker.table
        return [list(zip(one.ranges, one.payloads, strict=True)) for one in done], table.weight, table.accumulator

    found = in_processes(count, work)
    written = [payload for step in range(len(parts)) for deltas, _, _ in found for _, payload in sorted(deltas[step])]
    digest = hashlib.sha256()
    for place in (1, 2):
        for one in found:
            digest.update(one[place].numpy().tobytes())
    return written, digest.hexdigest()


def test_no_bit_depends_on_the_number_of_processes(world: World) -> None:
    parts = batches(world)
    one, two, three, four = (state_of(world, count, parts) for count in (1, 2, 3, 4))
    assert one[1] == two[1] == three[1] == four[1]
    assert one[0] == two[0] == three[0] == four[0]


def test_several_partitions_learn_what_one_partition_learns(world: World) -> None:
    whole, ranged = Step(world.bundle, TOPICS), Step(world.bundle, TOPICS, seat=Seat(Deal(P)))
    start = whole.ranker.table.weight.clone()
    for batch in batches(world):
        first, second = whole.apply(batch), ranged.apply(batch)
        assert (first.events, first.rows) == (second.events, second.rows)
    moved = (whole.ranker.table.weight - start).abs().max()
    assert moved > 0.01
    assert torch.allclose(whole.ranker.table.weight, ranged.ranker.table.weight, atol=1e-5)
    assert torch.allclose(whole.ranker.table.accumulator, ranged.ranker.table.accumulator, rtol=1e-4, atol=1e-9)


def test_a_fault_of_one_process_is_a_fault_of_all() -> None:
    def work(seat: Seat) -> str:
        def fail() -> None:
            if seat.deal.rank == 1:
                raise ValueError("a bad row")

        with pytest.raises((ValueError, PeerFaultError)) as raised:
            together(seat.peers, fail)
        return str(raised.value)

    assert in_processes(3, work) == [
        "process 1: ValueError: a bad row",
        "a bad row",
        "process 1: ValueError: a bad row",
    ]


def test_each_partition_has_one_process_and_each_row_one_range() -> None:
    for partitions in range(1, 9):
        for processes in range(1, partitions + 1):
            deals = [Deal(partitions, processes, rank) for rank in range(processes)]
            assert [part for deal in deals for part in deal.own] == list(range(partitions))
            for rows in (partitions, 100, 101):
                own = [deal.own_rows(rows) for deal in deals]
                assert [row for one in own for row in range(one.low, one.high)] == list(range(rows))
                assert deals[0].edges(rows).tolist() == [*(one.low for one in own), rows]


def test_more_processes_than_partitions_are_refused() -> None:
    with pytest.raises(StreamError, match="5 processes, but the deltas' topic has 4 partitions"):
        Deal(4, 5, 0)


def refusals(*cards: Card, meeting_s: float = 2.0) -> list[str]:
    """Returns the error of each process at a meeting, "" if there is none."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    stores = []

    def come(card: Card) -> str:
        try:
            stores.append(meet(card, "127.0.0.1", port, meeting_s=meeting_s))
        except StreamError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(cards)) as pool:
        return list(pool.map(come, cards))


def card(rank: int, processes: int, **other: str) -> Card:
    return Card(rank, processes, other.get("bundle", "b"), "", other.get("options", ""))


def test_processes_of_one_stream_meet() -> None:
    assert refusals(card(0, 3), card(1, 3), card(2, 3), meeting_s=20) == ["", "", ""]


def test_the_leader_listens_at_the_address_of_the_meeting_alone() -> None:
    port = free_port()
    store = meet(card(0, 1), "127.0.0.1", port, meeting_s=20)
    found = [one.laddr for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [host for host, own in found if own == port] == ["127.0.0.1"]
    del store


def test_a_process_that_does_not_come_is_named() -> None:
    for told in refusals(card(0, 3), card(2, 3)):
        assert "process 1 did not come to 127.0.0.1:" in told
    (alone,) = refusals(card(1, 2))
    assert "process 0 did not come" in alone


def test_a_process_of_another_start_is_named() -> None:
    for told in refusals(card(0, 4), card(1, 2)):
        assert "its processes is" in told
    told = refusals(card(0, 2), card(1, 2, options="lateness 60"))[0]
    assert "its options is" in told
    assert "lateness 60" in told
    told = "".join(refusals(card(0, 2), card(1, 2), card(1, 2)))
    assert "another process 1 is at 127.0.0.1:" in told


def test_a_setting_that_differs_from_the_topics_is_named(world: World, tmp_path: Path) -> None:
    with closing(filled(tmp_path / "log.db", world)) as log:
        with pytest.raises(StreamError, match="TESSERA_PARTITIONS=2, but ranks-deltas has 4 partitions"):
            Trainer(log, world.bundle, topics=Topics(TOPICS.prefix, 2))


def test_a_lost_topic_of_steps_is_named(world: World, tmp_path: Path) -> None:
    with closing(filled(tmp_path / "log.db", world)) as log:
        stream(world, log, 2)
        assert TOPICS.steps in Topics(TOPICS.prefix, P).partitions()
        other = Topics("other-", P)
        log.create_topics(other.partitions())
        for number in range(P):
            with log.transactor("copy").begin() as transaction:
                for one in log.read(TOPICS.deltas, number, 0, 1 << 40):
                    transaction.append(other.deltas, one.value, partition=number)
        with pytest.raises(LogError, match="the last pinned step is 0; a topic was deleted"):
            Trainer(log, world.bundle, topics=other)


def test_poison_of_one_partition_is_found_by_all_processes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = Step._shares

    def failing(self: Step, assembler: Any, examples: Any, partitions: np.ndarray) -> Any:
        # The owner of partition 3 alone fails, at each event of the partition.
        if 3 in self.seat.deal.own and (partitions == 3).any():
            raise ValueError("partition 3")
        return shares(self, assembler, examples, partitions)

    monkeypatch.setattr(Step, "_shares", failing)
    found = {}
    for count in (1, 4):
        with closing(LocalLog(tmp_path / f"{count}.db")) as log:
            log.create_topics(Topics(TOPICS.prefix, P).partitions())
            with log.transactor("send").begin() as transaction:
                for number, line in enumerate(world.messages(12)):
                    transaction.append(TOPICS.events, line, partition=3 if number in (4, 9) else number % 3)
            digest = stream(world, log, count)
            ends = log.end_offsets(TOPICS.deltas)
            changes = [delta.decode(one.value) for n in range(P) for one in log.read(TOPICS.deltas, n, 0, ends[n])]
            assert [change.poison for change in changes] == [[(TOPICS.events, 3, 0), (TOPICS.events, 3, 1)]] * P
            letters = list(log.read(TOPICS.dead_letters, 0, 0, 10))
            assert len(letters) == 2
            found[count] = digest
    assert found[1] == found[4] != ""


def test_store_mirror_and_replay_follow_every_partition(world: World, tmp_path: Path) -> None:
    bundle = world.bundle
    with closing(filled(tmp_path / "log.db", world)) as log:
        store = MemoryStore()
        connections = StreamConnections.shared(log, store, topics=TOPICS, snapshots=Snapshots(tmp_path / "kept"))
        StreamService(bundle, connections, TrainerOptions(batch=40, wait_s=0.0, most_bad=1)).once()
        ends = ends_of(log, TOPICS.deltas)
        assert position_of(store, bundle.id, TOPICS.deltas) == ends == (8, 8, 8, 8)
        assert deltas_behind(log, store, bundle, TOPICS) == (0, None)
        assert verify(log, bundle, store, TOPICS).difference == ""
        (snapshot,) = [Snapshots(tmp_path / "kept").newest(bundle)]
        assert snapshot is not None
        assert snapshot.deltas == ends
        again = MemoryStore()
        replay(log, bundle, again, TOPICS, snapshot)
        assert verify(log, bundle, again, TOPICS).difference == ""
        late = MemoryStore()
        fill_store(late, bundle, storage="float32")
        mirror, rows = Mirror(late, bundle.id, bundle.schema.aggregates), np.arange(bundle.schema.rows)
        with mirror_feed(lambda: LocalLog(tmp_path / "log.db"), TOPICS.deltas, mirror, (), Rounds("m", "m", Metrics())):
            until = time.monotonic() + 60
            while not np.array_equal(mirror.read_rows(rows), store.read_rows(bundle.id, rows)):
                assert time.monotonic() < until
                time.sleep(0.05)
