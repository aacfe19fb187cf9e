"""`tessera rollout`: who serves. Aliases move in the registry; servers follow them within seconds."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from tessera.console import JsonOption, ModelNameOption, out_console, print_json
from tessera.settings import Settings

if TYPE_CHECKING:
    from models.registry import Release

rollout = typer.Typer(no_args_is_help=True, help="Who serves: champion, challenger, previous.")


@rollout.command("list")
def list_releases(model: ModelNameOption = None, json: JsonOption = False) -> None:
    """Show a model's versions, their bundles and aliases."""
    registry = Settings.from_environment().open_registry()
    found = registry.releases(registry.resolve(model).model)
    if json:
        print_json([{"version": one.version, "bundle": one.bundle, "aliases": one.aliases} for one in found])
        return
    table = Table("version", "bundle", "aliases")
    for one in found:
        table.add_row(one.version, one.bundle, ", ".join(one.aliases))
    out_console.print(table)


@rollout.command()
def promote(
    name: Annotated[str, typer.Argument(help="An alias, a version, or a bundle's id.")] = "challenger",
    model: ModelNameOption = None,
) -> None:
    """Make a release the champion; the one before becomes `previous`."""
    registry = Settings.from_environment().open_registry()
    _say(registry.promote(registry.release(model, name)))


@rollout.command()
def rollback(model: ModelNameOption = None) -> None:
    """Make the release before the champion again."""
    from models.registry import PREVIOUS

    registry = Settings.from_environment().open_registry()
    _say(registry.promote(registry.release(model, PREVIOUS)))


def _say(release: "Release") -> None:
    aliases = ", ".join(release.aliases)
    out_console.print(f"{release.model} version {release.version}, bundle {release.bundle}: {aliases}")
