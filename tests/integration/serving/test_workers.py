"""`tessera serve --workers`: one port, one count of requests, one rate of a key, and a worker that dies is replaced."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.integration.served import Served
from tests.integration.world import World

WORKERS = 2


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # Short: a socket lies below.
    options = ("--workers", str(WORKERS), "--mirror", "--drain-s", "0.2", "--per-second", "1000")
    found = Served(world, tmp_path_factory.mktemp("s"), *options)
    yield found
    if found.process.poll() is None:
        found.stop()


def workers_of(served: Served) -> list[int]:
    """Returns the processes that the server's parent has started."""
    children = Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text()
    return [int(pid) for pid in children.split()]


def until_all_answer(served: Served) -> None:
    """Waits until every worker listens: each announces itself once per start."""
    give_up = time.monotonic() + 150
    while len(re.findall(r"worker \d of", served.log.read_text())) < WORKERS or len(workers_of(served)) < WORKERS:
        assert time.monotonic() < give_up, served.log.read_text()
        time.sleep(0.1)


def counted(served: Served) -> float:
    """Returns the rankings that /metrics counts."""
    page = httpx.get(f"{served.url}/metrics", headers={"Authorization": f"Bearer {served.reader}"}).text
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in page.splitlines()
        if line.startswith('tessera_requests_total{route="/v1/rank"')
    )


def test_all_workers_answer_alike_and_are_counted_together(served: Served, world: World) -> None:
    until_all_answer(served)
    before = counted(served)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: served.ask(world), range(60)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({str(answer.json()["items"]) for answer in answers}) == 1
    # Whichever worker is asked, it tells the count of all.
    assert {counted(served) - before for _ in range(2 * WORKERS)} == {60.0}
    busy = [pid for pid in workers_of(served) if _cpu_ticks(pid) > 0]
    assert len(busy) == WORKERS


def _cpu_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11])


def test_a_worker_that_is_killed_starts_again(served: Served, world: World) -> None:
    until_all_answer(served)
    before = counted(served)
    victim = workers_of(served)[0]
    os.kill(victim, signal.SIGKILL)
    give_up, answered = time.monotonic() + 60, 0
    while answered < 20 or "it starts again" not in served.log.read_text() or len(workers_of(served)) < WORKERS:
        # A connection that the killed worker had not accepted is reset.
        with contextlib.suppress(httpx.TransportError):
            answered += served.ask(world).status_code == 200
        assert time.monotonic() < give_up, served.log.read_text()
    assert victim not in workers_of(served)
    # The counts of the killed worker stay.
    assert counted(served) >= before + 20


def test_the_rows_of_the_mirrors_are_in_memory_once(served: Served) -> None:
    # A worker that was killed before is still starting.
    give_up, mapped = time.monotonic() + 60, [[""]]
    while len(mapped) < WORKERS or not all(mapped):
        assert time.monotonic() < give_up, mapped
        mapped = [re.findall(r"\S+ \d+ +/\S*/tessera-mirror-\S*\.rows$", maps, re.M) for maps in maps_of(served)]
        time.sleep(0.1)
    assert len({one for found in mapped for one in found}) == 1, mapped


def maps_of(served: Served) -> list[str]:
    return [Path(f"/proc/{pid}/maps").read_text() for pid in workers_of(served)]


def test_the_port_is_one_server_s(served: Served, world: World) -> None:
    port = served.url.rsplit(":", 1)[1]
    command = ["serve", "--bundle", str(world.bundle.directory), "--port", port, "--workers", "2"]
    second = subprocess.run(
        [sys.executable, "-m", "tessera", *command], env=served.environment, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    assert "Traceback" not in second.stderr


def test_sigterm_ends_all_workers(served: Served, world: World) -> None:
    pids = workers_of(served)
    (place,) = set(re.findall(r"/\S*/tessera-mirror-[^/\s]*", "".join(maps_of(served))))
    assert Path(place).is_dir()
    served.stop()
    assert not Path(place).exists()
    assert served.process.returncode == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(httpx.TransportError):
        served.ask(world)
