"""Invalid input is refused with the reason, or counted and quarantined, for operators and callers."""

import json
import time
from collections import Counter
from typing import Any

import msgspec
import pytest

from serving.rollout.experiment import CHALLENGER, CONTROL
from tests.rehearsal.stage import PLANNED, Answer, Stage
from tests.rehearsal.truth import USERS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["start", "--challenger", "99"], "has no 99; its aliases are ["),
        (["start", "--challenger", "champion"], "champion: this is the champion, which already serves"),
        (
            ["start", "--challenger", "VERSION", "--share", "0"],
            "share 0 after 0 s: expected a share above 0",
        ),
        (["start", "--challenger", "VERSION", "--share", "1.01"], "share 1.01 after 0 s: expected a share above 0"),
        (["start", "--challenger", "VERSION", "--share", "-0.1"], "share -0.1 after 0 s: expected a share above 0"),
        (["start", "--challenger", "VERSION", "--share", "nan"], "share nan after 0 s: expected a share above 0"),
        (["start", "--challenger", "VERSION", "--ramp", "0:.5,60:.1"], "a ramp goes up in time and share"),
        (["start", "--challenger", "VERSION", "--ramp", "soon"], "--ramp soon: expected SECONDS:SHARE,…"),
        (["promote", "99"], "has no 99; its aliases are ["),
        (["stop", "nobody"], "no rollout named 'nobody'; running: none"),
        (["report", "nobody"], "no rollout named 'nobody'"),
        (["status", "--model", "nobody"], "model 'nobody': expected one of ['rehearsal-"),
    ],
)
def test_a_command_that_cannot_be_is_refused_with_status_2_and_the_reason_and_changes_nothing(
    stage: Stage, words: list[str], said: str
) -> None:
    if stage.experiments():
        stage.crown(stage.bundles.weak)
    before = stage.releases()
    version = stage.versions[stage.bundles.bad.id]
    done = stage.run("rollout", *(version if word == "VERSION" else word for word in words), status=2)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert stage.experiments() == []
    assert stage.releases() == before


def test_experiments_that_take_more_than_all_of_a_layer_are_refused(stage: Stage) -> None:
    stage.crown(stage.bundles.weak)
    held = stage.begin(stage.bundles.good, "most", "--share", "0.7")
    version = stage.versions[stage.bundles.bad.id]
    done = stage.run("rollout", "start", "--challenger", version, "--name", "more", "--share", "0.4", status=2)
    assert "layer 'models': 70% of it is taken, and no 40% is free in one piece" in done.stderr
    again = stage.run("rollout", "start", "--challenger", version, "--name", "most", "--share", "0.1", status=2)
    assert "rollout 'most' runs already" in again.stderr
    assert stage.experiments() == [held]


def aside(stage: Stage) -> Counter[str]:
    """Returns the messages that a look quarantines."""
    return Counter(json.loads(stage.run("rollout", "status", "--json").stdout)["aside"])


def standing(stage: Stage) -> dict[str, Any]:
    (found,) = json.loads(stage.run("rollout", "status", "--planned", str(PLANNED), "--json").stdout)["experiments"]
    return dict(found)


def post(stage: Stage, *outcomes: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    server = stage.servers[0]
    response = stage.client.post(f"{server.url}/v1/outcomes", json={"outcomes": list(outcomes)})
    return response.status_code, response.json()


def asked(stage: Stage, user: str) -> Answer:
    answer = stage.rank(stage.servers[0], user)
    assert answer is not None
    return answer


def test_outcomes_that_cannot_be_joined_are_counted_and_set_aside(stage: Stage) -> None:
    stage.crown(stage.bundles.weak)
    stage.begin(stage.bundles.good, "aside")
    before = aside(stage)
    shown = asked(stage, USERS[0])
    now = time.time_ns() // 1_000_000
    first, second, third, fourth, fifth = ({"impression": shown.impression, "item": item} for item in shown.items)
    sent: list[dict[str, Any]] = [
        first,
        first,
        {"impression": "nobody's", "item": "a00001"},
        {"impression": shown.impression, "item": "never shown"},
        # A clock may be a minute behind the server's; further behind, and it is wrong.
        second | {"time_ms": now - 30_000},
        third | {"time_ms": now - 180_000},
        fourth | {"time_ms": now + 8 * 86_400_000},
        fifth | {"time_ms": now + 180_000},
    ]
    assert post(stage, *sent) == (202, {"accepted": len(sent)})
    stage.account()
    found = aside(stage)
    assert found - before == {
        "repeated outcome": 1,
        "unknown impression": 1,
        "item was not shown": 1,
        "before its impression": 1,
        "too late": 1,
    }
    arms = standing(stage)["arms"]
    assert arms[CONTROL]["outcomes"] + arms[CHALLENGER]["outcomes"] == 3
    said = stage.run("rollout", "status").stdout
    assert f"{found['repeated outcome']} repeated outcome" in said
    assert f"{found['unknown impression']} unknown impression" in said


@pytest.mark.parametrize(
    ("outcome", "field"),
    [
        ({"impression": "", "item": "a00001"}, "outcomes.0.impression"),
        ({"impression": "x"}, "outcomes.0.item"),
        ({"impression": "x", "item": "a00001", "what": ""}, "outcomes.0.what"),
        ({"impression": "x", "item": "a00001", "time_ms": "yesterday"}, "outcomes.0.time_ms"),
        ({"impression": "x", "item": "a00001", "arm": "control"}, "outcomes.0.arm"),
    ],
)
def test_an_outcome_that_is_none_is_refused_with_the_field(stage: Stage, outcome: dict[str, Any], field: str) -> None:
    status, found = post(stage, outcome)
    assert (status, found["field"]) == (422, field)
    assert found["detail"].startswith(f"{field}: ")


def test_an_experiment_that_was_started_by_a_clock_an_hour_ahead_runs_and_is_judged(stage: Stage) -> None:
    stage.crown(stage.bundles.weak)
    made = stage.begin(stage.bundles.good, "ahead")
    ahead = msgspec.structs.replace(made, started=made.started + 3_600)
    stage.registry.documents.set_running(stage.model, [ahead])
    stage.reload()
    users = USERS[:60]
    seen = stage.visit(users)
    assert set(seen.bundles().values()) == {stage.bundles.weak.id, stage.bundles.good.id}
    stage.account()
    arms = standing(stage)["arms"]
    assert arms[CONTROL]["requests"] + arms[CHALLENGER]["requests"] == len(users)
    assert arms[CONTROL]["outcomes"] + arms[CHALLENGER]["outcomes"] == seen.clicks
