"""Commands `tessera doctor` and `tessera status`: checks of all dependencies, and the state of the system."""

import contextlib
import errno
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from features.errors import TesseraError
from tessera.settings import Settings
from tessera.terminal import JsonOption, ModelNameOption, out_console, print_json

if TYPE_CHECKING:
    from models.bundle.bundle import Bundle

_OK, _WARN, _FAIL = "ok", "warning", "fault"
_LEAST_FREE = 2 * 10**9
_PROBE_BYTES = 1 << 16
# Offsets before a topic's end that may hold markers of transactions instead of messages.
_MARKS = 64
_COLOURS = {_OK: "green", _WARN: "yellow", _FAIL: "red"}


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        level: ok, warning or fault.
        remedy: Remedy; empty if there is no fault.
    """

    what: str
    level: str
    found: str
    remedy: str = ""


def doctor(json: JsonOption = False) -> None:
    """Check every dependency and setting, and say what to fix; exit 1 if there is a fault."""
    findings = diagnose(Settings.from_environment())
    if json:
        print_json([asdict(one) for one in findings])
    else:
        table = Table("", "what", "found", "what to do")
        for one in findings:
            table.add_row(Text(one.level, _COLOURS[one.level]), one.what, one.found, one.remedy)
        out_console.print(table)
    if any(one.level == _FAIL for one in findings):
        raise typer.Exit(1)


def diagnose(settings: Settings) -> list[Finding]:
    """Runs all checks; a failed check does not stop the others."""
    checks: dict[str, Callable[[Settings], list[Finding]]] = {
        "packages": _packages,
        "home": _home,
        "log": _log,
        "store": _store,
        "registry": _registry,
        "keys": _keys,
    }
    found: list[Finding] = []
    for name, check in checks.items():
        try:
            found += check(settings)
        except Exception as error:
            # The doctor reports any error that a dependency raises.
            found.append(Finding(name, _FAIL, f"{type(error).__name__}: {error}", _REMEDIES[name]))
    return found


_REMEDIES = {
    "packages": "install what requirements.txt names: `make setup`",
    "home": "point TESSERA_HOME at a directory that can be written",
    "log": "see that the broker runs and that TESSERA_KAFKA names it; see TESSERA_KAFKA_… for TLS and SASL",
    "store": "see that the server runs and that TESSERA_REDIS names it, with user, password and ssl_ca_certs if asked",
    "registry": "see that MLFLOW_TRACKING_URI names a server that answers",
    "keys": "fix the file, or remove it and make new keys",
}


def _packages(settings: Settings) -> list[Finding]:
    import torch

    from models.table.engine import engine

    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = [Finding("Python", _OK if python == "3.11" else _WARN, python, "" if python == "3.11" else "use 3.11")]
    remedy = "fbgemm-gpu-cpu 1.8.0 goes with torch 2.13.0; without it the plain table is used, slower"
    try:
        plain = engine() == "plain"
    except TesseraError as error:
        found.append(Finding("torchrec, fbgemm", _FAIL, str(error), remedy))
    else:
        said = f"load with torch {torch.__version__.partition('+')[0]}"
        missing = Finding("torchrec, fbgemm", _WARN, "not installed", remedy)
        found.append(missing if plain else Finding("torchrec, fbgemm", _OK, said))
    return found


def _home(settings: Settings) -> list[Finding]:
    settings.home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(settings.home).free
    found = f"{settings.home}, {free / 1e9:.1f} GB free"
    remedy = "make room: bundles, snapshots and the embedded log and store are there"
    probe = settings.home / ".doctor"
    try:
        probe.write_bytes(bytes(_PROBE_BYTES))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return [Finding("home", _FAIL, f"{found}: {error.strerror}", remedy)]
    finally:
        probe.unlink(missing_ok=True)
    few = free < _LEAST_FREE
    return [Finding("home", _WARN if few else _OK, found, remedy if few else "")]


def _log(settings: Settings) -> list[Finding]:
    with contextlib.closing(settings.open_log()) as log:
        topics = settings.topics
        missing = []
        for topic in topics.partitions():
            try:
                log.end_offsets(topic)
            except TesseraError:
                missing.append(topic)
    where = settings.kafka or str(settings.home / "log.db")
    if missing:
        return [Finding("log", _WARN, f"{where}: no topics {', '.join(missing)}", "`tessera topics create` makes them")]
    return [Finding("log", _OK, where)]


def _store(settings: Settings) -> list[Finding]:
    from serving.store.protocol import STORAGES
    from serving.store.redis.store import RedisStore

    found: list[Finding] = []
    if settings.storage not in STORAGES:
        remedy = f"set TESSERA_STORAGE to one of {', '.join(STORAGES)}"
        found.append(Finding("storage", _FAIL, settings.storage, remedy))
    with contextlib.closing(settings.open_store()) as store:
        store.ping()
        assert isinstance(store, RedisStore)
        for facts in store.facts():
            policy, saved = facts["maxmemory_policy"], facts["last_save"]
            said = f"Redis {facts['version']}, {facts['used_memory_human']}, {policy}, {facts['persistence']}"
            if tuple(map(int, facts["version"].split(".")[:2])) < (6, 2):
                found.append(Finding("store", _FAIL, said, "use Redis 6.2 or later"))
            elif policy not in ("noeviction", ""):
                remedy = "set maxmemory-policy noeviction: a page that is thrown away reads as zeros"
                found.append(Finding("store", _FAIL, said, remedy))
            elif saved == "err":
                found.append(Finding("store", _WARN, said + ", last save failed", "see its log and its disk"))
            else:
                found.append(Finding("store", _OK, said))
    return found


def _registry(settings: Settings) -> list[Finding]:
    registry = settings.open_registry() if settings.has_registry else None
    models = registry.models() if registry is not None else []
    if registry is None or not models:
        where = settings.mlflow or f"TESSERA_HOME {settings.home}"
        return [Finding("registry", _WARN, f"no model yet in {where}", "`tessera run DATASET.toml` makes one")]
    found: list[Finding] = []
    for model in models:
        release = registry.resolve(model)
        try:
            bundle = registry.open(release, settings.bundles)
        except TesseraError as error:
            found.append(
                Finding(f"champion of {model}", _FAIL, str(error), "`tessera rollout rollback`, or publish it again")
            )
            continue
        found.append(Finding(f"champion of {model}", _OK, f"version {release.version}, {bundle.id}, every file sound"))
        found.append(_loaded(settings, bundle))
    if len(models) > 1 and not settings.topics.prefix:
        remedy = "set TESSERA_TOPIC_PREFIX for each model, or give each a TESSERA_HOME"
        found.append(Finding("topics", _WARN, f"{len(models)} models share them", remedy))
    return found


def _loaded(settings: Settings, bundle: "Bundle") -> Finding:
    from serving.store.fill import require_loaded
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
    if not streamed and _has_deltas(settings):
        remedy = "`tessera replay` writes them; start `tessera stream` for this bundle if none runs"
        return Finding(what, _WARN, f"{bundle.id} is loaded, and nothing of the log's deltas is in it", remedy)
    return Finding(what, _OK, f"{bundle.id} is loaded")


def _has_deltas(settings: Settings) -> bool:
    """Returns whether the stream has changed a table; no if the log does not answer, which is a finding of its own."""
    with contextlib.suppress(TesseraError), contextlib.closing(settings.open_log()) as log:
        return log.end_offsets(settings.topics.deltas)[0] > 0
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

    found = standing(Settings.from_environment(), model, experiments=experiments)
    if json:
        print_json(found)
        return
    table = Table(show_header=False, title=found["model"], title_justify="left")
    for release in found["releases"]:
        if release["aliases"]:
            table.add_row(", ".join(release["aliases"]), f"version {release['version']}, {release['bundle']}")
    for topic, lag in found["lag"].items():
        table.add_row(f"lag of {topic}", "–" if lag is None else f"{lag:,} messages")
    age = found["newest_delta_s"]
    table.add_row("newest change of the table", "none yet" if age is None else f"{age:,.0f} s ago")
    for one in found["experiments"]:
        arms = "; ".join(f"{name} {arm['rate']:.4f} of {arm['requests']:,}" for name, arm in one["arms"].items())
        said = (
            f"{one['share']:.1%} of the users; {arms}; {one['estimate']:+.4f}, {interval_text(one['low'], one['high'])}"
        )
        table.add_row(f"experiment {one['experiment']}", said + "".join(f"; {breach}" for breach in one["breaches"]))
    out_console.print(table)


def standing(settings: Settings, model: str | None, *, experiments: bool) -> dict[str, Any]:
    """Returns the content of `status`."""
    from serving.rollout.guardrails import Guardrails
    from serving.rollout.judge import judging, ledger_path
    from serving.store.lag import deltas_behind, inputs_behind

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
        end = log.end_offsets(topics.deltas)[0]
        for back in (_MARKS, 8, 2):
            # If this many messages are no longer kept, fewer may be.
            with contextlib.suppress(TesseraError):
                for one in log.read(topics.deltas, 0, end - back, end):
                    newest = time.time() - one.timestamp_ms / 1_000
                break
        if experiments:
            path = ledger_path(settings.home, settings.kafka, topics, champion.model, Guardrails())
            with judging(
                registry, log, topics, model=champion.model, rule=Guardrails(), ledger=path, copy=True
            ) as judge:
                judged = [asdict(one) for one in judge.look()]
    return {
        "model": champion.model,
        "releases": [asdict(one) for one in registry.releases(champion.model)],
        "lag": lag,
        "newest_delta_s": newest,
        "experiments": judged,
    }
