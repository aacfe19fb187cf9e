"""The servers of the rehearsal, as processes: MLflow's and `tessera serve`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx

from tests.chaos.cluster import Process, free_port, until


class MlflowServer:
    """MLflow's own server, on a database and a directory of artifacts of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.artifacts = directory / "artifacts"
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        command = [str(Path(sys.executable).with_name("mlflow")), "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{directory / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self.artifacts)]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (directory / "log").open("wb") as out:
            # Its workers are processes of their own, and of its group.
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, cwd=directory, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        until(lambda: status_of(f"{self.address}/health") == 200, seconds=180, doing="start of MLflow")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(30)


def status_of(url: str) -> int:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=10).status_code
    return 0


class Server:
    """A `tessera serve` process."""

    def __init__(self, tessera: Path, directory: Path, name: str, environment: dict[str, str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [str(tessera), "serve", "--port", str(port), "--follow-s", "1", "--drain-s", "1"]
        self.process = Process(name, command, directory / f"{name}.log", environment)

    def start(self) -> None:
        self.process.start()

    def wait(self) -> None:
        until(lambda: status_of(f"{self.url}/readyz") == 200, seconds=120, doing=f"start of {self.process.name}")

    def stop(self) -> None:
        """Asks it to end, and waits until it has done so in order."""
        if self.process.running is not None and self.process.alive():
            self.process.signal(signal.SIGTERM)
            assert self.process.running.wait(60) == 0, self.process.log.read_text()[-2_000:]

    def lines(self) -> list[dict[str, Any]]:
        """Its log."""
        said = self.process.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in said if line.startswith("{") and line.endswith("}")]
