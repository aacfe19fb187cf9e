"""The peers: messages between the processes of a stream. Every process makes the same calls in the same order."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from features.errors import RegistryError, StreamError, TesseraError, is_fault

Result = TypeVar("Result")


_ENDS = (RegistryError, StreamError)
"""Errors that must end the stream in all processes. All other faults may be those of a message."""


class PeerFaultError(TesseraError):
    """Fault of code or data in another process, which is a fault in all processes."""


class StreamPeers(Protocol):
    """Connections between N processes.

    Attributes:
        processes: Number N of processes.
        rank: Number of this process, 0 to N - 1.
    """

    processes: int
    rank: int

    def swap(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Sends one array (n, …) to each process, in their order, and returns one array of each process.

        All arrays of a call have one dtype and one shape after the first dimension.

        Raises:
            StreamError: A process went away.
        """
        ...

    def share(self, value: bytes) -> bytes:
        """Returns the value of process 0 in every process.

        Raises:
            StreamError: A process went away.
        """
        ...

    def gather(self, value: bytes) -> list[bytes]:
        """Returns the values of all processes, in their order, in every process.

        Raises:
            StreamError: A process went away.
        """
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


class NoPeers:
    """StreamPeers of a single process."""

    processes = 1
    rank = 0

    def swap(self, parts: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return list(parts)

    def share(self, value: bytes) -> bytes:
        return value

    def gather(self, value: bytes) -> list[bytes]:
        return [value]

    def close(self) -> None:
        """Does nothing."""


def together(peers: StreamPeers, work: Callable[[], Result]) -> Result:
    """Does the work in every process. If a fault of code or data occurs in one process, it occurs in all.

    All processes then go back to the same state. An error that is no such fault ends the process, and its peers see
    that it went away.

    Raises:
        PeerFaultError: The work had a fault in another process, and not here.
        StreamError: The work failed in another process, and the stream must end.
    """
    fault: BaseException | None = None
    result: list[Result] = []
    try:
        result.append(work())
    except BaseException as error:
        if not is_fault(error):
            raise
        fault = error
    sign = "" if fault is None else "end " if isinstance(fault, _ENDS) else "fault "
    told = peers.gather(b"" if fault is None else f"{sign}{type(fault).__name__}: {fault}".encode(errors="replace"))
    if fault is not None:
        raise fault
    if any(told):
        rank = next(number for number, text in enumerate(told) if text)
        sign, _, text = told[rank].decode(errors="replace").partition(" ")
        raise (StreamError if sign == "end" else PeerFaultError)(f"process {rank}: {text}")
    return result[0]


def concatenated(arrays: Sequence[NDArray[Any]], like: NDArray[Any]) -> NDArray[Any]:
    """Returns arrays in one, or an empty array of a shape after the first dimension."""
    return np.concatenate([like[:0], *arrays])
