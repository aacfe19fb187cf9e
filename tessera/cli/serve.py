"""Commands `tessera serve` and `tessera keys`: the HTTP server and its API keys."""

import contextlib
import logging
import sys
import threading
import time
from functools import partial
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from features.errors import TesseraError
from tessera.settings import Settings
from tessera.terminal import (
    BundleOption,
    JsonOption,
    err_console,
    one_thread,
    out_console,
    print_json,
)

keys = typer.Typer(no_args_is_help=True, help="API keys of the server.")


def serve(
    model: Annotated[
        str | None,
        typer.Option(help="Name of the model, or NAME@ALIAS; by default the champion of the registry's only model."),
    ] = None,
    bundle: BundleOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Keep the whole table in this process, fresh from the log.")
    ] = False,
    follow_s: Annotated[float, typer.Option(min=0.1, help="Seconds between two polls of the registry.")] = 2.0,
    grace_s: Annotated[float, typer.Option(min=60, help="Seconds that a replaced bundle stays in the store.")] = 600.0,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds between not ready and closed, at the end.")] = 2.0,
    in_flight: Annotated[int, typer.Option(min=1, help="Requests answered at a time; more get 503.")] = 64,
    per_second: Annotated[float, typer.Option(min=0, help="Requests a second of one key; more get 429. 0: all.")] = 0.0,
    body_bytes: Annotated[int, typer.Option(min=1_024, help="Bytes of a body; more get 413.")] = 1 << 20,
    unrecorded: Annotated[
        bool, typer.Option("--unrecorded", help="Append no impressions; experiments need them.")
    ] = False,
    skew_sample: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the requests whose inputs are logged for `tessera skew`.")
    ] = 0.0,
    console: Annotated[bool, typer.Option(help="Serve the operators' pages at /console.")] = True,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Host name that callers may use without API keys; repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log no line per request.")] = False,
) -> None:
    """Serve over HTTP; follow the registry's champion."""
    import uvicorn

    from serving.api.app import AppParts, create_app
    from serving.api.guard import Limits
    from serving.api.hosts import LOOPBACK, Hosts
    from serving.api.ingest import Intake
    from serving.metrics import Metrics
    from serving.ranking.mirror_feed import mirrored
    from serving.traffic.follow import ServiceOpener
    from serving.traffic.router import Router
    from tessera.pages.console.app import Console, add_console
    from tessera.stream_service import bundle_at, until_stopped

    settings = Settings.from_environment()
    name, _, alias = (model or "").partition("@")
    model, alias = name or None, alias or "champion"
    allowed = _key_file(settings)
    guarded = bool(allowed.keys())
    if not guarded and host not in LOOPBACK:
        raise TesseraError(
            f"--host {host}: without API keys only this machine is served; `tessera keys add NAME` makes a key"
        )
    opened = bundle_at(settings, model, bundle) if bundle else _aliased(settings, model, alias)
    stop = until_stopped()
    one_thread()
    log_lines(requests=not quiet)
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings.traced("tessera-serve"))
        store = stack.enter_context(contextlib.closing(settings.open_store()))
        metrics = Metrics()
        feed = partial(mirrored, settings.open_log, settings.topics, store, metrics=metrics) if mirror else None
        opener = ServiceOpener(
            store, storage=settings.storage, mirror=feed, deltas=settings.topics.deltas, index=settings.index_rows()
        )
        service, close = opener(opened)
        current = stack.enter_context(contextlib.closing(Router(service, close=close)))
        parts = AppParts(
            metrics=metrics,
            limits=Limits(body_bytes=body_bytes, in_flight=in_flight, per_second=per_second),
            keys=allowed if guarded else None,
            hosts=Hosts([host, *LOOPBACK, *(allow_host or ())]),
            intake=Intake(_opened_sink(settings, stack)),
        )
        if skew_sample:
            _sample(settings, stack, parts, skew_sample)
        if not unrecorded:
            _record(settings, stack, parts)
        if bundle is None:
            follower = _follower(settings, current, opener, parts.metrics, model=model, alias=alias, grace_s=grace_s)
            parts.reload = follower.look
            # Assignments are read before the first answer, so that all servers assign a user to the same arm.
            follower.catch_up()
            stack.enter_context(contextlib.closing(follower.follow(every_s=follow_s)))
        access = f"{len(allowed.keys())} API keys" if guarded else "no API keys: this machine alone"
        err_console.print(f"bundle {opened.id}, {service.items:,} items, {access}, http://{host}:{port}/docs")
        app = create_app(current, parts)
        if console:
            pages = stack.enter_context(contextlib.closing(Console(settings, current, parts.metrics, parts.keys)))
            add_console(app, pages)
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", access_log=False,
            timeout_graceful_shutdown=30,
        )  # fmt: skip
        _serve_until(stop, uvicorn.Server(config), parts.state, drain_s)


