"""A rollout rehearsed end to end: two servers, a judge, MLflow, Kafka and Redis, each a process of its own."""

import json
import time

import pytest
from mlflow import MlflowClient

from serving.rollout.experiment import CHALLENGER, CONTROL, arm
from tests.chaos.cluster import until
from tests.rehearsal.faults import KINDS
from tests.rehearsal.stage import PLANNED, Stage
from tests.rehearsal.truth import USERS

pytestmark = pytest.mark.slow


def test_a_better_challenger_is_not_rolled_back_and_serves_everybody_once_promoted(stage: Stage) -> None:
    weak, good = stage.bundles.weak, stage.bundles.good
    stage.crown(weak)
    made = stage.begin(good, "better")
    with stage.watched():
        seen = stage.visit([*USERS, *USERS])
        given = {"challenger": good.id, "control": weak.id}
        assert seen.bundles() == {user: given[str(arm(user, made, [made], time.time()))] for user in USERS}

        def whole() -> bool:
            arms = (look["arms"].values() for look in stage.looks(made)[-1:])
            return any(sum(one["outcomes"] for one in both) == seen.clicks for both in arms)

        until(whole, seconds=60, doing="the judge's reading")
        looks = stage.looks(made)
    assert [look["breaches"] for look in looks if look["breaches"]] == []
    assert stage.experiments() == [made]
    arms = looks[-1]["arms"]
    assert arms[CONTROL]["requests"] + arms[CHALLENGER]["requests"] == len(seen.answers)
    assert arms[CHALLENGER]["rate"] > arms[CONTROL]["rate"]
    assert looks[-1]["low"] > 0
    assert looks[-1]["split_p"] > 0.001
    said = stage.run("rollout", "promote", stage.versions[good.id]).stdout
    assert f"bundle {good.id}: champion" in said
    until(lambda: set(stage.visit(USERS[:40]).bundles().values()) == {good.id}, seconds=30, doing="the promotion")
    assert set(stage.visit(USERS).bundles().values()) == {good.id}
    assert stage.ended(made) == f"{good.id} was promoted"
    assert stage.releases()[weak.id]["aliases"] == ["previous"]
    stage.account()


def test_a_challenger_that_learnt_from_flipped_labels_is_rolled_back_at_the_first_look_at_the_evidence(
    stage: Stage,
) -> None:
    good, bad = stage.bundles.good, stage.bundles.bad
    stage.crown(good)
    made = stage.begin(bad, "flipped")
    with stage.watched():
        stage.visit(USERS)
        evidence = time.time()
        why = stage.until_ended(made)
        until(lambda: bool(stage.looks(made)) and bool(stage.looks(made)[-1]["breaches"]), seconds=30, doing="its note")
        # Nobody tells the servers.
        stage.until_served(USERS[:40], good)
    assert set(stage.visit(USERS).bundles().values()) == {good.id}
    looks = stage.looks(made)
    # One may have begun before the last of the evidence came; the next one ends it.
    behind = [look for look in looks if look["at"] > evidence]
    assert len(behind) <= 2
    assert all(min(one["users"] for one in look["arms"].values()) < 100 for look in looks if not look["breaches"])
    print(f"rolled back {looks[-1]['at'] - evidence:.1f} s and {len(behind)} looks after the last click")
    assert "rate: " in why
    assert looks[-1]["arms"][CHALLENGER]["rate"] < looks[-1]["arms"][CONTROL]["rate"]
    whole = stage.releases()[bad.id]["ended"]
    assert whole.startswith(why)
    assert whole == "rolled back: " + "; ".join(looks[-1]["breaches"])
    client = MlflowClient(stage.mlflow.address)
    version = client.get_model_version(stage.model, stage.versions[bad.id])
    assert version.tags["tessera.rollout"] == whole
    assert client.get_run(str(version.run_id)).data.tags["tessera.rollout"] == whole
    stage.account()


