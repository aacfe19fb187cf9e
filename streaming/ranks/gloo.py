"""StreamPeers between processes by torch.distributed on gloo, and the meeting at which the processes agree to begin.

Before any collective call, each process writes what it is to a store at the leader's address. A process that is
missing, or that was started for another stream, is named before anything is written to the log.
"""

import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch._C._distributed_c10d import PrefixStore, TCPStore

from features.errors import StreamError

MEETING_S = 45.0
"""Longest wait for all processes to come, seconds."""
_STALL_S = 180.0
_POLL_S = 0.1
_REFUSED, _LINGER_S = "refused", 1.0


@dataclass(frozen=True)
class Card:
    """Description of a process that the others compare with their own. All but `rank` must be equal.

    Attributes:
        rank: Number of the process.
        processes: Number N of processes.
        bundle: Id of the bundle.
        prefix: Prefix of the topics.
        options: Options of the trainer that decide bits, as text.
    """

    rank: int
    processes: int
    bundle: str
    prefix: str
    options: str


class GlooPeers:
    """StreamPeers between the processes that met; see `StreamPeers` for the contract."""

    def __init__(self, card: Card, host: str, port: int, *, meeting_s: float = MEETING_S) -> None:
        """Meets the other processes; see `meet`."""
        self.rank, self.processes = card.rank, card.processes
        self._store = meet(card, host, port, meeting_s=meeting_s)
        with _named():
            dist.init_process_group(
                "gloo",
                store=PrefixStore("gloo", self._store),
                rank=card.rank,
                world_size=card.processes,
                timeout=timedelta(seconds=_STALL_S),
            )

    def swap(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        counts = torch.tensor([len(part) for part in parts])
        found = torch.empty_like(counts)
        sent = torch.from_numpy(np.concatenate(parts))
        with _named():
            dist.all_to_all_single(found, counts)
            received = torch.empty((int(found.sum()), *sent.shape[1:]), dtype=sent.dtype)
            dist.all_to_all_single(received, sent, found.tolist(), counts.tolist())
        return np.split(received.numpy(), np.cumsum(found.numpy())[:-1])

    def share(self, value: bytes) -> bytes:
        size = torch.tensor([len(value)])
        with _named():
            dist.broadcast(size, 0)
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == 0:
                data = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else data
            if len(data):
                dist.broadcast(data, 0)
        return data.numpy().tobytes()

    def gather(self, value: bytes) -> list[bytes]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.processes)]
        with _named():
            dist.all_gather(sizes, torch.tensor([len(value)]))
            longest = max(int(size) for size in sizes)
            if not longest:
                return [b""] * self.processes
            padded = torch.frombuffer(bytearray(value.ljust(longest, b"\0")), dtype=torch.uint8)
            found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.processes)]
            dist.all_gather(found, padded)
        return [data.numpy().tobytes()[: int(size)] for data, size in zip(found, sizes, strict=True)]

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


class _named:
    """Turns a failed call of gloo into a StreamError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RuntimeError):
            raise StreamError(
                f"another process of the stream went away, or did not answer for {_STALL_S:.0f} s; its own output says "
                "why. Start all processes again: the stream goes on from the log"
            ) from error


def meet(card: Card, host: str, port: int, *, meeting_s: float = MEETING_S) -> TCPStore:
    """Waits until all processes have come, and compares their cards with this one.

    Args:
        card: This process.
        host: Address of the leader.
        port: Port of the leader's machine at which the processes meet.
        meeting_s: Longest wait for all processes, seconds.

    Raises:
        StreamError: A process did not come, or came for another stream.
    """
    me, where = f"process {card.rank} of {card.processes}", f"{host}:{port}"
    leads = card.rank == 0
    try:
        store = _store(host, port, leads, timedelta(seconds=meeting_s))
        if store.add(f"came {card.rank}", 1) > 1:
            raise StreamError(
                f"{me}: another process {card.rank} is at {where} already; end it, or give another --meet"
            )
        try:
            _compare(store, card, me, where, meeting_s)
        except StreamError as error:
            store.set(_REFUSED, str(error))
            if leads:
                # The store ends with the leader, and the others shall read why.
                time.sleep(_LINGER_S)
            raise
    except (RuntimeError, OSError) as error:
        fault = "the port is taken" if leads else "process 0 did not come, or went away"
        raise StreamError(
            f"{me}: no meeting at {where}, waited for at most {meeting_s:.0f} s: {fault}; start process 0 first, or "
            "give another port with --meet"
        ) from error
    return store


def _store(host: str, port: int, leads: bool, wait: timedelta) -> TCPStore:
    """Opens the store of the meeting. The leader's listens at the host's address, and at no other of the machine."""
    if not leads:
        return TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.create_server(address, family=family) as listening:
        # The store closes the file that it is given.
        own = os.dup(listening.fileno())
    return TCPStore(host, port, is_master=True, timeout=wait, wait_for_workers=False, master_listen_fd=own)


def _compare(store: TCPStore, card: Card, me: str, where: str, meeting_s: float) -> None:
    store.set(f"card {card.rank}", json.dumps(asdict(card)))
    deadline = time.monotonic() + meeting_s
    missing = set(range(card.processes))
    while missing:
        if store.check([_REFUSED]):
            raise StreamError(store.get(_REFUSED).decode())
        for rank in sorted(missing):
            if store.check([f"card {rank}"]):
                _same(card, Card(**json.loads(store.get(f"card {rank}"))), me)
                missing.remove(rank)
        if missing and time.monotonic() > deadline:
            listed = ", ".join(map(str, sorted(missing)))
            raise StreamError(
                f"{me}: process {listed} did not come to {where} within {meeting_s:.0f} s; start it with the same "
                "--processes and --meet, or start fewer processes"
            )
        if missing:
            time.sleep(_POLL_S)


def _same(card: Card, other: Card, me: str) -> None:
    for name in ("processes", "bundle", "prefix", "options"):
        here, there = getattr(card, name), getattr(other, name)
        if here != there:
            raise StreamError(
                f"{me}: its {name} is {here!r}, that of process {other.rank} is {there!r}; end all processes and start "
                "them with the same options"
            )
