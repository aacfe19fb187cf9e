"""`soak`: checks that the stream's memory stays flat and that it keeps up, for `--seconds`.

500 events a second on a real broker and a real Redis server, the stream in a process of its own.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from rich.console import Console

from features.dataset.descriptor import Dataset
from streaming.restore import group_of
from tessera.bench.harness.live_data import NEVER_LATE_S, await_deltas, live_data, servers, streaming
from tessera.bench.harness.result import BenchResult, at_most
from tessera.bench.harness.rows import measured_rows
from tessera.bench.online.stream_rates import settings_of_run

RATE = 500
_SAMPLES = 60
_SETTLED_S = 300.0
# Ids are remembered for as long, so memory would grow by them if it had no bound.
_BOUND_S = 240.0
_MICROSECONDS: dict[str | None, int] = {"s": 1_000_000, "ms": 1_000, "us": 1}


def soak(dataset: Dataset, out: Path, *, seeds: int, console: Console, seconds: float = 60.0) -> BenchResult:
    """Runs once, whatever the seeds; after the first five minutes, or half of a shorter run, memory must be flat."""
    settings = settings_of_run(servers("soak"), out, "soak")
    data = live_data(dataset, out, console)
    bundle = data.bundle
    file = out / "messages.jsonl"
    file.write_bytes(b"\n".join(data.messages))
    rows = measured_rows()
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        store.drop(bundle.id)
        log.create_topics(settings.topics.partitions())
        clock = _clock(dataset)
        lateness_s = _BOUND_S if clock else NEVER_LATE_S
        options = ("--lateness-s", str(lateness_s), "--snapshot-s", "60")
        with streaming(settings, bundle, *options, report=out / "soak.json") as process:
            log.append(settings.topics.events, [(None, data.messages[0])])
            await_deltas(log, settings.topics.deltas, above=0)
            environment = os.environ | {"TESSERA_TOPIC_PREFIX": settings.topics.prefix}
            command = [sys.executable, "-m", "tessera.bench.harness.pace", str(file), str(RATE), str(seconds), *clock]
            began = time.monotonic()
            with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as producer:
                while producer.poll() is None:
                    time.sleep(seconds / _SAMPLES)
                    end = log.end_offsets(settings.topics.events)[0]
                    group = group_of(bundle, settings.topics.events)
                    at = sum(log.committed([settings.topics.events], group=group).values())
                    rows.append(
                        {"second": time.monotonic() - began, "memory_mb": _memory_mb(process.pid), "lag": end - at}
                    )
        store.drop(bundle.id)
    document = msgspec.json.decode((out / "soak.json").read_bytes(), type=dict[str, object])
    settled = [row for row in rows if row["second"] >= min(_SETTLED_S, seconds / 2)]
    first, last = settled[0]["memory_mb"], max(row["memory_mb"] for row in settled)
    claims = [
        at_most("memory, growth after it settled", last / first - 1, 0.05),
        at_most("lag at the end, events", float(rows[-1]["lag"]), RATE),
        at_most("outages", float(str(document["outages"])), 0),
    ]
    return BenchResult("soak", dataset.name, 1, rows, claims)


def _clock(dataset: Dataset) -> tuple[str, ...]:
    """Returns the column and unit by which each message is given the present; none where its clock is no number."""
    time_ = dataset.events.time
    return (time_.column, str(_MICROSECONDS[time_.unit])) if time_ and time_.unit in _MICROSECONDS else ()


def _memory_mb(pid: int) -> float:
    """Returns the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
