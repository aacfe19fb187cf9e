"""An MLflow server of the tests' own, and a way to it that can be closed and opened again."""

import contextlib
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import httpx

from tests.servers import free_port


class MlflowServer:
    """The server, in a directory of its own; it answers after some seconds."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        command = [
            sys.executable, "-m", "mlflow", "server", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{directory / 'server.db'}",
            "--artifacts-destination", str(directory / "kept"),
        ]  # fmt: skip
        # Its jobs, which nothing here uses, are half a dozen processes that ask for work without end.
        quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (directory / "log").open("wb") as log:
            self._running = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log, env=quiet)

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        return False

    def close(self) -> None:
        """Ends it with the processes that it has begun."""
        os.killpg(self._running.pid, signal.SIGKILL)
        self._running.wait(20)


class Way:
    """The way to a port, by a port of its own, which can be closed and opened: a server that is away and comes back."""

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self._ends: list[socket.socket] = []
        self.port = free_port()
        self.open()

    def open(self) -> None:
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", self.port), self._handler(), False)
        self._server.allow_reuse_address = self._server.daemon_threads = True
        self._server.server_bind()
        self._server.server_activate()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for end in self._ends:
            # Those that are kept open for the next request end too.
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def _handler(self) -> type[socketserver.BaseRequestHandler]:
        behind, ends = self._behind, self._ends

        class Both(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with socket.create_connection(("127.0.0.1", behind)) as there:
                    ends.extend([self.request, there])
                    back = threading.Thread(target=_carry, args=(there, self.request), daemon=True)
                    back.start()
                    _carry(self.request, there)
                    back.join()

        return Both

    def __enter__(self) -> "Way":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _carry(source: socket.socket, to: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)
