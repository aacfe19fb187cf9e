"""A server process with keys of its own, for tests over HTTP."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from tests.integration.world import World
from tests.servers import free_port


class Served:
    """A server, its keys and its home.

    Args:
        world: World whose bundle is served.
        home: Home of the server.
        options: Options of the command.
        bundle: True serves the bundle, False the champion of the home's registry.
    """

    def __init__(self, world: World, home: Path, *options: str, bundle: bool = True) -> None:
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TESSERA_", "MLFLOW_"))
        } | {"TESSERA_HOME": str(home), "OMP_WAIT_POLICY": "passive"}
        self.reader, self.writer = self._key("reader", "read"), self._key("writer", "write")
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = home / "serve.log"
        with self.log.open("wb") as log:
            chosen = ["--bundle", str(world.bundle.directory)] if bundle else []
            command = ["serve", *chosen, "--port", str(port), *options]
            self.process = self._start(*command, stderr=log)
        give_up = time.monotonic() + 150
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.1)

    def _start(self, *arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "tessera", *arguments], env=self.environment, **streams)

    def _key(self, name: str, scope: str) -> str:
        with self._start("keys", "add", name, "--scope", scope, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            return process.stdout.read().decode().strip()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def ask(self, world: World) -> httpx.Response:
        """Ranks on a connection of its own, so that the kernel chooses among workers."""
        user, items = world.bundle.history["user_id"][0], world.bundle.items["item_id"][:5].to_list()
        headers = {"Authorization": f"Bearer {self.reader}"}
        body = {"user": str(user), "candidates": items}
        return httpx.post(f"{self.url}/v1/rank", json=body, headers=headers, timeout=30)
