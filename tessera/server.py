"""One server process: opens the store, the bundle and the application, and answers until it is stopped."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from features.errors import TesseraError
from tessera.settings import Settings
from tessera.terminal import err_console, one_thread


@dataclass(frozen=True)
class ServeOptions:
    """Choices of a server, as `tessera serve` takes them.

    Attributes:
        model: Name of the model; None: the registry holds one model.
        alias: Alias that is followed.
        bundle: Directory of the bundle to serve instead; no alias is followed then.
        host, port: Address to listen on.
        mirror: True keeps the whole table in the process.
        follow_s: Seconds between two polls of the registry.
        grace_s: Seconds that a replaced bundle stays in the store.
        drain_s: Seconds between not ready and closed, at the end.
        in_flight: Requests answered at a time, by all workers together.
        per_second: Requests a second of one key, by all workers together; 0 is without a limit.
        body_bytes: Largest body of one request.
        unrecorded: True appends no impressions.
        skew_sample: Share of the requests whose inputs are logged.
        console: True serves the operators' pages.
        hosts: Host names that callers may use without keys.
        workers: Processes that share the port.
    """

    model: str | None
    alias: str
    bundle: str | None
    host: str
    port: int
    mirror: bool = False
    follow_s: float = 2.0
    grace_s: float = 600.0
    drain_s: float = 2.0
    in_flight: int = 64
    per_second: float = 0.0
    body_bytes: int = 1 << 20
    unrecorded: bool = False
    skew_sample: float = 0.0
    console: bool = True
    hosts: Sequence[str] = field(default=())
    workers: int = 1


@dataclass(frozen=True)
class Shared:
    """Parts that the workers of one server share.

    Attributes:
        number: Number of this worker, from 1.
        listening: Socket of this worker.
        metrics: Directory of the workers' metrics.
        mirrors: Directory in memory of the tables that their mirrors share.
        rates: Rates of the callers, of all workers together.
        ready: Called when this worker is about to answer.
        orphaned: Tells that the process that started this worker is gone.
    """

    number: int
    listening: socket.socket
    metrics: Path
    mirrors: Path
    rates: Any
    ready: Callable[[], None]
    orphaned: Callable[[], bool]


def run_server(settings: Settings, options: ServeOptions, stop: threading.Event, shared: Shared | None = None) -> None:
    """Serves until `stop` is set, then drains.

    Args:
        settings: Addresses of store, log and registry.
        options: Choices of the server.
        stop: Ends the server.
        shared: Parts that this process shares with others; None if it is the only one.

    Raises:
        TesseraError: A server, a bundle or the port is not to be had.
    """
    import uvicorn

    from serving.api.app import AppParts, create_app
    from serving.api.guard import Limits
    from serving.api.hosts import LOOPBACK, Hosts
    from serving.api.ingest import Intake
    from serving.api.keys import KeyFile
    from serving.metrics import Metrics
    from serving.traffic.router import Router
    from tessera.stream_service import bundle_at

    keys = KeyFile(settings.home / "keys.json")
    guarded = bool(keys.keys())
    opened = bundle_at(settings, options.model, options.bundle) if options.bundle else _aliased(settings, options)
    one_thread()
    with contextlib.ExitStack() as stack:
        stack.enter_context(settings.traced("tessera-serve"))
        metrics = Metrics(shared.metrics if shared else None)
        opener = _opener(settings, options, metrics, stack, shared)
        service, close = opener(opened)
        current = stack.enter_context(contextlib.closing(Router(service, close=close)))
        parts = AppParts(
            metrics=metrics,
            limits=Limits(
                body_bytes=options.body_bytes,
                in_flight=-(-options.in_flight // options.workers),
                per_second=options.per_second,
            ),
            keys=keys if guarded else None,
            hosts=Hosts([options.host, *LOOPBACK, *options.hosts]),
            intake=Intake(_opened_sink(settings, stack)),
            rates=shared.rates if shared else None,
        )
        if options.skew_sample:
            _sample(settings, stack, parts, options.skew_sample)
        if not options.unrecorded:
            _record(settings, stack, parts)
        if options.bundle is None:
            _follow(settings, options, stack, current, opener, parts)
        access = f"{len(keys.keys())} API keys" if guarded else "no API keys: this machine alone"
        worker = f", worker {shared.number} of {options.workers}" if shared else ""
        where = f"http://{options.host}:{options.port}/docs"
        err_console.print(f"bundle {opened.id}, {service.items:,} items, {access}{worker}, {where}")
        app = create_app(current, parts)
        if options.console:
            from tessera.pages.console.app import Console, add_console

            add_console(app, stack.enter_context(contextlib.closing(Console(settings, current, metrics, parts.keys))))
        config = uvicorn.Config(
            app, host=options.host, port=options.port, log_level="warning", access_log=False,
            timeout_graceful_shutdown=30,
        )  # fmt: skip
        _serve_until(stop, uvicorn.Server(config), parts.state, options.drain_s, shared)


def _serve_until(stop: threading.Event, server: Any, state: Any, drain_s: float, shared: Shared | None) -> None:
    """Runs a server in a thread. On `stop` it reports not ready, continues for a while, then ends in order."""
    sockets = [shared.listening] if shared else None
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets}, name="http")
    thread.start()
    told = shared is None
    while thread.is_alive() and not stop.wait(0.2):
        if shared is not None and not told and server.started:
            shared.ready()
            told = True
        if shared is not None and shared.orphaned():
            break
    if not thread.is_alive():
        raise TesseraError("the server did not start; see the message above, and whether the port is free")
    state.draining = True
    time.sleep(drain_s)
    server.should_exit = True
    thread.join()


def _opener(
    settings: Settings, options: ServeOptions, metrics: Any, stack: contextlib.ExitStack, shared: Shared | None
) -> Any:
    """Returns what opens a bundle's service, with a mirror if the options ask for it."""
    from serving.ranking.mirror_feed import mirrored
    from serving.traffic.follow import ServiceOpener

    store = stack.enter_context(contextlib.closing(settings.open_store()))
    common = shared.mirrors if shared else None
    copied = partial(mirrored, settings.open_log, settings.topics, store, metrics=metrics, shared=common)
    return ServiceOpener(
        store,
        storage=settings.storage,
        mirror=copied if options.mirror else None,
        deltas=settings.topics.deltas,
        index=settings.index_rows(),
    )


def _follow(
    settings: Settings, options: ServeOptions, stack: contextlib.ExitStack, current: Any, opener: Any, parts: Any
) -> None:
    """Follows the registry until the stack is closed."""
    from serving.traffic.follow import RegistryFollower

    follower = RegistryFollower(
        settings.open_registry(create=False), settings.bundles, current, opener,
        model=options.model, grace_s=options.grace_s, metrics=parts.metrics, alias=options.alias,
    )  # fmt: skip
    parts.reload = follower.look
    # Assignments are read before the first answer, so that all servers assign a user to the same arm.
    follower.catch_up()
    stack.enter_context(contextlib.closing(follower.follow(every_s=options.follow_s)))


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


def _opened_sink(settings: Settings, stack: contextlib.ExitStack) -> Any:
    from serving.api.log_sink import LogSink

    sink = stack.enter_context(contextlib.closing(LogSink(settings.open_log, settings.topics)))
    sink.open()
    return sink


def _aliased(settings: Settings, options: ServeOptions) -> Any:
    registry = settings.open_registry(create=False)
    return registry.open(registry.resolve(options.model, options.alias), settings.bundles)
