"""Gives a demo a log without events, so that its held-back events are new to the stream."""

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from features.errors import StoreError
from tessera.settings import Settings

_LOG = "log.db"


def own_home(
    settings: Settings, out: Path, console: Console, *, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Returns settings with a home under `out`, emptied if an earlier demo has streamed there.

    A home that the environment names belongs to the user, and so does a server at an address. Both stay untouched.

    Args:
        settings: Addresses of the demo.
        out: Directory of the demo. The finished stages in it are kept.
        console: Prints that the home was emptied.
        environment: Variables that may name a home.

    Raises:
        StoreError: Another process has the store of that home open.
    """
    if "TESSERA_HOME" in environment:
        return settings
    own = replace(settings, home=(out / "home").absolute())
    if own.kafka or own.redis or own.mlflow or not (own.home / _LOG).exists():
        return own
    _refuse_use(own)
    shutil.rmtree(own.home)
    message = f"removed {own.home}: an earlier demo streamed there, and this one starts again; finished stages are kept"
    console.print(Text(message, "dim"))
    return own


def _refuse_use(settings: Settings) -> None:
    """Stops the store's server; it keeps running if another process has it open."""
    from serving.store.redis.embedded import is_open

    directory = settings.home / "redis"
    with contextlib.closing(settings.open_store()):
        pass
    if is_open(directory):
        raise StoreError(
            f"the home of an earlier demo, {settings.home}, is open in another process; stop that process (`tessera "
            "serve`, `tessera stream`), or choose another --out"
        )
