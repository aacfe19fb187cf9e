"""The command line in a process that has loaded its libraries, for tests of many commands in a row.

Loading takes longer than most commands do. One process loads once and forks for each command: the same entry point,
with the caller's arguments, environment, directory and standard streams. A script of a few lines, `tessera` on the
PATH, asks for it, passes signals on and ends as the command ended.
"""

import atexit
import contextlib
import gc
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

_ROOT = Path(__file__).parents[2]
# What a process decides when it starts. A pool of threads that is there before a fork would be missing after it.
_FIXED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
_LOADED = (
    "mlflow.store.tracking.sqlalchemy_store",
    "uvicorn",
    "serving.api.app",
    "serving.store.redis.store",
    "streaming.log.kafka",
    "tessera.cli.main",
    "serving.traffic.follow",
    "tessera.stream_service",
    "tessera.pipeline.run",
)
# Nothing here may import what takes time. The first reply is the command's pid, the second its status.
_SCRIPT = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = {{"arguments": sys.argv[1:], "directory": os.getcwd(), "environment": dict(os.environ)}}
    asked = json.dumps(asked).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(asked)
    replies = server.makefile("r")
    pid = int(replies.readline())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    sys.exit(int(replies.readline() or 1))
"""


class _Asked(msgspec.Struct):
    arguments: list[str]
    directory: str
    environment: dict[str, str]


@contextlib.contextmanager
def warm_tessera(directory: Path) -> Iterator[Path]:
    """A directory for the PATH whose `tessera` starts at once.

    Args:
        directory: short, since the path of a socket in it may have about a hundred characters.
    """
    address = directory / "socket"
    script = directory / "bin" / "tessera"
    script.parent.mkdir()
    script.write_text(_SCRIPT.format(python=sys.executable, address=str(address)))
    script.chmod(0o755)
    command = [sys.executable, "-m", "tests.integration.warm", str(address)]
    server = subprocess.Popen(command, env=os.environ | _FIXED, cwd=_ROOT, start_new_session=True)
    try:
        give_up = time.monotonic() + 60
        while not address.exists():
            assert server.poll() is None, "the process that loads the libraries did not start"
            assert time.monotonic() < give_up, "the process that loads the libraries does not listen"
            time.sleep(0.05)
        yield script.parent
    finally:
        # With it, whatever commands still run: they are of its group.
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def main(address: str) -> None:
    """Listens first and loads then, so that an early caller waits."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    for name in _LOADED:
        importlib.import_module(name)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    while True:
        caller, _ = listening.accept()
        if os.fork():
            caller.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _answer(caller)


def _answer(caller: socket.socket) -> NoReturn:
    """Starts a command and tells how it ended."""
    size, streams, _, _ = socket.recv_fds(caller, 4, 3)
    with caller.makefile("rb") as reader:
        asked = msgspec.json.decode(reader.read(int.from_bytes(size, "big")), type=_Asked)
    if command := os.fork():
        for stream in streams:
            os.close(stream)
        caller.sendall(f"{command}\n".encode())
        _, status = os.waitpid(command, 0)
        caller.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())
        os._exit(0)
    caller.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked.directory)
    os.environ.clear()
    os.environ.update(asked.environment)
    sys.argv = ["tessera", *asked.arguments]
    if faults := os.environ.get("TESSERA_REHEARSAL_FAULTS"):
        importlib.import_module("tests.rehearsal.faults").install(faults)
    os._exit(_status())


def _status() -> int:
    """Does the command; what the interpreter would do at its end is done, but for taking everything loaded apart."""
    from tessera.cli.main import main as command_line

    status = 1
    try:
        command_line()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main(sys.argv[1])
