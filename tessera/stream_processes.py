"""Several processes that train one stream, started on this machine by `tessera stream --processes`.

The parent starts the processes and watches them. Process 0 leads and gets the signals. If a process dies, the parent
ends the others and names it. Nothing is lost: the same command goes on from the log, with any number of processes.
While the log does not answer, the parent starts all processes again and again.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from features.collector import frozen_heap
from features.errors import StreamError
from models.bundle.bundle import Bundle
from models.sharded.loopback import INTERFACE, loopback
from streaming.ranks.deal import Deal
from streaming.ranks.gloo import MEETING_S, Card, GlooPeers
from streaming.trainer import Trainer, TrainerOptions
from tessera.settings import Settings
from tessera.stream_service import StreamConnections

_HOST = "127.0.0.1"
_POLL_S = 0.1
_END_S = 20.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_LOGGER = logging.getLogger(__name__)

OUTAGE = 75
"""Exit status of a process whose log does not answer: EX_TEMPFAIL of sysexits.h."""


def run_processes(settings: Settings, count: int, options: Sequence[str]) -> None:
    """Runs the processes of a stream to their end.

    Args:
        settings: Addresses.
        count: Number of processes.
        options: Options of `tessera stream` for every process.

    Raises:
        StreamError: There are more processes than partitions, or a process died.
        LogError: The log does not answer at the start.
    """
    with contextlib.closing(settings.open_log()) as log:
        log.create_topics(settings.topics.partitions())
        Deal(len(log.end_offsets(settings.topics.deltas)), count)
    processes: list[subprocess.Popen[bytes]] = []
    pause = _FIRST_PAUSE_S
    with _passed_on(processes) as ended:
        while not ended.is_set():
            began = time.monotonic()
            if not _outage(processes, count, options):
                return
            pause = _FIRST_PAUSE_S if time.monotonic() - began > _END_S else min(2 * pause, _LONGEST_PAUSE_S)
            _LOGGER.warning("the %d processes wait: %s does not answer", count, settings.kafka or settings.home)
            ended.wait(pause)


def _outage(processes: list["subprocess.Popen[bytes]"], count: int, options: Sequence[str]) -> bool:
    """Runs the processes to their end. Returns True if they ended since the log does not answer.

    Args:
        processes: Gets the processes.
        count: Number of processes.
        options: Options of `tessera stream` for every process.

    Raises:
        StreamError: A process died.
    """
    processes.clear()
    meet = f"{_HOST}:{_free_port()}"
    # A lost peer is an error of ours in one line, and not also one of torch in forty.
    environment = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR", INTERFACE: loopback()}
    with _ended(processes):
        for rank in range(count):
            command = [sys.executable, "-m", "tessera", "stream", *options]
            command += ["--processes", str(count), "--rank", str(rank), "--meet", meet]
            # The processes of one machine have one port for metrics, which is the leader's.
            command += [] if rank == 0 else ["--metrics-port", "0"]
            output = None if rank == 0 else subprocess.DEVNULL
            # A session of its own: Ctrl-C goes to the parent alone, which tells the leader.
            processes.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, start_new_session=True, env=environment
                )
            )
        return _watch(processes)


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Returns options of the command line from their names and values. True is a flag, None and False are left out."""
    found: list[str] = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            found.append(option)
        elif isinstance(value, list):
            found += [text for one in value for text in (option, str(one))]
        elif value is not None and value is not False:
            found += [option, str(value)]
    return found


def peers_of(settings: Settings, bundle: Bundle, options: TrainerOptions, place: tuple[int, int, str]) -> GlooPeers:
    """Returns the connections of this process after it has met the others.

    Args:
        settings: Names of the topics.
        bundle: Bundle of the stream.
        options: Options of the trainer.
        place: Number of this process, number of processes, and HOST:PORT of the meeting.

    Raises:
        StreamError: The address is none, or a process did not come or came for another stream.
        TesseraError: TESSERA_MEET_S is no number of seconds.
    """
    rank, count, meet = place
    host, _, port = meet.rpartition(":")
    if not host or not port.isdigit():
        raise StreamError(f"--meet {meet}: expected HOST:PORT, the address of process 0 for the others")
    # The leader alone decides how a batch is cut.
    decides = f"lateness {options.lateness_s}, rate {options.learning_rate}, most bad {options.most_bad}"
    card = Card(rank, count, bundle.id, settings.topics.prefix, decides)
    return GlooPeers(card, host, int(port), meeting_s=settings.seconds_to_meet(MEETING_S))


def follow_leader(bundle: Bundle, connections: StreamConnections, options: TrainerOptions) -> None:
    """Trains this process's share until the leader ends the stream. Signals that ask for an end go to the leader."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with connections.log() as log:
        trainer = Trainer(
            log,
            bundle,
            topics=connections.topics,
            options=options,
            snapshots=connections.snapshots,
            schemas=connections.schemas,
        )
        with contextlib.closing(trainer), frozen_heap():
            while trainer.follow():
                pass


def _watch(processes: Sequence["subprocess.Popen[bytes]"]) -> bool:
    """Waits until all processes have ended. Returns True if the log did not answer. Raises StreamError if one died."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        time.sleep(_POLL_S)
    # A process whose peer died ends by itself.
    deadline = time.monotonic() + _END_S
    while any(process.poll() is None for process in processes) and any(process.poll() for process in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    killed = [rank for rank, process in enumerate(processes) if (process.returncode or 0) < 0]
    failed = [rank for rank, process in enumerate(processes) if (process.returncode or 0) > 0]
    if not killed and not failed:
        return False
    # The peers of a process that lost the log lose that process.
    if not killed and any(processes[rank].returncode == OUTAGE for rank in failed):
        return True
    rank = (killed or failed)[0]
    code = processes[rank].returncode
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    raise StreamError(
        f"process {rank} of {len(processes)} (pid {processes[rank].pid}) {ended}, so the others were ended. Nothing is "
        "lost: the same command goes on from the log, with this or another number of processes"
    )


@contextlib.contextmanager
def _ended(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Ends the processes that still run when the body ends."""
    try:
        yield
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for process in processes:
            process.wait()


@contextlib.contextmanager
def _passed_on(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[threading.Event]:
    """Passes SIGINT and SIGTERM on to the leader as SIGTERM while the body runs. Yields what the signals set."""
    ended = threading.Event()

    def tell(*_: object) -> None:
        ended.set()
        if processes and processes[0].poll() is None:
            processes[0].send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind((_HOST, 0))
        port: int = listening.getsockname()[1]
        return port
