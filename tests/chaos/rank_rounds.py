"""Rounds of deaths among several trainers of one stream, on a real broker.

    python -m tests.chaos.rank_rounds DIRECTORY KAFKA ROUNDS [SEED]

In each round events come in, and two to three times a process of the stream is killed by SIGKILL at a failpoint. After
each death all processes start again, with another number of processes. Then the stream is drained, and a judge compares
it with one process that does the log's steps without any death. Processes are forked from one that has loaded all
libraries, so a round takes seconds.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import TesseraError
from models.bundle import delta
from serving.store.memory import MemoryStore
from serving.store.verify import verify
from streaming.fold import Fold
from streaming.log.kafka import KafkaLog
from streaming.log.topics import Topics
from streaming.ranks.deal import Deal
from streaming.ranks.gloo import Card, GlooPeers
from streaming.ranks.pins import messages_of
from streaming.ranks.seat import Seat
from streaming.snapshot import Snapshots
from streaming.step import Step
from streaming.trainer import Trainer, TrainerOptions
from tessera.stream_service import open_writer
from tessera.terminal import one_thread
from tests.integration.world import World, make_world, open_world

P = 4
EVENTS = 120
PLACES = ("before pin", "after pin", "after step", "after produce", "after offsets", "after commit", "after batch")
LEADS = ("before pin", "after pin", "after offsets")
"""Failpoints that only the leader passes."""
_ROUND_S = 120


class Site:
    """Broker, bundle and directory of the rounds."""

    def __init__(self, directory: Path, kafka: str, topics: Topics) -> None:
        self.directory, self.kafka, self.topics = directory, kafka, topics

    def world(self) -> World:
        return open_world(self.directory / "world")


def train(site: Site, rank: int, count: int, port: int, death: tuple[int, str, int] | None) -> int:
    """Runs one process of the stream until the topics are drained. Returns the exit code."""
    one_thread()
    left = [death[2] if death else 0]

    def failpoint(at: str) -> None:
        if death is not None and (rank, at) == death[:2]:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    bundle = site.world().bundle
    try:
        peers = GlooPeers(Card(rank, count, bundle.id, site.topics.prefix, ""), "127.0.0.1", port)
        options = TrainerOptions(batch=24, wait_s=0.02, most_bad=1, snapshot_every_s=1.0, peers=peers)
        with contextlib.closing(KafkaLog(site.kafka)) as log:
            trainer = Trainer(
                log,
                bundle,
                topics=site.topics,
                options=options,
                snapshots=Snapshots(site.directory / f"{site.topics.prefix}snapshots"),
                failpoint=failpoint,
            )
            with contextlib.closing(trainer):
                if rank:
                    while trainer.follow():
                        pass
                    return 0
                while not trainer.drained():
                    trainer.run_once()
                trainer.end()
    except TesseraError as error:
        sys.stderr.write(f"process {rank} of {count}: {type(error).__name__}: {str(error)[:150]}\n")
        return 1
    return 0


class Judge:
    """Sends events, and compares the stream with one process that does the same steps without a death."""

    def __init__(self, site: Site) -> None:
        one_thread()
        self._site, self._world = site, site.world()
        self._topics, self._log = site.topics, KafkaLog(site.kafka)
        self._log.create_topics(site.topics.partitions())
        self._calm = Step(self._world.bundle, site.topics, seat=Seat(Deal(P)))
        self._fold = Fold(self._log, self._world.bundle, site.topics)
        self._read = [0] * P
        self._sent = self._taken = 0
        self._lines = self._world.messages(10_000)

    def send(self) -> None:
        """Sends the next events, keyed by user, one of them broken."""
        values = []
        for place in range(EVENTS):
            row = json.loads(self._lines[(self._sent + place) % len(self._lines)])
            row |= {"time": json.loads(self._lines[-1])["time"] + self._sent + place, "_event_id": self._sent + place}
            values.append((str(row["user_id"]).encode(), json.dumps(row).encode()))
        values[EVENTS // 2] = (b"x", b"{broken")
        self._log.append(self._topics.events, values)
        self._sent += EVENTS

    def check(self) -> str:
        """Returns the digest of table and optimizer state after all steps.

        Each message must be in one step, and each step must be in each range once, with the same inputs.
        """
        log, steps = self._log, []
        weight, state = self._calm.ranker.table.weight.numpy(), self._calm.ranker.table.accumulator.numpy()
        first = self._calm.seq + 1
        written: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for number in range(P):
            end = log.end_offsets(self._topics.deltas)[number]
            changes = [
                delta.decode(one.value) for one in log.read(self._topics.deltas, number, self._read[number], end)
            ]
            self._read[number] = end
            steps.append([(one.seq, one.sources, one.poison) for one in changes if one.sources])
            written |= {
                row: (one.vectors[place], one.states[place])
                for one in changes
                for place, row in enumerate(one.row_numbers.tolist())
            }
        assert all(own == steps[0] for own in steps), "the ranges have other steps"
        assert [seq for seq, _, _ in steps[0]] == list(range(first, first + len(steps[0]))), "a step is missing"
        for _, sources, poison in steps[0]:
            batch = messages_of(log, sources)
            self._taken += self._calm.apply(batch, poison=frozenset(poison)).rows
        assert self._taken == self._sent, f"{self._sent} messages sent, {self._taken} in steps"
        self._fold.advance()
        assert np.array_equal(self._fold.weight, weight), "the table is not the undisturbed run's"
        for row, (vector, accumulator) in written.items():
            assert np.array_equal(vector, weight[row]), f"row {row}"
            assert accumulator == state[row], f"optimizer state of row {row}"
        return hashlib.sha256(weight.tobytes() + state.tobytes()).hexdigest()[:16]

    def verify(self) -> str:
        """Returns the first difference between a store that was filled from the log and the fold."""
        store = MemoryStore()
        with contextlib.closing(open_writer(self._world.bundle, self._log, store, self._topics)) as writer:
            while writer.run_once(wait_s=0.5):
                pass
        return verify(self._log, self._world.bundle, store, self._topics).difference


def judge(site: Site, pipe: Connection) -> int:
    """Answers the driver until it says `end`."""
    own = Judge(site)
    while (asked := pipe.recv()) != "end":
        try:
            pipe.send(getattr(own, asked)())
        except BaseException as error:
            pipe.send(error)
            raise
    return 0


def forked(work: Callable[..., int], *arguments: Any) -> int:
    """Starts a process that does the work. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = work(*arguments)
    finally:
        sys.stderr.flush()
        os._exit(status)