def _serve_until(stop: threading.Event, server: Any, state: Any, drain_s: float) -> None:
    """Runs a server in a thread. On `stop` it reports not ready, continues for a while, then ends in order."""
    thread = threading.Thread(target=server.run, name="http")
    thread.start()
    while thread.is_alive() and not stop.wait(0.2):
        pass
    if not thread.is_alive():
        raise TesseraError("the server did not start; see the message above, and whether the port is free")
    state.draining = True
    time.sleep(drain_s)
    server.should_exit = True
    thread.join()


def _sample(settings: Settings, stack: contextlib.ExitStack, parts: Any, rate: float) -> None:
    """Adds a sampler of the answers' inputs to the parts of an application."""
    from serving.skew.sample import SkewSampler

    sink = _opened_sink(settings, stack)
    parts.sampler = stack.enter_context(contextlib.closing(SkewSampler(sink, parts.metrics, rate)))


def _record(settings: Settings, stack: contextlib.ExitStack, parts: Any) -> None:
    """Adds a recorder of impressions and shadow rankings to the parts of an application."""
    from serving.traffic.recorder import Recorder
    from serving.traffic.shadow import Shadows

    parts.recorder = stack.enter_context(contextlib.closing(Recorder(_opened_sink(settings, stack), parts.metrics)))
    sample = parts.sampler.offer if parts.sampler is not None else None
    shadows = Shadows(parts.recorder, parts.metrics, parts.state, sample=sample)
    parts.shadows = stack.enter_context(contextlib.closing(shadows))


def _follower(
    settings: Settings, current: Any, opener: Any, metrics: Any, *, model: str | None, alias: str, grace_s: float
) -> Any:
    from serving.traffic.follow import RegistryFollower

    registry = settings.open_registry(create=False)
    return RegistryFollower(
        registry, settings.bundles, current, opener, model=model, grace_s=grace_s, metrics=metrics, alias=alias
    )


def _opened_sink(settings: Settings, stack: contextlib.ExitStack) -> Any:
    from serving.api.log_sink import LogSink

    sink = stack.enter_context(contextlib.closing(LogSink(settings.open_log, settings.topics)))
    sink.open()
    return sink


def _aliased(settings: Settings, model: str | None, alias: str) -> Any:
    registry = settings.open_registry(create=False)
    return registry.open(registry.resolve(model, alias), settings.bundles)


def log_lines(*, requests: bool) -> None:
    """Writes the log of this process as JSON lines to standard error."""
    from serving.metrics import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("tessera", "models", "streaming", "serving", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if not requests:
        logging.getLogger("tessera.access").setLevel(logging.WARNING)


def _key_file(settings: Settings) -> Any:
    from serving.api.keys import KeyFile

    return KeyFile(settings.home / "keys.json")


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Owner of the key; shown in logs.")],
    scope: Annotated[
        list[str] | None, typer.Option(help="read, write, console, forget or admin; repeatable. Default: read.")
    ] = None,
) -> None:
    """Make a key and print it once: only its hash is kept."""
    from serving.api.keys import Scope

    secret = _key_file(Settings.from_environment()).add(name, cast("list[Scope]", scope or ["read"]))
    out_console.print(secret, soft_wrap=True, highlight=False)


@keys.command("list")
def keys_list(json: JsonOption = False) -> None:
    """Show the owners of the keys and their scopes."""
    known = _key_file(Settings.from_environment()).keys()
    if json:
        print_json([{"name": key.name, "scopes": key.scopes, "created": key.created} for key in known])
        return
    table = Table("name", "scopes", "created")
    for key in known:
        table.add_row(key.name, ", ".join(key.scopes), time.strftime("%Y-%m-%d %H:%M", time.gmtime(key.created)))
    out_console.print(table)


@keys.command("remove")
def keys_remove(name: Annotated[str, typer.Argument(help="Owner of the key to end.")]) -> None:
    """End a key; a running server refuses it within a second."""
    _key_file(Settings.from_environment()).remove(name)
