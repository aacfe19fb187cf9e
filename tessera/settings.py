"""Where the outside systems are: the only module that reads the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.registry import Registry
from serving.redis import RedisStore, open_embedded
from serving.store import OnlineStore
from streaming.local import LocalLog
from streaming.log import EventLog


@dataclass(frozen=True)
class Settings:
    """Addresses; an empty one means the embedded default under `home`.

    Attributes:
        home: directory of the embedded log, store and registry (TESSERA_HOME, default `.tessera`).
        kafka: `host:port` (TESSERA_KAFKA).
        redis: `redis://…` (TESSERA_REDIS).
        mlflow: tracking address (MLFLOW_TRACKING_URI).
    """

    home: Path
    kafka: str = ""
    redis: str = ""
    mlflow: str = ""

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads the addresses from environment variables."""
        return Settings(
            home=Path(environment.get("TESSERA_HOME", ".tessera")).absolute(),
            kafka=environment.get("TESSERA_KAFKA", ""),
            redis=environment.get("TESSERA_REDIS", ""),
            mlflow=environment.get("MLFLOW_TRACKING_URI", ""),
        )

    def open_log(self) -> EventLog:
        """The event log: Kafka where an address is set, else SQLite in `home`."""
        if self.kafka:
            from streaming.kafka import KafkaLog

            return KafkaLog(self.kafka)
        self.home.mkdir(parents=True, exist_ok=True)
        return LocalLog(self.home / "log.db")

    def open_store(self) -> OnlineStore:
        """The online store: Redis at an address, else the embedded server with its data in `home`."""
        return RedisStore(self.redis) if self.redis else open_embedded(self.home / "redis")

    def open_registry(self) -> Registry:
        """The model registry: MLflow at an address, else on SQLite in `home`."""
        self.home.mkdir(parents=True, exist_ok=True)
        return Registry(self.mlflow or f"sqlite:///{self.home / 'mlflow.db'}", artifacts=self.home / "mlflow")