def run(site: Site, count: int, death: tuple[int, str, int] | None) -> list[int]:
    """Runs N processes to their end. Returns the status of each; a process that does not end in time is an error."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    pids = [forked(train, site, rank, count, port, death) for rank in range(count)]
    status: dict[int, int] = {}
    deadline = time.monotonic() + _ROUND_S
    while len(status) < count:
        for pid in pids:
            if pid not in status:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    status[pid] = os.waitstatus_to_exitcode(code)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in status:
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"processes hang after {death} of {count}")
        time.sleep(0.02)
    return [status[pid] for pid in pids]


def play(site: Site, number: int, chance: random.Random, ask: Callable[[str], Any]) -> str:
    """Plays one round. Returns its deaths in words."""
    told = []
    ask("send")
    for turn in range(chance.randint(2, 3)):
        count = chance.choice((1, 2, 3, 4))
        place = PLACES[(number + 3 * turn) % len(PLACES)]
        death = (0 if place in LEADS else chance.randrange(count), place, chance.randrange(2))
        codes = run(site, count, death)
        told.append(f"{death[0]} of {count} {place}: {codes}")
        if all(code == 0 for code in codes):
            # The stream was drained before the failpoint came.
            ask("send")
    codes = run(site, chance.choice((1, 2, 3, 4)), None)
    assert not any(codes), codes
    return "; ".join(told)


def main() -> None:
    directory, kafka, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    seed = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    if not (directory / "world" / "made").exists():
        made = forked(lambda: make_world(directory / "world") is None)
        assert os.waitpid(made, 0)[1] == 0
    prefix = f"ranks-{os.getpid()}-"
    site = Site(directory, kafka, Topics(prefix, P))
    ours, theirs = multiprocessing.Pipe()
    forked(judge, site, theirs)

    def ask(what: str) -> Any:
        ours.send(what)
        answer = ours.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    deaths = 0
    for number in range(rounds):
        began = time.monotonic()
        told = play(site, number, random.Random(1_000 * seed + number), ask)
        deaths += told.count("-9")
        digest = ask("check")
        sys.stdout.write(f"round {number}: {told}; {digest} after {time.monotonic() - began:.0f} s\n")
        sys.stdout.flush()
    difference = ask("verify")
    ours.send("end")
    sys.stdout.write(f"deaths: {deaths}; verify: {difference or 'equal'}\n")
    assert deaths >= rounds, "too few deaths to prove anything"
    assert not difference


if __name__ == "__main__":
    main()
