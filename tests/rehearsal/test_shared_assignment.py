"""Two servers that share nothing but the registry give every user the same arm, and keep it."""

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import pytest

from serving.rollout.experiment import RampStep, arms, places
from tests.chaos.cluster import until
from tests.rehearsal.process import Server
from tests.rehearsal.stage import Stage
from tests.rehearsal.truth import CANDIDATES
from tests.rehearsal.truth import USERS as ALL

pytestmark = pytest.mark.slow
USERS = ALL[:120]


class Apart:
    """Servers with a home, a log and a Redis of their own each."""

    def __init__(self, stage: Stage) -> None:
        self._client = httpx.Client(timeout=60)
        self.servers: list[Server] = []
        for name in ("left", "right"):
            home = stage.directory / name
            # Empty addresses: everything is embedded in the home.
            alone = stage.environment | {"TESSERA_HOME": str(home), "TESSERA_KAFKA": "", "TESSERA_REDIS": ""}
            self.servers.append(Server(stage.tessera, stage.directory, name, alone))
        for server in self.servers:
            server.start()
        for server in self.servers:
            server.wait()
        assert all((stage.directory / name / "redis").is_dir() for name in ("left", "right"))

    def look(self) -> None:
        for server in self.servers:
            assert self._client.post(f"{server.url}/v1/admin/reload").status_code == 200

    def given(self) -> list[dict[str, str]]:
        """By server, the bundle that answers each user."""
        with ThreadPoolExecutor(4) as pool:
            return [
                dict(zip(USERS, pool.map(lambda user, at=server: self.one(at, user), USERS), strict=True))
                for server in self.servers
            ]

    def one(self, server: Server, user: str) -> str:
        """The bundle that answers a user."""
        body = {"user": user, "candidates": CANDIDATES[:2], "k": 1}
        answer = self._client.post(f"{server.url}/v1/rank", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["bundle"])

    def close(self) -> None:
        for server in self.servers:
            server.stop()
        self._client.close()


@pytest.fixture(scope="module")
def apart(stage: Stage) -> Iterator[Apart]:
    stage.crown(stage.bundles.good)
    with contextlib.closing(Apart(stage)) as made:
        yield made


def test_servers_without_a_shared_store_give_users_the_same_arm_and_a_restart_of_either_changes_none(
    stage: Stage, apart: Apart
) -> None:
    good, weak = stage.bundles.good, stage.bundles.weak
    stage.crown(good)
    made = stage.begin(weak, "alike", "--share", "0.3")
    apart.look()
    by_hash = dict(zip(USERS, arms(USERS, made, [made], time.time()).tolist(), strict=True))
    wanted = {user: weak.id if by_hash[user] == 1 else good.id for user in USERS}
    assert set(wanted.values()) == {weak.id, good.id}
    assert apart.given() == [wanted, wanted]
    for server in apart.servers:
        server.stop()
        server.start()
        server.wait()
        # From its first answer on.
        assert apart.given() == [wanted, wanted]
    # The servers of the other store say the same.
    assert stage.visit(USERS).bundles() == wanted


def test_a_wider_share_moves_the_users_between_its_old_end_and_its_new_and_nobody_else(
    stage: Stage, apart: Apart
) -> None:
    good, weak, bad = stage.bundles.good, stage.bundles.weak, stage.bundles.bad
    stage.crown(good)
    other = stage.begin(bad, "other", "--share", "0.25")
    made = stage.begin(weak, "wider", "--ramp", "0:.2,3600:.5")
    assert (other.start, made.start) == (0.0, 0.25)
    apart.look()
    before = apart.given()
    assert before[0] == before[1]
    # What an hour does: the step of the ramp comes.
    ramp = [RampStep(0.0, 0.2), RampStep(1.0, 0.5)]
    changed = [msgspec.structs.replace(one, ramp=ramp) if one == made else one for one in stage.experiments()]
    until(lambda: time.time() > made.started + 1, seconds=5, doing="the second step")
    stage.registry.documents.set_running(stage.model, changed)
    place = dict(zip(USERS, places(USERS, "models").tolist(), strict=True))
    between = {user for user in USERS if 0.45 <= place[user] < 0.75}
    some = min(between)
    # Nobody tells the servers.
    until(
        lambda: all(apart.one(server, some) == weak.id for server in apart.servers),
        seconds=30,
        doing="the servers' following",
    )
    after = apart.given()
    assert after[0] == after[1]
    moved = {user for user in USERS if before[0][user] != after[0][user]}
    assert moved == between
    assert {before[0][user] for user in moved} == {good.id}
    assert {after[0][user] for user in moved} == {weak.id}
    assert {user for user in USERS if after[0][user] == bad.id} == {user for user in USERS if place[user] < 0.25}
