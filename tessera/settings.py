"""Where the outside systems are: the only module that reads the environment.

A client library is imported when its system is opened, so that a command loads only what it uses.
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streaming.topic import Topics

if TYPE_CHECKING:
    from models.registry import Registry
    from serving.store import OnlineStore
    from streaming.log import EventLog


_KAFKA_OPTION = "TESSERA_KAFKA_"


@dataclass(frozen=True)
class Settings:
    """Addresses; an empty one means the embedded default under `home`.

    Attributes:
        home: directory of the embedded log, store and registry (TESSERA_HOME, default `.tessera`).
        kafka: `host:port` (TESSERA_KAFKA).
        redis: `redis://…` (TESSERA_REDIS).
        mlflow: tracking address (MLFLOW_TRACKING_URI).
        topics: names of the topics, with a prefix of your own (TESSERA_TOPIC_PREFIX).
        storage: how the store keeps rows: float32, float16 or int8 (TESSERA_STORAGE).
        kafka_options: connection options of the Kafka client, from TESSERA_KAFKA_SECURITY_PROTOCOL and the like.
        trace_file: gets finished spans as JSON lines (TESSERA_TRACES).
        otlp: where a collector takes spans (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or OTEL_EXPORTER_OTLP_ENDPOINT with
            `/v1/traces` behind it); empty where OTEL_TRACES_EXPORTER is `none`.
        otlp_protocol: by which (OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, or OTEL_EXPORTER_OTLP_PROTOCOL).
    """

    home: Path
    kafka: str = ""
    redis: str = ""
    mlflow: str = ""
    topics: Topics = field(default_factory=Topics)
    storage: str = "float32"
    kafka_options: dict[str, Any] = field(default_factory=dict)
    trace_file: Path | None = None
    otlp: str = ""
    otlp_protocol: str = ""

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads the addresses from environment variables."""
        return Settings(
            home=Path(environment.get("TESSERA_HOME", ".tessera")).absolute(),
            kafka=environment.get("TESSERA_KAFKA", ""),
            redis=environment.get("TESSERA_REDIS", ""),
            mlflow=environment.get("MLFLOW_TRACKING_URI", ""),
            topics=Topics(environment.get("TESSERA_TOPIC_PREFIX", "")),
            storage=environment.get("TESSERA_STORAGE", "float32"),
            kafka_options={
                name.removeprefix(_KAFKA_OPTION).lower(): value
                for name, value in environment.items()
                if name.startswith(_KAFKA_OPTION)
            },
            **_traces(environment),
        )

    def open_log(self) -> "EventLog":
        """The event log: Kafka where an address is set, else SQLite in `home`."""
        if self.kafka:
            from streaming.kafka import KafkaLog

            return KafkaLog(self.kafka, **self.kafka_options)
        from streaming.local import LocalLog

        self.home.mkdir(parents=True, exist_ok=True)
        return LocalLog(self.home / "log.db")

    def open_store(self) -> "OnlineStore":
        """The online store: Redis at an address, else the embedded server with its data in `home`."""
        from serving.redis import RedisStore, open_embedded

        return RedisStore(self.redis) if self.redis else open_embedded(self.home / "redis")

    def open_registry(self) -> "Registry":
        """The model registry: MLflow at an address, else on SQLite in `home`."""
        from models.registry import Registry
        from models.registry_move import check_place

        if not self.mlflow:
            check_place(self.home / "mlflow.db", self.home / "mlflow")
        self.home.mkdir(parents=True, exist_ok=True)
        return Registry(self.mlflow or f"sqlite:///{self.home / 'mlflow.db'}", artifacts=self.home / "mlflow")

    def traced(self, service: str) -> contextlib.AbstractContextManager[None]:
        """Records spans while the body runs, under a service's name; does nothing where they would go nowhere."""
        if not self.otlp and self.trace_file is None:
            return contextlib.nullcontext()
        from tessera.tracing import traced

        return traced(service, endpoint=self.otlp, protocol=self.otlp_protocol, file=self.trace_file)


def _traces(environment: Mapping[str, str]) -> dict[str, Any]:
    """Where spans go, by OpenTelemetry's own variables and one of ours."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return {}
    found: dict[str, Any] = {}
    if file := environment.get("TESSERA_TRACES"):
        found["trace_file"] = Path(file)
    if environment.get("OTEL_TRACES_EXPORTER", "").strip().lower() != "none":
        base = environment.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        shared = f"{base.rstrip('/')}/v1/traces" if base else ""
        found["otlp"] = environment.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "") or shared
        names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
        found["otlp_protocol"] = next((environment[name] for name in names if environment.get(name)), "")
    return found
