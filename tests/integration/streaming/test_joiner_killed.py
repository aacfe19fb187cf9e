"""A joiner that is killed at any moment leaves the rows of an undisturbed run, on the embedded log and on Kafka."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from features.dataset.descriptor import Events
from features.shown.message import Impression, Outcome, encode
from streaming.log.kafka import KafkaLog
from streaming.log.protocol import EventLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.shown.joiner import Joiner

KILLS, IMPRESSIONS = 6, 1_500
AHEAD_MS = 3_600_000
EVENTS = Events.model_validate(
    {"from": "impressions", "path": "shown.jsonl", "outcomes_path": "done.jsonl", "window": "10s"}
)
WORKER = """
import sys
from pathlib import Path
from streaming.log.kafka import KafkaLog
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.shown import joiner
from tests.integration.streaming.test_joiner_killed import EVENTS, ahead

joiner._ROWS = 10
log = LocalLog(Path(sys.argv[2])) if sys.argv[1] == "embedded" else KafkaLog(sys.argv[2])
running = joiner.Joiner(log, EVENTS, Topics(sys.argv[3]), clock=ahead)
print("ready", flush=True)
running.drain()
print("done", flush=True)
"""


@dataclass(frozen=True)
class Beside(Topics):
    """Topics of a second joiner, which reads the inputs of the first and appends elsewhere."""

    @property
    def events(self) -> str:
        return f"{self.prefix}events-beside"

    @property
    def joins(self) -> str:
        return f"{self.prefix}joins-beside"


def ahead() -> int:
    """Returns a time at which every window has closed, milliseconds since 1970."""
    return time.time_ns() // 1_000_000 + AHEAD_MS


def fill(log: EventLog, topics: Topics) -> None:
    """Appends impressions with repeats, and outcomes of which some are lost, repeated or of other items."""
    draw, now = random.Random(7), time.time_ns() // 1_000_000
    shown, done = [], []
    for number in range(IMPRESSIONS):
        items = [f"i{draw.randrange(40)}" for _ in range(4)]
        one = Impression(f"r{number}", f"u{draw.randrange(9)}", now, "b", "m", items=items)
        shown += [one] * (1 if draw.random() < 0.9 else 2)
        for item in items:
            if draw.random() < 0.4:
                id = one.id if draw.random() < 0.95 else "lost"
                done += [Outcome(id, item, now + draw.choice([500, 20_000]))] * draw.choice([1, 1, 2])
    for start in range(0, len(shown), 500):
        batch = shown[start : start + 500]
        log.append(topics.impressions, [(one.id.encode(), encode(one)) for one in batch])
    log.append(topics.outcomes, [(one.impression.encode(), encode(one)) for one in done])


def rows(log: EventLog, topic: str) -> list[bytes]:
    ends = log.end_offsets(topic)
    return sorted(message.value for part, end in ends.items() for message in log.read(topic, part, 0, end))


def wait_for_rows(log: EventLog, topics: Topics, worker: subprocess.Popen[bytes], *, after: int) -> None:
    """Waits until the topic of rows ends after an offset, summed over its partitions, or the worker has ended."""
    give_up = time.monotonic() + 120
    while worker.poll() is None and sum(log.end_offsets(topics.events).values()) <= after:
        assert time.monotonic() < give_up, "the joiner appends no rows"
        time.sleep(0.005)


def test_a_killed_joiner_leaves_the_rows_of_an_undisturbed_run(
    log: EventLog, topics: Topics, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    embedded = isinstance(log, LocalLog)
    address = str(tmp_path / "log.db") if embedded else request.getfixturevalue("kafka_address")
    assert embedded or isinstance(log, KafkaLog)
    log.create_topics(topics.partitions(2))
    fill(log, topics)
    command = [sys.executable, "-c", WORKER, "embedded" if embedded else "kafka", address, topics.prefix]
    draw, kept = random.Random(3), [0]
    for turn in range(KILLS + 1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as worker:
            assert worker.stdout is not None
            before = sum(log.end_offsets(topics.events).values())
            assert worker.stdout.readline() == b"ready\n"
            if turn < KILLS:
                # Half of the kills come at any time, the others among the transactions with rows.
                if turn % 2:
                    wait_for_rows(log, topics, worker, after=before)
                time.sleep(draw.choice([0.0, 0.01, 0.05]))
                worker.send_signal(signal.SIGKILL)
                worker.wait()
                kept.append(len(rows(log, topics.events)))
            else:
                assert worker.stdout.read() == b"done\n"
                assert worker.wait() == 0
    beside = Beside(topics.prefix)
    log.create_topics({beside.events: 2})
    undisturbed = Joiner(log, EVENTS, beside, clock=ahead)
    undisturbed.drain()
    undisturbed.close()
    expected = rows(log, beside.events)
    assert len(expected) > 3 * IMPRESSIONS
    assert rows(log, topics.events) == expected
    # A kill came between the first row and the last.
    assert any(0 < count < len(expected) for count in kept), kept