def test_a_challenger_with_a_corrupt_file_never_serves_and_status_and_logs_say_so(stage: Stage) -> None:
    good, broken = stage.bundles.good, stage.bundles.broken
    stage.crown(good)
    (place,) = [
        path.parent
        for path in stage.mlflow.artifacts.rglob("manifest.json")
        if json.loads(path.read_bytes())["id"] == broken.id
    ]
    data = bytearray((place / "network.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "network.safetensors").write_bytes(data)
    made = stage.begin(broken, "broken")
    seen = stage.visit(USERS)
    assert {(one.status, one.bundle) for one in seen.answers} == {(200, good.id)}
    for server in stage.servers:
        words = [line["message"] for line in server.lines() if line["level"] == "warning"]
        (said,) = [one for one in words if one.startswith(f"challenger {broken.id} cannot serve: ")]
        assert "network.safetensors is not in the manifest or was altered" in said
    assert broken.id not in {one.bundle for one in stage.account()}
    status = json.loads(stage.run("rollout", "status", "--planned", str(PLANNED), "--json").stdout)
    (standing,) = status["experiments"]
    assert standing["arms"][CHALLENGER]["requests"] == 0
    assert standing["breaches"][0].startswith("sample ratio: ")
    assert stage.experiments() == [made]
    shown = stage.run("rollout", "status", "--planned", str(PLANNED)).stdout
    assert "breach sample ratio: " in shown
    stage.run("rollout", "watch", "--once", "--planned", str(PLANNED))
    assert stage.ended(made).startswith("rolled back: sample ratio: ")
    assert stage.releases()[broken.id]["ended"].startswith("rolled back: sample ratio: ")


def test_a_challenger_whose_rows_are_lost_fails_requests_that_are_accounted_for_and_is_rolled_back(
    stage: Stage,
) -> None:
    good, weak = stage.bundles.good, stage.bundles.weak
    stage.crown(good)
    made = stage.begin(weak, "lost")
    stage.until_served([user for user in USERS if arm(user, made, [made], time.time()) == CHALLENGER][:1], weak)
    store = stage.settings.open_store()
    store.drop(weak.id)
    store.close()
    with stage.watched():
        seen = stage.visit(USERS)
        why = stage.until_ended(made)
        stage.until_served(USERS[:40], good)
    failed = {one.user for one in seen.answers if one.status != 200}
    assert failed
    assert failed <= {user for user in USERS if arm(user, made, [made], time.time()) == CHALLENGER}
    assert {one.why for one in seen.answers if one.status != 200} == {"Online store unavailable"}
    assert "requests failed: " in why
    assert {one.status for one in stage.visit(USERS).answers} == {200}
    stage.account()


@pytest.mark.parametrize("kind", KINDS)
def test_a_challenger_whose_network_breaks_is_rolled_back_and_holds_up_nobody_else(stage: Stage, kind: str) -> None:
    good, weak = stage.bundles.good, stage.bundles.weak
    stage.crown(good)
    made = stage.begin(weak, f"breaks-{kind.replace(' ', '-')}")
    given = {user: arm(user, made, [made], time.time()) for user in USERS}
    stage.until_served([user for user in USERS if given[user] == CHALLENGER][:1], weak)
    stage.breaks({weak.id: kind})
    try:
        with stage.watched():
            seen = stage.visit(USERS[:80])
            why = stage.until_ended(made)
            stage.until_served(USERS[:10], good)
    finally:
        stage.breaks({})
    status = {"raises": 500, "lost column": 422}.get(kind, 503)
    before_the_end = [one for one in seen.answers if one.status != 200]
    assert {one.status for one in before_the_end} == {status}
    assert {given[one.user] for one in before_the_end} == {CHALLENGER}
    assert all(one.status == 200 for one in seen.answers if given[one.user] == CONTROL)
    assert "requests failed: " in why
    assert {one.status for one in stage.visit(USERS[:20]).answers} == {200}
    stage.account()


def test_every_request_is_accounted_for_while_one_server_after_the_other_restarts(stage: Stage) -> None:
    good, weak = stage.bundles.good, stage.bundles.weak
    stage.crown(good)
    made = stage.begin(weak, "restarts")
    first = stage.visit(USERS)
    before = first.bundles()
    with stage.visited(USERS) as seen:
        for server in stage.servers:
            server.stop()
            server.start()
            server.wait()
    assert len(seen.answers) > len(USERS) / 3
    assert {one.status for one in seen.answers} == {200}
    assert all(one.bundle == before[one.user] for one in seen.answers)
    assert set(before.values()) == {good.id, weak.id}
    stage.account()
    (standing,) = json.loads(stage.run("rollout", "status", "--json").stdout)["experiments"]
    assert standing["experiment"] == made.name
    arms = standing["arms"].values()
    assert sum(one["requests"] for one in arms) == len(USERS) + len(seen.answers)
    assert sum(one["outcomes"] for one in arms) == first.clicks + seen.clicks
