"""Commands `tessera doctor` and `tessera status`: checks of all dependencies, and the state of the system."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from features.errors import LogError, TesseraError
from tessera.settings import Settings
from tessera.terminal import JsonOption, ModelNameOption, out_console, print_json

if TYPE_CHECKING:
    from models.bundle.bundle import Bundle
    from streaming.log.protocol import EventLog

_OK, _WARN, _FAIL = "ok", "warning", "fault"
_LEAST_FREE = 2 * 10**9
_LEAST_SHARED = 10**8
_PROBE_BYTES = 1 << 16
# Offsets before a topic's end that may hold markers of transactions instead of messages.
_MARKS = 64
_COLOURS = {_OK: "green", _WARN: "yellow", _FAIL: "red"}


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        what: Part that was checked.
        level: ok, warning or fault.
        found: State of the part.
        remedy: Action of the user; empty if there is no fault.
    """

    what: str
    level: str
    found: str
    remedy: str = ""


def doctor(json: JsonOption = False) -> None:
    """Check every dependency and setting, and say what to fix; exit 1 if there is a fault."""
    findings = diagnose(Settings.from_environment())
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table("", "what", "found", "what to do")
        for finding in findings:
            table.add_row(Text(finding.level, _COLOURS[finding.level]), finding.what, finding.found, finding.remedy)
        out_console.print(table)
    if any(finding.level == _FAIL for finding in findings):
        raise typer.Exit(1)


