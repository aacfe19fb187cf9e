"""The guides do what they say: every command in them is run, and what they show is what it prints."""

import contextlib
import json
import re
import shlex
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from serving.store.redis.store import RedisStore
from tests.integration.guide import GuideError, read_blocks, run_guide
from tests.integration.warm import warm_tessera

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "guides"
GUIDES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
FOR_SERVERS = [path for path in GUIDES if any(one.kind == "sh servers" for one in read_blocks(path.read_text()))]
USERS = {"batch-features.md", "ranker.md", "rollout.md", "streaming.md"}


@pytest.fixture(scope="module")
def tools() -> Iterator[Path]:
    """A `tessera` that starts at once; in a short directory, since a socket's path must be short."""
    with tempfile.TemporaryDirectory() as directory, warm_tessera(Path(directory)) as found:
        yield found


def with_free_ports(text: str) -> str:
    """The guide with ports of its own in the place of those it names."""
    with contextlib.ExitStack() as held:
        for named in ("8000", "9100"):
            port = held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            text = re.sub(rf"\b{named}\b", str(port), text)
    return text


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=by_name)
def test_every_command_of_a_guide_does_what_the_guide_shows(guide: Path, tools: Path, tmp_path: Path) -> None:
    text = with_free_ports(guide.read_text(encoding="utf-8"))
    assert any(block.kind == "sh" for block in read_blocks(text))
    run_guide(text, root=ROOT, tools=tools, directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("guide", FOR_SERVERS, ids=by_name)
def test_a_guide_that_names_servers_does_the_same_on_them(
    guide: Path, tools: Path, tmp_path: Path, kafka_address: str, redis_address: str
) -> None:
    text = with_free_ports(guide.read_text(encoding="utf-8"))
    for named, address in (("127.0.0.1:9092", kafka_address), ("redis://127.0.0.1:6379/0", redis_address)):
        assert named in text
        text = text.replace(named, address)
    # The servers are everybody's: topics and bundles get a name that nobody else has.
    own = f"shop-{uuid.uuid4().hex[:4]}"
    copy = 'cp "$GUIDES/shop.toml" .'
    assert copy in text
    text = text.replace("teashop", own).replace(copy, f'sed s/teashop/{own}/ "$GUIDES/shop.toml" > shop.toml')
    try:
        run_guide(text, root=ROOT, tools=tools, directory=tmp_path, servers=True)
    finally:
        with contextlib.closing(RedisStore(redis_address)) as store:
            for manifest in tmp_path.rglob("bundle/manifest.json"):
                store.drop(json.loads(manifest.read_text())["id"])


def test_each_kind_of_user_has_a_guide_and_the_index_names_all() -> None:
    assert {path.name for path in GUIDES} >= USERS
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in GUIDES if f"]({path.name})" not in index] == []


@pytest.mark.parametrize("guide", [*GUIDES, FOLDER / "README.md"], ids=by_name)
def test_links_lead_somewhere_and_commands_named_in_passing_exist(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#]+)", prose) if "://" not in link]
    assert [link for link in links if not (FOLDER / link).exists()] == []
    for command in re.findall(r"`tessera ([^`]+)`", prose):
        options = known_options(command)
        assert [word for word in re.findall(r"--[a-z-]+", command) if word not in options] == [], command


def known_options(command: str) -> set[str]:
    """The options of the command that the words name."""
    from tessera.cli.main import app

    found = typer.main.get_command(app)
    for word in shlex.split(command):
        below = getattr(found, "commands", None)
        if below is None or word.startswith("-"):
            break
        assert word in below, f"tessera {command}: there is no {word!r}"
        found = below[word]
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("```sh\necho one\nfalse\n```\n", "line 1: ended with status 1"),
        ("```sh fails\ntrue\n```\n", "line 1: did not fail"),
        ("```sh\necho one two\n```\n```text\none …\nthree\n```\n", "'three' was not printed"),
        ("```sh\necho 1; echo two\n```\n```text exact\n2\n```\n", "'2' was not printed"),
        ("```sh\ntrue\n```\n```python\nassert False\n```\n", "line 4: ended with status 1"),
        ("```console\n$ true\n```\n", "a block of 'console'"),
        ("```text\none\n```\n", "no command stands before it"),
    ],
)
def test_a_guide_that_is_wrong_is_refused_with_the_line(wrong: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(GuideError, match=re.escape(words)):
        run_guide(wrong, root=ROOT, tools=tmp_path, directory=tmp_path)


def test_variables_and_background_processes_last_from_block_to_block(tmp_path: Path) -> None:
    blocks = ("word=seven; sleep 60 &\n", "echo $word; kill %1; wait %1 || echo ended\n")
    shown = "```text exact\nseven\nended\n```\n"
    guide = "".join(f"```sh\n{one}```\n" for one in blocks) + shown
    run_guide(guide, root=ROOT, tools=tmp_path, directory=tmp_path)
    with pytest.raises(GuideError, match="'eight' was not printed"):
        run_guide(guide.replace("\nseven", "\neight"), root=ROOT, tools=tmp_path, directory=tmp_path)


def test_nothing_that_a_guide_leaves_running_outlives_it(tmp_path: Path) -> None:
    run_guide(f"```sh\nsleep 60 &\necho $! > {tmp_path}/pid\n```\n", root=ROOT, tools=tmp_path, directory=tmp_path)
    state = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    give_up = time.monotonic() + 10
    # Ended, or ended and not yet collected by its new parent.
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < give_up, "it still runs"
        time.sleep(0.02)
