"""Every command with its arguments and options, from the command line itself."""

from collections.abc import Iterator
from typing import Any

import typer
import typer.main

from infra.docs.reference.markdown import code, table, text


def walk(command: Any = None, path: str = "tessera") -> Iterator[tuple[str, Any]]:
    """Yields the path and the object of every command that does something, groups left out."""
    if command is None:
        from tessera.cli.main import app

        command = typer.main.get_command(app)
    if not hasattr(command, "list_commands"):
        yield path, command
        return
    context = typer.Context(command, info_name=path)
    for name in command.list_commands(context):
        yield from walk(command.get_command(context, name), f"{path} {name}")


def options(command: Any) -> list[Any]:
    """Returns the visible options of a command."""
    return [one for one in command.params if one.param_type_name == "option" and not one.hidden]


def arguments(command: Any) -> list[Any]:
    """Returns the arguments of a command."""
    return [one for one in command.params if one.param_type_name == "argument"]


def commands() -> str:
    """Returns a section for each command."""
    return "\n\n".join(_section(path, command) for path, command in walk())


def _section(path: str, command: Any) -> str:
    given = [_placeholder(one) for one in arguments(command)]
    lines = [f"## {path}", text(" ".join((command.help or "").split()))]
    lines.append(f"```\n{' '.join([path, *given, '[OPTIONS]' if options(command) else '']).strip()}\n```")
    if arguments(command):
        rows = [(code(one.name), _default(one), text(one.help or "")) for one in arguments(command)]
        lines.append(table(("argument", "default", "meaning"), rows))
    if options(command):
        rows = [(_names(one), _default(one), text(one.help or "")) for one in options(command)]
        lines.append(table(("option", "default", "meaning"), rows))
    return "\n\n".join(lines)


def _placeholder(argument: Any) -> str:
    name = argument.name.upper() + ("…" if argument.nargs == -1 or argument.multiple else "")
    return name if argument.required else f"[{name}]"


def _names(option: Any) -> str:
    names = ", ".join(code(name) for name in option.opts)
    if option.secondary_opts:
        names += " / " + ", ".join(code(name) for name in option.secondary_opts)
    return names + (", repeatable" if option.multiple else "")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or callable(parameter.default):
        return ""
    return code(parameter.default) if str(parameter.default) else ""
