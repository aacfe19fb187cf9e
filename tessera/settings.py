"""Addresses of the outside systems: the only module that reads the environment.

A client library is imported when its system is opened, so that a command loads only what it uses.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from features.durable import make_directory
from features.errors import BundleError, TesseraError
from features.lock import locked
from features.storage.location import Remote, locate, refuse_address
from streaming.log.topics import Topics

if TYPE_CHECKING:
    from features.jobs.engine import Engine
    from features.wire.registry import SchemaRegistry
    from features.wire.schemas import Schemas
    from models.registry.registry import Registry
    from serving.retrieval.rows import RowKind
    from serving.store.protocol import OnlineStore
    from streaming.log.protocol import EventLog
    from streaming.snapshot import Snapshots


_DATABASE = "mlflow.db"
_MIGRATION_S = 120.0
_MOST_PARTITIONS = 256
_LONGEST_MEETING_S = 86_400.0
_KAFKA_OPTION = "TESSERA_KAFKA_"
_KAFKA_CLIENT = "TESSERA_KAFKA_CLIENT"
_INFRA = Path(__file__).parents[1] / "infra"


@dataclass(frozen=True)
class Settings:
    """Addresses; an empty one means the embedded default under `home`.

    Attributes:
        home: directory of the embedded log, store and registry (TESSERA_HOME, default `.tessera`).
        kafka: `host:port` (TESSERA_KAFKA).
        redis: `redis://…` (TESSERA_REDIS).
        mlflow: tracking address (MLFLOW_TRACKING_URI).
        topics: names of the topics, with a prefix of your own (TESSERA_TOPIC_PREFIX), and the number of partitions that
            they get when they are created (TESSERA_PARTITIONS).
        storage: how the store keeps rows: float32, float16 or int8 (TESSERA_STORAGE).
        index: how a server keeps the vectors of its search indexes: float32 or int8 (TESSERA_INDEX).
        kafka_client: client of the stream's readers and transactions: `kafka-python` (default), `librdkafka` or
            `auto` (TESSERA_KAFKA_CLIENT).
        kafka_options: connection options of the Kafka client, from TESSERA_KAFKA_SECURITY_PROTOCOL and the like.
        trace_file: gets finished spans as JSON lines (TESSERA_TRACES).
        otlp: where a collector takes spans (OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or OTEL_EXPORTER_OTLP_ENDPOINT with
            `/v1/traces` behind it); empty where OTEL_TRACES_EXPORTER is `none`.
        otlp_protocol: by which (OTEL_EXPORTER_OTLP_TRACES_PROTOCOL, or OTEL_EXPORTER_OTLP_PROTOCOL).
        launchers: Beam's job-server jars of Flink and Spark, and Prism's binary, by name of the runner
            (TESSERA_FLINK_JAR, TESSERA_SPARK_JAR, TESSERA_PRISM; by default where the scripts in `infra` put them).
        worker_pool: address of the pool of Python workers on each machine of a Flink or Spark cluster
            (TESSERA_WORKER_POOL).
        worker_start_s: seconds after which a batch job that no worker has begun is cancelled, as text
            (TESSERA_WORKER_START_S).
        schema_registry: address of the schema registry of messages in Avro and Protobuf (TESSERA_SCHEMA_REGISTRY).
        schema_registry_user, schema_registry_password: basic authentication (TESSERA_SCHEMA_REGISTRY_USER and
            TESSERA_SCHEMA_REGISTRY_PASSWORD).
        exchange: address at an object store through which a batch job's files go to workers that share no disk with
            this machine (TESSERA_EXCHANGE).
        snapshots_at: directory of the trainer's snapshots, or address at an object store for copies of them
            (TESSERA_SNAPSHOTS); by default `home` has them.
        meet_s: seconds that a process of a stream of several waits for the others, as text (TESSERA_MEET_S).
    """

    home: Path
    kafka: str = ""
    redis: str = ""
    mlflow: str = ""
    topics: Topics = field(default_factory=Topics)
    storage: str = "float32"
    index: str = "float32"
    kafka_client: str = "kafka-python"
    kafka_options: dict[str, Any] = field(default_factory=dict)
    trace_file: Path | None = None
    otlp: str = ""
    otlp_protocol: str = ""
    launchers: dict[str, Path] = field(default_factory=dict)
    worker_pool: str = ""
    worker_start_s: str = ""
    exchange: str = ""
    schema_registry: str = ""
    schema_registry_user: str = ""
    schema_registry_password: str = field(default="", repr=False)
    snapshots_at: str = ""
    meet_s: str = ""

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> "Settings":
        """Reads the addresses from environment variables.

        Raises:
            TesseraError: A variable that TESSERA_REQUIRE names is missing or empty, or a variable is invalid.
        """
        _require(environment)
        refuse_address(Path(environment.get("TESSERA_HOME", "")), "set TESSERA_HOME to a directory of this machine")
        return Settings(
            home=Path(environment.get("TESSERA_HOME", ".tessera")).absolute(),
            kafka=environment.get("TESSERA_KAFKA", ""),
            redis=environment.get("TESSERA_REDIS", ""),
            mlflow=environment.get("MLFLOW_TRACKING_URI", ""),
            topics=Topics(environment.get("TESSERA_TOPIC_PREFIX", ""), _partitions(environment)),
            storage=environment.get("TESSERA_STORAGE", "float32"),
            index=environment.get("TESSERA_INDEX", "float32"),
            kafka_client=environment.get(_KAFKA_CLIENT) or "kafka-python",
            kafka_options={
                name.removeprefix(_KAFKA_OPTION).lower(): value
                for name, value in environment.items()
                if name.startswith(_KAFKA_OPTION) and name != _KAFKA_CLIENT
            },
            launchers={
                "flink": Path(environment.get("TESSERA_FLINK_JAR", _INFRA / "flink/.run/job-server.jar")),
                "spark": Path(environment.get("TESSERA_SPARK_JAR", _INFRA / "spark/.run/job-server.jar")),
                "prism": Path(environment.get("TESSERA_PRISM", _INFRA / "prism/.run/prism")),
            },
            worker_pool=environment.get("TESSERA_WORKER_POOL", ""),
            worker_start_s=environment.get("TESSERA_WORKER_START_S", ""),
            exchange=environment.get("TESSERA_EXCHANGE", ""),
            schema_registry=environment.get("TESSERA_SCHEMA_REGISTRY", ""),
            schema_registry_user=environment.get("TESSERA_SCHEMA_REGISTRY_USER", ""),
            schema_registry_password=environment.get("TESSERA_SCHEMA_REGISTRY_PASSWORD", ""),
            snapshots_at=environment.get("TESSERA_SNAPSHOTS", ""),
            meet_s=environment.get("TESSERA_MEET_S", ""),
            **_traces(environment),
        )

    def index_rows(self) -> "RowKind":
        """Returns the format of the rows of a server's search indexes.

        Raises:
            TesseraError: TESSERA_INDEX is no such format.
        """
        from serving.retrieval.rows import ROW_KINDS

        for kind in ROW_KINDS:
            if kind == self.index:
                return kind
        raise TesseraError(f"TESSERA_INDEX={self.index}: expected one of {', '.join(ROW_KINDS)}")

    def engine(self, runner: str, endpoint: str | None = None, options: Sequence[str] = ()) -> "Engine":
        """Returns the engine of a batch job; see `features.jobs.engine.Engine` for the arguments.

        Raises:
            TesseraError: the engine cannot be what was chosen, or TESSERA_WORKER_START_S is no number.
        """
        from features.jobs.engine import POOL, STARTS_S, Engine

        try:
            starts_s = float(self.worker_start_s or STARTS_S)
        except ValueError as error:
            raise TesseraError(f"TESSERA_WORKER_START_S={self.worker_start_s}: expected seconds") from error
        found = Engine(runner, endpoint, tuple(options))
        launcher = self.launchers.get(found.name)
        pool = self.worker_pool or POOL
        # Workers of the direct runner are on this machine.
        exchange = "" if found.name == "direct" else self.exchange
        return replace(found, launcher=launcher, pool=pool, starts_s=starts_s, exchange=exchange)

    def open_log(self) -> "EventLog":
        """The event log: Kafka where an address is set, else SQLite in `home`."""
        if self.kafka:
            from streaming.log.kafka import KafkaLog

            return KafkaLog(self.kafka, client=self.kafka_client, **self.kafka_options)
        from streaming.log.sqlite import LocalLog

        self.home.mkdir(parents=True, exist_ok=True)
        return LocalLog(self.home / "log.db")

    def open_schema_registry(self) -> "SchemaRegistry":
        """The schema registry of messages in Avro and Protobuf.

        Raises:
            TesseraError: No address is set, or it is no address.
        """
        from features.wire.registry import SchemaRegistry

        if not self.schema_registry:
            raise TesseraError("no schema registry; set TESSERA_SCHEMA_REGISTRY=http://HOST:PORT")
        return SchemaRegistry(self.schema_registry, self.schema_registry_user, self.schema_registry_password)

    def schemas(self, refused: Collection[int] = ()) -> "Schemas":
        """The schemas of the registry, none without an address.

        Args:
            refused: ids of schemas whose messages become dead letters.
        """
        from features.wire.schemas import Schemas

        return Schemas(self.open_schema_registry() if self.schema_registry else None, refused=refused)

    def open_store(self) -> "OnlineStore":
        """The online store: Redis at an address, else the embedded server with its data in `home`."""
        from serving.store.redis.embedded import open_embedded
        from serving.store.redis.store import RedisStore

        return RedisStore(self.redis) if self.redis else open_embedded(self.home / "redis")

    @property
    def bundles(self) -> Path:
        """Directory of bundles that were fetched from the registry."""
        return self.home / "bundles"

    def seconds_to_meet(self, default: float) -> float:
        """Returns the seconds that a process of a stream of several waits for the others.

        Raises:
            TesseraError: TESSERA_MEET_S is no number of seconds.
        """
        try:
            seconds = float(self.meet_s or default)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= _LONGEST_MEETING_S:
            raise TesseraError(f"TESSERA_MEET_S={self.meet_s}: expected seconds, more than 0 and a day at most")
        return seconds

    def open_snapshots(self) -> "Snapshots":
        """The trainer's snapshots: in `home`, with copies at an address if one is set.

        Streams with other topics may share a directory or an address, since each has a folder of its own there.

        Raises:
            TesseraError: The address cannot be used.
        """
        from streaming.snapshot import Snapshots

        own = self.home / "snapshots"
        if not self.snapshots_at:
            return Snapshots(own)
        place = locate(self.snapshots_at)
        place = place / self.topics.prefix if self.topics.prefix else place
        return Snapshots(own, address=place) if isinstance(place, Remote) else Snapshots(place.absolute())

    def stages_of(self, out: str) -> tuple[Path, Remote | None]:
        """Returns the directory of a run's stages, and the address of their copies if `out` is an address.

        The directory of an address is in `home`, one for each address.
        """
        place = locate(out)
        if isinstance(place, Path):
            return place, None
        return self.home / "runs" / hashlib.sha256(place.address.encode()).hexdigest()[:16], place

    @property
    def has_registry(self) -> bool:
        """True if there is a registry to open: an address, or a database in `home`."""
        return bool(self.mlflow) or (self.home / _DATABASE).exists()

    def open_registry(self, *, create: bool = True) -> "Registry":
        """The model registry: MLflow at an address, else on SQLite in `home`.

        Args:
            create: makes the database in `home` if there is none.

        Raises:
            BundleError: there is none, and `create` is false; or it cannot be opened.
        """
        from models.registry.registry import Registry
        from models.registry.relocation import check_place

        artifacts = self.home / "mlflow"
        if self.mlflow:
            return Registry(self.mlflow, artifacts=artifacts)
        database = self.home / _DATABASE
        if not create and not self.has_registry:
            raise BundleError(
                f"no model in TESSERA_HOME {self.home} (there is no {_DATABASE}); `tessera run DATASET.toml` makes "
                "one there, TESSERA_HOME=DIRECTORY names the home of another"
            )
        if database.exists() and not os.access(self.home, os.W_OK):
            check_place(database, artifacts)
            return Registry(_sqlite(database), artifacts=artifacts)
        make_directory(self.home)
        # The first to open a database makes its tables, which takes seconds; others must find all of them.
        with locked(database, wait_s=_MIGRATION_S):
            check_place(database, artifacts)
            opened = Registry(_sqlite(database), artifacts=artifacts)
        if not database.exists():
            raise BundleError(f"TESSERA_HOME {self.home}: the registry cannot use this path; choose a plainer one")
        return opened

    def registry_on_use(self) -> "Registry":
        """Returns the model registry, opened when it is first used, so that a run starts without loading MLflow.

        A registry at an address is opened here: a wrong address must not be told after hours of training.

        Raises:
            BundleError: `home` cannot be written, or the registry at an address does not answer.
        """
        if self.mlflow:
            return self.open_registry()
        make_directory(self.home)
        return cast("Registry", _OnUse(self.open_registry))

    def traced(self, service: str) -> contextlib.AbstractContextManager[None]:
        """Records spans while the body runs, under a service's name; does nothing where they would go nowhere."""
        if not self.otlp and self.trace_file is None:
            return contextlib.nullcontext()
        from tessera.trace_export import traced

        return traced(service, endpoint=self.otlp, protocol=self.otlp_protocol, file=self.trace_file)


