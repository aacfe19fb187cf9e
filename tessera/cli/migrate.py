"""The command `tessera migrate`: converts a home that was moved, or that an earlier version made."""

from collections.abc import Callable

from tessera.settings import Settings
from tessera.terminal import JsonOption, out_console, print_json


def _relocate(settings: Settings) -> int:
    from models.registry.relocation import relocate

    return relocate(settings.home / "mlflow.db", settings.home / "mlflow")


STEPS: dict[str, Callable[[Settings], int]] = {"addresses of artifacts in the registry": _relocate}
"""Conversions by their shown name; each step returns the number of converted entries and may be repeated."""


def migrate(json: JsonOption = False) -> None:
    """Convert a home that was moved, or that an earlier version made; does nothing if nothing needs it."""
    settings = Settings.from_environment()
    done = {name: step(settings) for name, step in STEPS.items()}
    if json:
        print_json(done)
        return
    for name, count in done.items():
        out_console.print(f"{name}: {count:,} converted" if count else f"{name}: nothing to convert")
