"""Checks what a benchmark needs before it measures: servers that answer, a fitting dataset, and its peers.

Servers and dataset are conditions: without them the benchmark does not start. A peer is not: without its environment
the benchmark measures the rest, and a row says which peer is missing and why. Environments are built here, so that no
installation runs between measurements.
"""

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from features.errors import TesseraError

if TYPE_CHECKING:
    from rich.console import Console

    from features.dataset.descriptor import Dataset
    from tessera.settings import Settings

_ANSWER_S = 5.0


@dataclass(frozen=True)
class Peer:
    """A peer in an environment of its own.

    Attributes:
        name: of the peer, as rows show it.
        pins: file of pinned packages in `tessera/bench/peers`.
    """

    name: str
    pins: str


FEAST = Peer("Feast", "feast_requirements.txt")
CTR = Peer("DeepCTR-Torch and torch-rechub", "ctr_requirements.txt")
RETRIEVAL = Peer("implicit and RecTools", "retrieval_requirements.txt")
RQ = Peer("vector-quantize-pytorch", "rq_requirements.txt")


@dataclass(frozen=True)
class Needs:
    """Conditions of a benchmark.

    Attributes:
        servers: a Kafka broker and a Redis server that answer.
        ranks: a dataset with users and a catalogue.
        content: a dataset whose items have text.
        peers: peers to measure beside Tessera.
    """

    servers: bool = False
    ranks: bool = False
    content: bool = False
    peers: tuple[Peer, ...] = ()


@dataclass(frozen=True)
class Peers:
    """Environments of a benchmark's peers.

    Attributes:
        pythons: interpreter of each peer that can run.
        missing: reason for each peer that cannot.
    """

    pythons: Mapping[Peer, Path]
    missing: Mapping[Peer, str]

    def python(self, peer: Peer) -> Path | None:
        """Returns the interpreter of a peer, or None where the peer is missing."""
        return self.pythons.get(peer)

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Returns a row for each missing peer: its name under `key`, and the reason under `missing`."""
        return [{key: peer.name, "missing": reason} for peer, reason in self.missing.items()]


def check_servers(name: str, needs: Needs, settings: "Settings") -> None:
    """Returns when the servers that a benchmark needs answer.

    Raises:
        TesseraError: names every server that is not set or does not answer, and says how to get it.
    """
    if not needs.servers:
        return
    faults = [fault for fault in (_kafka_fault(settings.kafka), _redis_fault(settings.redis)) if fault]
    if faults:
        raise TesseraError(
            f"bench {name} measures a real broker and a real Redis server: {'; '.join(faults)}; start both with "
            "`make up`, then set TESSERA_KAFKA=host:port and TESSERA_REDIS=redis://host:port/0"
        )


def check_datasets(name: str, needs: Needs, datasets: "Iterable[Dataset]") -> None:
    """Returns when a benchmark can use the datasets.

    Raises:
        TesseraError: names the dataset and the part of its descriptor that is missing.
    """
    for dataset in datasets:
        if needs.content and not dataset.has_text:
            raise TesseraError(f"{dataset.source}: bench {name} needs [items] with text; this dataset has none")
        if needs.ranks and (dataset.events.user is None or dataset.items is None):
            raise TesseraError(f"{dataset.source}: bench {name} needs [items] and the user of [events] to rank")


def build_peers(needs: Needs, directory: Path, console: "Console") -> Peers:
    """Builds the environment of each peer where it is not built yet, under `directory`.

    A peer that cannot be built is reported at once and later as a row; it raises nothing.
    """
    from rich.text import Text

    from tessera.bench.harness.peer import PEER_FOLDER, peer_python

    pythons: dict[Peer, Path] = {}
    missing: dict[Peer, str] = {}
    for peer in needs.peers:
        pins = PEER_FOLDER / peer.pins
        try:
            pythons[peer] = peer_python((directory / pins.stem).absolute(), pins, console)
        except TesseraError as error:
            missing[peer] = str(error)
            console.print(Text(f"{peer.name} is not measured: {error}", "yellow"))
    return Peers(pythons, missing)


def _kafka_fault(addresses: str | None) -> str:
    import socket

    if not addresses:
        return "TESSERA_KAFKA is not set"
    for address in addresses.split(","):
        host, _, port = address.strip().rpartition(":")
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
            return ""
    return f"the broker at {addresses} does not answer"


def _redis_fault(address: str | None) -> str:
    from serving.store.redis.store import RedisStore

    if not address:
        return "TESSERA_REDIS is not set"
    try:
        with contextlib.closing(RedisStore(address)) as store:
            store.ping()
    except TesseraError as error:
        return f"the Redis server at {address} does not answer ({error})"
    return ""