class _OnUse:
    """Stands for an object that is made when one of its attributes is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        if "_made" not in self.__dict__:
            self.__dict__["_made"] = self._make()
        return getattr(self.__dict__["_made"], name)


def _sqlite(database: Path) -> str:
    """The address of a SQLite file; in addresses `?` and `%` mean something else than themselves."""
    return "sqlite:///" + str(database).replace("%", "%25").replace("?", "%3F")


def _traces(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns the destinations of spans, by OpenTelemetry's own variables and one of ours."""
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


def _require(environment: Mapping[str, str]) -> None:
    """Raises TesseraError if variables that TESSERA_REQUIRE names are missing: no embedded system may replace them."""
    missing = [name for name in environment.get("TESSERA_REQUIRE", "").split() if not environment.get(name)]
    if missing:
        raise TesseraError(
            f"{', '.join(missing)}: not set, but TESSERA_REQUIRE names it; set it in the config map or the secret "
            "of this process, or take it out of TESSERA_REQUIRE"
        )


def _partitions(environment: Mapping[str, str]) -> int:
    """Returns the number of partitions of new topics.

    Raises:
        TesseraError: TESSERA_PARTITIONS is no such number.
    """
    text = environment.get("TESSERA_PARTITIONS", "1")
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_PARTITIONS):
        raise TesseraError(f"TESSERA_PARTITIONS={text}: expected a number from 1 to {_MOST_PARTITIONS}")
    return int(text)
