"""Shared parts of the online benchmarks: a bundle of a dataset, its held-back events as messages, the servers."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from features.dataset.descriptor import Dataset
from features.dataset.tables import load_events, message_columns
from features.errors import TesseraError
from features.jobs.messages import encode_rows
from models.bundle.bundle import Bundle
from streaming.log.protocol import EventLog
from streaming.log.topics import Topics
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import load_options
from tessera.pipeline.run import run
from tessera.settings import Settings

# Held-back events lie far apart or are sent again and again: none may count as late.
NEVER_LATE_S = 1e9


@dataclass(frozen=True)
class LiveData:
    """A bundle, and what it has not seen: messages in time order."""

    bundle: Bundle
    messages: list[bytes]


def live_data(dataset: Dataset, out: Path, console: Console, overrides: Sequence[str] = ()) -> LiveData:
    """Does the offline job where it is not done, and makes messages of the test part.

    Args:
        overrides: Values of `[run]` for this job, `NAME=VALUE` each.
    """
    options = load_options(dataset, overrides)
    result = run(dataset, out / dataset.name, options, console=console, registry=None, until="publish")
    assert result.bundle is not None
    test = read_frame(out / dataset.name / "frame").blocks("test").whole("event", "time")
    test = test.sort("time", "event", maintain_order=True)
    rows = message_columns(load_events(dataset), dataset.events)[test["event"].to_numpy()]
    return LiveData(result.bundle, encode_rows(rows))


def servers(name: str) -> Settings:
    """Returns the settings, which must name real servers, with topics of this benchmark alone.

    Raises:
        TesseraError: they do not.
    """
    settings = Settings.from_environment()
    if not settings.kafka or not settings.redis:
        raise TesseraError(
            f"bench {name} measures a real broker and a real Redis server: `make up`, then set TESSERA_KAFKA=host:port "
            "and TESSERA_REDIS=redis://host:port/0"
        )
    return replace(settings, topics=Topics(f"bench-{os.getpid()}-{time.time_ns() % 10**9}-"), storage="float16")


@contextlib.contextmanager
def streaming(settings: Settings, bundle: Bundle, *options: str, report: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`tessera stream` in a process of its own, ready to take messages; its JSON lies in `report` afterwards."""
    environment = os.environ | {
        "TESSERA_TOPIC_PREFIX": settings.topics.prefix,
        "TESSERA_STORAGE": settings.storage,
        "TESSERA_HOME": str(settings.home),
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "tessera", "stream", "--bundle", str(bundle.directory), "--json", *options]
    with report.open("wb") as out, subprocess.Popen(command, env=environment, stdout=out) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def await_deltas(log: EventLog, topic: str, *, above: int, seconds: float = 120) -> None:
    """Returns when the deltas' topic reaches beyond a position."""
    give_up = time.monotonic() + seconds
    while log.end_offsets(topic)[0] <= above:
        if time.monotonic() > give_up:
            raise TesseraError(f"the stream did not consume a message within {seconds:.0f} s; see its output")
        time.sleep(0.05)
