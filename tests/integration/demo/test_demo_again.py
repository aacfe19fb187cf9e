"""A demo that runs again starts again in a home of its own, and continues elsewhere; it says which."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from features.errors import StoreError
from tessera.demo.home import own_home
from tessera.demo.live import LiveInput, go_live
from tessera.settings import Settings
from tests.integration.world import World

EVENTS = 200


def go(world: World, out: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """Runs the online half as the command does; returns its figures and what it prints."""
    printed = io.StringIO()
    console = Console(file=printed, width=1_000)
    settings = own_home(Settings.from_environment(environment), out, console, environment=environment)
    given = LiveInput(world.bundle, world.messages(EVENTS), plan=None, newcomer=None, titles={})
    return go_live(settings, given, console), printed.getvalue()


def test_a_second_demo_starts_again_in_its_own_home_and_says_so(world: World, tmp_path: Path) -> None:
    first, silence = go(world, tmp_path)
    second, message = go(world, tmp_path)
    assert first["stream"].events == second["stream"].events > 0
    assert first["stream"].bad == second["stream"].bad == 0
    assert silence == ""
    assert f"removed {tmp_path / 'home'}: an earlier demo streamed there" in message
    assert len(second["freshness_ms"]) == len(first["freshness_ms"]) > 0


def test_a_second_demo_continues_in_a_home_of_the_users_and_says_so(world: World, tmp_path: Path) -> None:
    home = {"TESSERA_HOME": str(tmp_path / "mine")}
    first, _ = go(world, tmp_path / "out", **home)
    second, message = go(world, tmp_path / "out", **home)
    assert first["stream"].bad == 0
    assert "stream" not in second
    assert "freshness_ms" not in second
    assert "continues on a log that holds events" in message


def test_a_home_that_another_process_has_open_is_kept(world: World, tmp_path: Path) -> None:
    go(world, tmp_path)
    with contextlib.closing(Settings(home=tmp_path / "home").open_store()):
        with pytest.raises(StoreError, match=r"home of an earlier demo, .*is open in another process; stop"):
            go(world, tmp_path)
    assert (tmp_path / "home" / "log.db").exists()
