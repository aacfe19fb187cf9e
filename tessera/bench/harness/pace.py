"""Sends messages at a steady rate: `python -m tessera.bench.harness.pace FILE RATE SECONDS [COLUMN N]`.

FILE holds one message a line; they are sent again from the start when they are used up. With COLUMN each gets an id of
its own, and the present as its time, in units of N microseconds. Prints how many were sent, by how many milliseconds
the latest of them was overdue, and the start as Unix milliseconds. Message n of 1, 2, … is due n / RATE s after it.
"""

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from tessera.settings import Settings

_TICK_S = 0.005


def main() -> None:
    path, rate, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    messages: Iterator[bytes] = itertools.cycle(path.read_bytes().splitlines())
    if len(sys.argv) > 4:
        messages = _dated(path, sys.argv[4], int(sys.argv[5]))
    settings = Settings.from_environment()
    with contextlib.closing(settings.open_log()) as log:
        start, began_ms, sent, overdue = time.monotonic(), 1_000 * time.time(), 0, 0.0
        while (now := time.monotonic() - start) < seconds:
            due = int(now * rate) - sent
            if due > 0:
                overdue = max(overdue, now - (sent + 1) / rate)
                log.append(settings.topics.events, [(None, next(messages)) for _ in range(due)])
                sent += due
            time.sleep(max(0.0, _TICK_S - (time.monotonic() - start - now)))
    sys.stdout.write(f"{sent} {1_000 * overdue:.1f} {began_ms:.3f}\n")


def _dated(path: Path, column: str, microseconds: int) -> Iterator[bytes]:
    rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    run = time.time_ns()
    for number, row in enumerate(itertools.cycle(rows)):
        now = time.time_ns() // 1_000 // microseconds
        yield msgspec.json.encode(row | {column: now, "_event_id": f"{run}-{number}"})


if __name__ == "__main__":
    main()