def diagnose(settings: Settings) -> list[Finding]:
    """Runs all checks; a failed check does not stop the others."""
    checks: dict[str, Callable[[Settings], list[Finding]]] = {
        "packages": _packages,
        "device": _device,
        "home": _home,
        "workers": _workers,
        "log": _log,
        "followed": _followed,
        "store": _store,
        "registry": _registry,
        "schema registry": _schema_registry,
        "object store": _object_store,
        "keys": _keys,
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check(settings)
        except Exception as error:
            # The doctor reports any error that a dependency raises.
            findings.append(Finding(name, _FAIL, f"{type(error).__name__}: {error}", _REMEDIES[name]))
    return findings


_REMEDIES = {
    "packages": "install what requirements.txt names: `make setup`",
    "device": "check nvidia-smi and the driver",
    "home": "point TESSERA_HOME at a directory that can be written",
    "workers": "point TMPDIR at a directory that can be written",
    "log": "see that the broker runs and that TESSERA_KAFKA names it; see TESSERA_KAFKA_… for TLS and SASL",
    "followed": "see the log and the registry",
    "store": "see that the server runs and that TESSERA_REDIS names it, with user, password and ssl_ca_certs if asked",
    "registry": "see that MLFLOW_TRACKING_URI names a server that answers",
    "schema registry": "see that TESSERA_SCHEMA_REGISTRY names a server that answers, and its user and password",
    "object store": "see that the bucket exists, that the store answers, and that the credentials may write and delete",
    "keys": "fix the file, or remove it and make new keys",
}


def _packages(settings: Settings) -> list[Finding]:
    import torch

    from models.table.engine import engine

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    findings = [Finding("Python", _OK if python == "3.11" else _WARN, python, "" if python == "3.11" else "use 3.11")]
    remedy = "fbgemm-gpu-cpu 1.8.0 goes with torch 2.13.0; without it the plain table is used, slower"
    try:
        plain = engine() == "plain"
    except TesseraError as error:
        findings.append(Finding("torchrec, fbgemm", _FAIL, str(error), remedy))
    else:
        versions = f"load with torch {torch.__version__.partition('+')[0]}"
        missing = Finding("torchrec, fbgemm", _WARN, "not installed", remedy)
        findings.append(missing if plain else Finding("torchrec, fbgemm", _OK, versions))
    return findings


def _device(settings: Settings) -> list[Finding]:
    from features.device import missing_part, resolve

    device = resolve("auto")
    if not device.is_cpu:
        about, free = device.about, device.free_bytes() or 0
        memory = f"{int(about['memory_bytes']) / 1e9:.0f} GB, {free / 1e9:.0f} GB free"
        state = f"{about['card']}, {memory}, CUDA {about['cuda']}, torch {about['torch']}"
        return [Finding("device", _OK, f"{state}, {_driver_and_kernels()}")]
    return [Finding("device", _OK, f"processor; no GPU: {missing_part()}")]


def _driver_and_kernels() -> str:
    """Returns the versions of the card's driver and of fbgemm."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return f"driver {driver}, fbgemm {version('fbgemm-gpu')}"


def _home(settings: Settings) -> list[Finding]:
    settings.home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.home).free
    state = f"{settings.home}, {free / 1e9:.1f} GB free"
    remedy = "make room: bundles, snapshots and the embedded log and store are there"
    probe = settings.home / ".doctor"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return [Finding("home", _FAIL, f"{state}: {error.strerror}", remedy)]
    finally:
        probe.unlink(missing_ok=True)
    few = free < _LEAST_FREE
    return [Finding("home", _WARN if few else _OK, state, remedy if few else "")]


def _workers(settings: Settings) -> list[Finding]:
    from tessera.workers import memory_directory

    place = memory_directory()
    free = shutil.disk_usage(place).free
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    state = f"{cores} cores, {free / 1e9:.1f} GB free for shared mirrors in {place}"
    few = free < _LEAST_SHARED
    remedy = "give it more memory (docker run --shm-size): the tables of `serve --workers --mirror` lie there"
    return [Finding("workers", _WARN if few else _OK, state, remedy if few else "")]


def _log(settings: Settings) -> list[Finding]:
    with contextlib.closing(settings.open_log()) as log:
        topics = settings.topics
        missing = []
        for topic in topics.partitions():
            try:
                log.end_offsets(topic)
            except TesseraError:
                missing.append(topic)
        partitions = 1 if topics.deltas in missing else len(log.end_offsets(topics.deltas))
        where = _log_place(settings, log)
    if missing:
        return [Finding("log", _WARN, f"{where}: no topics {', '.join(missing)}", "`tessera topics create` makes them")]
    if topics.parts not in (1, partitions):
        found = f"{where}: {topics.deltas} has {partitions} partitions, TESSERA_PARTITIONS is {topics.parts}"
        remedy = f"set TESSERA_PARTITIONS={partitions}, or begin with another TESSERA_TOPIC_PREFIX"
        return [Finding("log", _FAIL, found, remedy)]
    several = f"{where}: {partitions} partitions, for up to {partitions} processes of `tessera stream`"
    return [Finding("log", _OK, several if partitions > 1 else where)]


def _log_place(settings: Settings, log: "EventLog") -> str:
    """Returns the address of the log, and for Kafka the client of its readers and transactions."""
    if not settings.kafka:
        return str(settings.home / "log.db")
    from streaming.log.kafka import KafkaLog

    assert isinstance(log, KafkaLog)
    reason = f", since {log.client_fault}" if log.client_fault else ""
    return f"{settings.kafka} with {log.client}{reason}"


def _followed(settings: Settings) -> list[Finding]:
    from tessera.follow.report import what_is_followed

    # A log that does not answer, or has no topics yet, is another finding.
    with contextlib.suppress(LogError):
        return [Finding("followed", level, found, remedy) for level, found, remedy in what_is_followed(settings)]
    return []


def _object_store(settings: Settings) -> list[Finding]:
    """Writes, reads and removes a file at each address of an object store."""
    from features.storage.file import remove, write
    from features.storage.location import Remote, locate

    named = {"TESSERA_SNAPSHOTS": settings.snapshots_at, "TESSERA_EXCHANGE": settings.exchange}
    findings = []
    for name, text in named.items():
        try:
            place = locate(text) if text else None
            if isinstance(place, Remote):
                probe = place / f".doctor-{os.getpid()}"
                began = time.monotonic()
                write(probe, bytes(_PROBE_BYTES))
                if probe.read_bytes() != bytes(_PROBE_BYTES):
                    raise TesseraError(f"{probe}: other bytes came back than were written; use another store")
                remove(probe)
                took = 1_000 * (time.monotonic() - began)
                findings.append(Finding(f"object store: {name}", _OK, f"{place}: written and read in {took:,.0f} ms"))
        except TesseraError as error:
            findings.append(Finding(f"object store: {name}", _FAIL, str(error), _REMEDIES["object store"]))
    return findings


def _schema_registry(settings: Settings) -> list[Finding]:
    if not settings.schema_registry:
        return []
    settings.open_schema_registry().schema(1)
    return [Finding("schema registry", _OK, settings.schema_registry)]


def _store(settings: Settings) -> list[Finding]:
    from serving.retrieval.rows import ROW_KINDS
    from serving.store.protocol import STORAGES
    from serving.store.redis.store import RedisStore

    findings: list[Finding] = []
    if settings.storage not in STORAGES:
        remedy = f"set TESSERA_STORAGE to one of {', '.join(STORAGES)}"
        findings.append(Finding("storage", _FAIL, settings.storage, remedy))
    if settings.index not in ROW_KINDS:
        findings.append(Finding("index", _FAIL, settings.index, f"set TESSERA_INDEX to one of {', '.join(ROW_KINDS)}"))
    with contextlib.closing(settings.open_store()) as store:
        store.ping()
        assert isinstance(store, RedisStore)
        servers = store.facts()
        for facts in servers:
            policy, saved = facts["maxmemory_policy"], facts["last_save"]
            state = f"Redis {facts['version']}, {facts['used_memory_human']}, {policy}, {facts['persistence']}"
            state = f"{facts['server']}: {state}" if len(servers) > 1 else state
            if tuple(map(int, facts["version"].split(".")[:2])) < (6, 2):
                findings.append(Finding("store", _FAIL, state, "use Redis 6.2 or later"))
            elif policy not in ("noeviction", ""):
                remedy = "set maxmemory-policy noeviction: a page that Redis evicts reads as zeros"
                findings.append(Finding("store", _FAIL, state, remedy))
            elif saved == "err":
                findings.append(Finding("store", _WARN, state + ", last save failed", "see its log and its disk"))
            else:
                findings.append(Finding("store", _OK, state))
    return findings


def _registry(settings: Settings) -> list[Finding]:
    registry = settings.open_registry() if settings.has_registry else None
    models = registry.models() if registry is not None else []
    if registry is None or not models:
        where = settings.mlflow or f"TESSERA_HOME {settings.home}"
        return [Finding("registry", _WARN, f"no model yet in {where}", "`tessera run DATASET.toml` makes one")]
    findings: list[Finding] = []
    for model in models:
        release = registry.resolve(model)
        try:
            bundle = registry.open(release, settings.bundles)
        except TesseraError as error:
            findings.append(
                Finding(f"champion of {model}", _FAIL, str(error), "`tessera rollout rollback`, or publish it again")
            )
            continue
        findings.append(
            Finding(f"champion of {model}", _OK, f"version {release.version}, {bundle.id}, every file sound")
        )
        findings.append(_loaded(settings, bundle))
    if len(models) > 1 and not settings.topics.prefix:
        remedy = "set TESSERA_TOPIC_PREFIX for each model, or give each a TESSERA_HOME"
        findings.append(Finding("topics", _WARN, f"{len(models)} models share them", remedy))
    return findings


def _loaded(settings: Settings, bundle: "Bundle") -> Finding:
    from serving.store.fill import require_loaded
    from serving.store.redis.store import RedisStore
    from serving.store.writer import position_of

    what = "store of the champion"
    with contextlib.closing(settings.open_store()) as store:
        try:
            store.ping()
        except TesseraError:
            return Finding(what, _WARN, "unknown: the store does not answer", "see the store")
        try:
            require_loaded(store, bundle)
        except TesseraError:
            remedy = "`tessera replay`, `tessera serve` or `tessera stream` loads it"
            return Finding(what, _WARN, f"{bundle.id} is not loaded", remedy)
        streamed = position_of(store, bundle.id, settings.topics.deltas) is not None
        alone = isinstance(store, RedisStore) and store.in_one_slot(bundle.id)
    if alone:
        remedy = "publish a new version: the next bundle that is loaded is spread over the nodes"
        return Finding(what, _WARN, f"{bundle.id} is loaded, on one node of the cluster", remedy)
    if not streamed and _has_deltas(settings):
        remedy = "`tessera replay` writes them; start `tessera stream` for this bundle if none runs"
        return Finding(what, _WARN, f"{bundle.id} is loaded, and nothing of the log's deltas is in it", remedy)
    return Finding(what, _OK, f"{bundle.id} is loaded")


def _has_deltas(settings: Settings) -> bool:
    """Returns True if the stream has changed a table; False if the log does not answer, which is another finding."""
    with contextlib.suppress(TesseraError), contextlib.closing(settings.open_log()) as log:
        return any(log.end_offsets(settings.topics.deltas).values())
    return False


def _keys(settings: Settings) -> list[Finding]:
    from serving.api.keys import KeyFile

    path = settings.home / "keys.json"
    keys = KeyFile(path).keys()
    if not keys:
        remedy = "`tessera keys add NAME`: without keys a server serves this machine alone"
        return [Finding("keys", _WARN, "no API keys", remedy)]
    if path.stat().st_mode & 0o077:
        return [Finding("keys", _FAIL, f"{path} can be read by others", f"chmod 600 {path}")]
    return [Finding("keys", _OK, f"{len(keys)}: {', '.join(key.name for key in keys)}")]


def status(
    model: ModelNameOption = None,
    json: JsonOption = False,
    experiments: Annotated[bool, typer.Option(help="Join impressions and outcomes too.")] = True,
) -> None:
    """Show versions, lag and freshness of the stream, and the state of experiments."""
    from serving.rollout.judge import interval_text

    state = standing(Settings.from_environment(), model, experiments=experiments)
    if json:
        print_json(state)
        return
    table = Table(show_header=False, title=state["model"], title_justify="left")
    for release in state["releases"]:
        if release["aliases"]:
            table.add_row(", ".join(release["aliases"]), f"version {release['version']}, {release['bundle']}")
    for topic, lag in state["lag"].items():
        table.add_row(f"lag of {topic}", "–" if lag is None else f"{lag:,} messages")
    for one in state["followed"]:
        place = f"{one['state']}{': ' + one['why'] if one['why'] else ''}, batch {one['seq']:,}, lag {one['lag']:,}"
        table.add_row(f"followed {one['bundle']}", f"{', '.join(one['roles']) or 'no role'}: {place}")
    age = state["newest_delta_s"]
    table.add_row("newest change of the table", "none yet" if age is None else f"{age:,.0f} s ago")
    for experiment in state["experiments"]:
        arms = "; ".join(f"{name} {arm['rate']:.4f} of {arm['requests']:,}" for name, arm in experiment["arms"].items())
        interval = interval_text(experiment["low"], experiment["high"])
        line = f"{experiment['share']:.1%} of the users; {arms}; {experiment['estimate']:+.4f}, {interval}"
        breaches = "".join(f"; {breach}" for breach in experiment["breaches"])
        table.add_row(f"experiment {experiment['experiment']}", line + breaches)
    out_console.print(table)


def standing(settings: Settings, model: str | None, *, experiments: bool) -> dict[str, Any]:
    """Returns the content of `status`."""
    import msgspec

    from serving.rollout.guardrails import Guardrails
    from serving.rollout.judge import judging, ledger_path
    from serving.store.lag import deltas_behind, inputs_behind
    from streaming.shared.ledger import newest_entry

    registry = settings.open_registry(create=False)
    champion = registry.resolve(model)
    bundle = registry.open(champion, settings.bundles)
    topics = settings.topics
    lag: dict[str, int | None] = {}
    newest: float | None = None
    judged: list[dict[str, Any]] = []
    with contextlib.closing(settings.open_log()) as log, contextlib.closing(settings.open_store()) as store:
        log.create_topics(topics.partitions())
        lag |= inputs_behind(log, bundle, topics)
        lag[topics.deltas], _ = deltas_behind(log, store, bundle, topics)
        entry = newest_entry(log, topics)
        end = log.end_offsets(topics.deltas)[0]
        for back in (_MARKS, 8, 2):
            # If this many messages are no longer kept, fewer may be.
            with contextlib.suppress(TesseraError):
                for message in log.read(topics.deltas, 0, end - back, end):
                    newest = time.time() - message.timestamp_ms / 1_000
                break
        if experiments:
            path = ledger_path(settings.home, settings.kafka, topics, champion.model, Guardrails())
            with judging(
                registry, log, topics, model=champion.model, rule=Guardrails(), ledger=path, copy=True
            ) as judge:
                judged = [asdict(state) for state in judge.look()]
    return {
        "model": champion.model,
        "releases": [asdict(release) for release in registry.releases(champion.model)],
        "lag": lag,
        "followed": [msgspec.to_builtins(one) for one in entry.bundles] if entry is not None else [],
        "newest_delta_s": newest,
        "experiments": judged,
    }
