"""Commands `tessera serve` and `tessera keys`: the HTTP server and its API keys."""

import logging
import sys
import time
from typing import Annotated, Any, cast

import typer
from rich.table import Table

from features.errors import TesseraError
from tessera.settings import Settings
from tessera.terminal import (
    BundleOption,
    JsonOption,
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
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that share the port.")] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Log no line per request.")] = False,
) -> None:
    """Serve over HTTP; follow the registry's champion."""
    from serving.api.hosts import LOOPBACK
    from tessera.server import ServeOptions, run_server

    settings = Settings.from_environment()
    name, _, alias = (model or "").partition("@")
    if host not in LOOPBACK and not _key_file(settings).keys():
        raise TesseraError(
            f"--host {host}: without API keys only this machine is served; `tessera keys add NAME` makes a key"
        )
    options = ServeOptions(
        model=name or None,
        alias=alias or "champion",
        bundle=bundle,
        host=host,
        port=port,
        mirror=mirror,
        follow_s=follow_s,
        grace_s=grace_s,
        drain_s=drain_s,
        in_flight=in_flight,
        per_second=per_second,
        body_bytes=body_bytes,
        unrecorded=unrecorded,
        skew_sample=skew_sample,
        console=console,
        hosts=tuple(allow_host or ()),
        workers=workers,
    )
    log_lines(requests=not quiet)
    if workers > 1:
        from tessera.workers import run_workers

        run_workers(settings, options)
    else:
        from tessera.stream_service import until_stopped

        run_server(settings, options, until_stopped())


def log_lines(*, requests: bool) -> None:
    """Writes the log of this process as JSON lines to standard error."""
    from serving.metrics import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("features", "models", "streaming", "serving", "tessera", "opentelemetry"):
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
