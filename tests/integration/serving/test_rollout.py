"""A rollout from start to end: who is served what, what the log accounts for, and what undoes itself."""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from features.errors import EventError, StoreError, TesseraError
from features.shown.message import Impression, Shadowed, decode_impression
from models.registry.lineage import Lineage
from models.registry.release import CHALLENGER, CHAMPION
from serving.api.app import AppParts, create_app
from serving.api.ingest import Intake
from serving.api.log_sink import LogSink
from serving.ranking.service import RankService
from serving.rollout.experiment import RampStep, arm
from serving.rollout.guardrails import Guardrails
from serving.rollout.judge import Judge, judging
from serving.rollout.ledger import Ledger
from serving.rollout.lifecycle import parse_ramp, promoted, running, start, stop
from serving.rollout.report import report
from serving.store.memory import MemoryStore
from serving.traffic.follow import RegistryFollower, ServiceOpener
from serving.traffic.recorder import Recorder
from serving.traffic.router import Router
from serving.traffic.shadow import Shadows
from streaming.log.topics import Topics
from tessera.pages.rollout_page import write_page
from tessera.settings import Settings
from tests.integration.world import World, make_world

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")
USERS = [f"visitor-{number}" for number in range(400)]
RULE = Guardrails(planned=400)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("other"), seed=1)


class Stage:
    """A registry with a champion and a challenger, and a server that follows it."""

    def __init__(self, directory: Path, world: World, other: World, kafka: str = "") -> None:
        topics = Topics(f"test-{uuid.uuid4().hex[:8]}-" if kafka else "")
        self.settings = Settings(home=directory, kafka=kafka, topics=topics)
        self.registry = self.settings.open_registry()
        self.champion, self.challenger = world.bundle, other.bundle
        self.releases = [
            self.registry.publish(one, params={}, metrics={}, lineage=Lineage(dataset="d"))
            for one in (self.champion, self.challenger)
        ]
        self.registry.challenge(self.releases[1], verdict={})
        self.items = world.bundle.items["item_id"].to_list()[:20]
        store = MemoryStore()
        opener = ServiceOpener(store)
        service, close = opener(self.champion)
        self.stack = contextlib.ExitStack()
        self.current = self.stack.enter_context(contextlib.closing(Router(service, close=close)))
        self.parts = AppParts(
            intake=Intake(
                self.stack.enter_context(contextlib.closing(LogSink(self.settings.open_log, self.settings.topics)))
            )
        )
        sink = self.stack.enter_context(contextlib.closing(LogSink(self.settings.open_log, self.settings.topics)))
        self.recorder = self.stack.enter_context(contextlib.closing(Recorder(sink, self.parts.metrics)))
        self.parts.recorder = self.recorder
        self.parts.shadows = self.stack.enter_context(
            contextlib.closing(Shadows(self.recorder, self.parts.metrics, self.parts.state))
        )
        self.follower = RegistryFollower(
            self.settings.open_registry(create=False),
            self.settings.bundles,
            self.current,
            opener,
            model=None,
            grace_s=600,
            metrics=self.parts.metrics,
        )
        self.client = self.stack.enter_context(TestClient(create_app(self.current, self.parts)))

    def rank(self, user: str) -> dict[str, Any]:
        answer = self.client.post("/v1/rank", json={"user": user, "candidates": self.items, "k": 5})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def click(self, answers: list[dict[str, Any]], rates: dict[str, float]) -> int:
        rng = np.random.default_rng(0)
        outcomes = [
            {"impression": one["impression"], "item": one["items"][0]["item"]}
            for one in answers
            if rng.random() < rates[one["bundle"]]
        ]
        for begin in range(0, len(outcomes), 500):
            response = self.client.post("/v1/outcomes", json={"outcomes": outcomes[begin : begin + 500]})
            assert response.status_code == 202, response.text
        return len(outcomes)

    def until_shadows(self, what: str, count: int) -> None:
        """Waits until so many rankings in the shadow were made, or shed."""
        give_up = time.monotonic() + 20
        while self.parts.metrics.shadows.labels(what)._value.get() < count:
            assert time.monotonic() < give_up
            time.sleep(0.005)

    def logged(self, count: int) -> list[Impression | Shadowed]:
        """The first messages of the topic `impressions`, when so many are there."""
        give_up = time.monotonic() + 20
        with contextlib.closing(self.settings.open_log()) as log:
            topic = self.settings.topics.impressions
            # The recorder's thread makes the topics with the first impression.
            log.create_topics(self.settings.topics.partitions())
            while log.end_offsets(topic)[0] < count:
                assert time.monotonic() < give_up, f"{log.end_offsets(topic)[0]} of {count} impressions came"
                time.sleep(0.05)
            with contextlib.closing(log.follow(topic, ())) as follower:
                return [decode_impression(message.value) for message in follower.poll(count, 5)]


@pytest.fixture
def stage_on_kafka(world: World, other: World, tmp_path: Path, kafka_address: str) -> Iterator[Stage]:
    made = Stage(tmp_path, world, other, kafka_address)
    with made.stack:
        yield made


@pytest.fixture
def stage(world: World, other: World, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path, world, other)
    with made.stack:
        yield made


def judged(stage: Stage, *, act: bool, rule: Guardrails = RULE) -> Any:
    with contextlib.closing(stage.settings.open_log()) as log:
        with judging(stage.registry, log, stage.settings.topics, model=None, rule=rule) as judge:
            found = judge.look()
            return found, judge.act(found) if act else [], judge.aside


def test_users_get_their_arm_and_the_log_accounts_for_every_request(stage: Stage) -> None:
    made = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.3)])
    stage.follower.look()
    answers = {user: stage.rank(user) for user in USERS}
    again = {user: stage.rank(user)["bundle"] for user in USERS}
    assert again == {user: one["bundle"] for user, one in answers.items()}
    by_hash = {user: arm(user, made, [made], time.time()) for user in USERS}
    wanted = {"challenger": stage.challenger.id, "control": stage.champion.id}
    assert all(answers[user]["bundle"] == wanted[str(by_hash[user])] for user in USERS)
    shown = stage.logged(2 * len(USERS))
    assert len({one.id for one in shown}) == 2 * len(USERS)
    for one in shown:
        assert isinstance(one, Impression)
        assert one.arms == {made.id: by_hash[one.user]}
        assert one.epochs == {made.id: made.started}
        assert one.bundle == answers[one.user]["bundle"]
        assert len(one.items) == len(one.scores) == 5
    clicked = stage.click(list(answers.values()), {stage.champion.id: 0.5, stage.challenger.id: 0.5})
    (standing,), ended, aside = judged(stage, act=True)
    assert ended == []
    assert aside == {}
    assert sum(view.requests for view in standing.arms.values()) == 2 * len(USERS)
    assert sum(view.outcomes for view in standing.arms.values()) == clicked
    assert standing.low < 0 < standing.high
    assert standing.breaches == ()
    assert running(stage.registry, stage.champion.dataset.name) == [made]


def test_a_worse_challenger_is_rolled_back_with_the_reason_and_its_users_get_the_champion(stage: Stage) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="friday")
    stage.follower.look()
    answers = [stage.rank(user) for user in USERS]
    stage.click(answers, {stage.champion.id: 0.9, stage.challenger.id: 0.2})
    stage.logged(len(USERS))
    (standing,), ended, _ = judged(stage, act=True)
    assert standing.breaches[0].startswith("rate: 0.")
    assert [one.bundle for one in ended] == [stage.challenger.id]
    assert stage.registry.ended(stage.releases[1]).startswith("rolled back: rate")
    assert running(stage.registry, stage.champion.dataset.name) == []
    with pytest.raises(TesseraError, match="has no challenger"):
        stage.registry.resolve(None, CHALLENGER)
    stage.follower.look()
    assert {stage.rank(user)["bundle"] for user in USERS[:50]} == {stage.champion.id}
    assert stage.current.challengers == {}


def test_the_report_of_an_experiment_says_what_happened_and_why(stage: Stage, tmp_path: Path) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="friday")
    stage.follower.look()
    answers = [stage.rank(user) for user in USERS]
    clicks = stage.click(answers, {stage.champion.id: 0.9, stage.challenger.id: 0.2})
    stage.logged(len(USERS))
    time.sleep(1.1)
    judged(stage, act=True)
    with contextlib.closing(stage.settings.open_log()) as log:
        found = report(
            stage.registry, log, stage.settings.topics, "friday", model=None, rule=RULE,
            known=lambda bundle: dict.fromkeys(USERS[:100], 1) | {USERS[0]: 9},
            familiar=lambda bundle: frozenset(stage.items[:1]),
        )  # fmt: skip
        with pytest.raises(TesseraError, match="running: none; ended: friday"):
            report(stage.registry, log, stage.settings.topics, "monday", model=None, rule=RULE)
    assert found["decision"].startswith("rolled back: rate")
    assert sum(arm["requests"] for arm in found["arms"].values()) == len(USERS)
    assert sum(arm["outcomes"] for arm in found["arms"].values()) == clicks
    assert found["points"][-1]["high"] < 0
    segments = {one["segment"]: one for one in found["segments"]}
    assert segments["known users"]["users"] == 100
    assert segments["new users"]["users"] == len(USERS) - 100
    # The heaviest by their visits before the experiment, whatever it made of them.
    assert segments["heavy users, by their visits before"]["users"] == 100
    new = segments["new items, outcomes for each that was shown"]
    assert new["users"] > 0
    assert new["control"] > new["challenger"]
    assert found["guardrails"]
    write_page(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Rollout friday" in page
    assert "rolled back: rate" in page
    assert "<polygon" in page
    assert "http" not in page.replace("http-equiv", "")


def raises(error: BaseException) -> Callable[..., Any]:
    def network(*_: object) -> torch.Tensor:
        raise error

    return network


def hangs(*_: object) -> torch.Tensor:
    time.sleep(60)
    raise AssertionError("nobody waits so long")


def gives_no_numbers(pooled: torch.Tensor, batch: Any) -> torch.Tensor:
    return torch.full((batch.size,), float("nan"))


@pytest.mark.parametrize(
    ("network", "status"),
    [
        (raises(StoreError("its rows are gone")), 503),
        (raises(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), 500),
        (raises(KeyError("weight")), 500),
        (raises(MemoryError()), 500),
        (raises(EventError("context: unknown column 'hour'")), 422),
        (gives_no_numbers, 503),
        (hangs, 503),
    ],
    ids=["store", "shapes", "key", "memory", "lost column", "no numbers", "hangs"],
)
def test_whatever_leaves_the_pin_without_an_answer_is_a_failed_impression_and_rolls_the_challenger_back(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, network: Callable[..., Any], status: int
) -> None:
    made = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    # On a busy machine an answer takes its time, and only the network that hangs may be given up.
    monkeypatch.setattr(stage.current, "_answer_s", 0.5 if network is hangs else 30.0)
    monkeypatch.setattr("serving.traffic.bulkhead._TURN_S", 0.01)
    stage.follower.look()
    (broken,) = stage.current.challengers.values()
    monkeypatch.setattr(broken._scorer, "_network", network)
    client = TestClient(stage.client.app, raise_server_exceptions=False)
    users = USERS[:120]
    statuses = {
        user: client.post("/v1/rank", json={"user": user, "candidates": stage.items}).status_code for user in users
    }
    given = {user: str(arm(user, made, [made], time.time())) for user in users}
    assert statuses == {user: status if given[user] == CHALLENGER else 200 for user in users}
    found = [one for one in stage.logged(len(users)) if isinstance(one, Impression)]
    # Each request once, and the failed ones with their arm.
    assert {one.user: (one.failed, one.arms[made.id]) for one in found} == {
        user: (given[user] == CHALLENGER, given[user]) for user in users
    }
    (standing,), ended, _ = judged(stage, act=True)
    assert any(breach.startswith("requests failed: 100.0%") for breach in standing.breaches)
    assert len(ended) == 1


def test_a_callers_own_fault_is_no_impression_of_either_arm(stage: Stage) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    stage.follower.look()
    for user in USERS[:20]:
        body = {"user": user, "candidates": stage.items, "context": {"no such": 1}}
        assert stage.client.post("/v1/rank", json=body).status_code == 422
    stage.rank(USERS[0])
    (shown,) = stage.logged(1)
    assert isinstance(shown, Impression)
    assert not shown.failed


def test_on_a_real_broker_a_bad_challenger_is_rolled_back_and_every_request_is_accounted_for(
    stage_on_kafka: Stage,
) -> None:
    stage = stage_on_kafka
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="friday")
    stage.follower.look()
    answers = [stage.rank(user) for user in USERS]
    stage.click(answers, {stage.champion.id: 0.9, stage.challenger.id: 0.2})
    shown = {one.id for one in stage.logged(len(USERS))}
    assert shown == {one["impression"] for one in answers}
    (standing,), ended, aside = judged(stage, act=True)
    assert sum(view.requests for view in standing.arms.values()) == len(USERS)
    assert aside == {}
    assert [one.bundle for one in ended] == [stage.challenger.id]
    with contextlib.closing(stage.settings.open_log()) as log:
        found = report(stage.registry, log, stage.settings.topics, "friday", model=None, rule=RULE)
    assert found["decision"].startswith("rolled back: rate")


def test_another_experiment_that_starts_and_ends_is_no_wrong_split(stage: Stage) -> None:
    first = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.3)], name="first")
    stage.follower.look()
    half = [stage.rank(user) for user in USERS[:200]]
    time.sleep(1.1)
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="second")
    stage.follower.look()
    rest = [stage.rank(user) for user in USERS[200:]]
    stage.logged(len(half) + len(rest))
    found, ended, _ = judged(stage, act=True)
    assert [one.experiment for one in found] == ["first", "second"]
    assert ended == []
    assert all(one.split_p > 1e-3 for one in found)
    time.sleep(1.1)
    stop(stage.registry, None, "second", why="enough")
    # The challenger is still tried by the first.
    assert stage.registry.resolve(None, CHALLENGER).bundle == stage.challenger.id
    stage.follower.look()
    again = [stage.rank(user) for user in USERS]
    stage.logged(len(half) + len(rest) + len(again))
    (standing,), ended, _ = judged(stage, act=True)
    assert (standing.experiment, ended) == (first.name, [])
    assert standing.split_p > 1e-3


def test_experiments_of_two_layers_each_keep_the_split_they_asked_for(stage: Stage) -> None:
    one = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.4)], name="one", layer="one")
    two = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="two", layer="two")
    stage.follower.look()
    both = 0
    for user in USERS:
        answer = stage.rank(user)
        given = [each for each in (one, two) if arm(user, each, [one, two], time.time()) == "challenger"]
        both += len(given) == 2
        # Two layers that give a user a challenger each leave them to the champion.
        assert answer["bundle"] == (stage.challenger.id if len(given) == 1 else stage.champion.id)
    shown = stage.logged(len(USERS))
    assert sum(not one.arms for one in shown if isinstance(one, Impression)) == both > 0
    found, _, _ = judged(stage, act=False)
    assert [each.experiment for each in found] == ["one", "two"]
    for each in found:
        assert each.split_p > 1e-3
        assert not each.breaches


def test_a_judge_sees_what_starts_after_it_and_tells_a_name_that_is_used_again(stage: Stage) -> None:
    with contextlib.closing(stage.settings.open_log()) as log:
        with judging(stage.registry, log, stage.settings.topics, model=None, rule=RULE) as judge:
            assert judge.look() == []
            first = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)], name="again")
            stage.follower.look()
            answers = [stage.rank(user) for user in USERS]
            stage.click(answers, {stage.champion.id: 0.9, stage.challenger.id: 0.2})
            stage.logged(len(USERS))
            found = judge.look()
            assert [one.bundle for one in judge.act(found)] == [stage.challenger.id]
            # What was ended meanwhile is not ended twice.
            assert judge.act(found) == []
            second = start(stage.registry, None, stage.challenger.id, [RampStep(0.0, 0.5)], name="again")
            assert second.id != first.id
            (standing,) = judge.look()
            assert standing.breaches == ()
            assert {view.requests for view in standing.arms.values()} == {0}


def test_a_judge_that_starts_again_reads_only_what_came_since_and_one_that_only_asks_changes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    stage.follower.look()
    path, topics = stage.settings.home / "judge" / "ledger.sqlite", stage.settings.topics
    read: list[int] = []
    show = Ledger.show

    def counted(ledger: Ledger, message: Any) -> None:
        read[-1] += 1
        show(ledger, message)

    monkeypatch.setattr(Ledger, "show", counted)

    def look(*, copy: bool) -> int:
        read.append(0)
        with contextlib.closing(stage.settings.open_log()) as log:
            with judging(stage.registry, log, topics, model=None, rule=RULE, ledger=path, copy=copy) as judge:
                (found,) = judge.look()
        return sum(view.requests for view in found.arms.values())

    for part in range(3):
        answers = [stage.rank(user) for user in USERS[100 * part : 100 * part + 100]]
        stage.click(answers, {stage.champion.id: 0.5, stage.challenger.id: 0.5})
        stage.logged(100 * part + 100)
        assert [look(copy=True), look(copy=True), look(copy=False)] == [100 * part + 100] * 3
    assert read == [100] * 9
    # Another log under the same name: what was folded is none of it.
    with contextlib.closing(Ledger(path)) as ledger:
        ledger.keep({(topics.impressions, 0): 10**6})
    assert look(copy=False) == 300
    with contextlib.closing(stage.settings.open_log()) as log:
        monkeypatch.setattr("serving.rollout.judge._TURN_S", 0.0)
        with judging(stage.registry, log, topics, model=None, rule=RULE, ledger=path):
            with pytest.raises(TesseraError, match="in use by another process"):
                Judge(stage.registry, log, topics, model=None, rule=RULE, ledger=path)


def test_a_challenger_that_cannot_be_opened_serves_nobody(stage: Stage) -> None:
    for path in (stage.settings.home / "mlflow").rglob("manifest.json"):
        if json.loads(path.read_text())["id"] == stage.challenger.id:
            (path.parent / "table.safetensors").write_bytes(b"broken")
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    stage.follower.look()
    assert {stage.rank(user)["bundle"] for user in USERS} == {stage.champion.id}
    stage.logged(len(USERS))
    # Half of the users are in no arm, which is not the split that was asked for.
    (standing,), ended, _ = judged(stage, act=True)
    assert standing.breaches[0].startswith("sample ratio")
    assert len(ended) == 1


def test_a_shadow_ranks_what_was_shown_and_changes_no_answer(stage: Stage) -> None:
    before = {user: stage.rank(user)["items"] for user in USERS[:30]}
    made = start(stage.registry, None, CHALLENGER, [RampStep(0.0, 1.0)], shadow=True)
    stage.follower.look()
    for number, user in enumerate(USERS[:30], 1):
        answer = stage.rank(user)
        assert (answer["bundle"], answer["items"]) == (stage.champion.id, before[user])
        # A shadow waits until nobody asks; so do we.
        stage.until_shadows("ranked", number)
    shown = stage.logged(90)
    shadowed = [one for one in shown if isinstance(one, Shadowed)]
    assert len(shadowed) == 30
    assert not any(one.failed for one in shadowed)
    service = stage.current.challengers[stage.challenger.id]
    assert isinstance(service, RankService)
    impressions = {one.id: one for one in shown if isinstance(one, Impression)}
    one = shadowed[0]
    their = dict(service.rank(impressions[one.id].user, impressions[one.id].items, 5).items)
    drift = np.mean([their[item] for item in impressions[one.id].items]) - np.mean(impressions[one.id].scores)
    assert one.drift == pytest.approx(drift, abs=1e-5)
    (standing,), _, _ = judged(stage, act=True)
    assert standing.shadow
    assert standing.shadowed["ranked"] == 30
    assert -1 <= standing.shadowed["rank_correlation"] <= 1
    assert standing.experiment == made.name


def test_a_busy_server_sheds_shadows_first(stage: Stage) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 1.0)], shadow=True)
    stage.follower.look()
    stage.parts.state.in_flight += 10
    for user in USERS[:5]:
        assert stage.rank(user)["bundle"] == stage.champion.id
    stage.until_shadows("shed", 5)
    assert not any(isinstance(one, Shadowed) for one in stage.logged(5))
    stage.parts.state.in_flight -= 10
    stage.rank(USERS[0])
    assert isinstance(stage.logged(7)[6], Shadowed)


def test_promotion_ends_the_experiment_and_its_users_keep_what_they_saw(stage: Stage) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    stage.follower.look()
    saw = {user: stage.rank(user) for user in USERS[:60]}
    now = promoted(stage.registry, stage.registry.release(None, CHALLENGER))
    assert now.aliases == (CHAMPION,)
    assert running(stage.registry, now.model) == []
    assert stage.follower.look() == stage.challenger.id
    for user, answer in saw.items():
        if answer["bundle"] == stage.challenger.id:
            assert stage.rank(user)["items"] == answer["items"]


def test_outcomes_that_cannot_be_joined_are_counted_and_set_aside(stage: Stage) -> None:
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.5)])
    stage.follower.look()
    answer = stage.rank(USERS[0])
    good = {"impression": answer["impression"], "item": answer["items"][0]["item"]}
    outcomes = [
        good,
        good,
        good | {"item": "never shown"},
        good | {"what": "buy", "time_ms": 5},
        {"impression": "nobody's", "item": "x"},
    ]
    assert stage.client.post("/v1/outcomes", json={"outcomes": outcomes}).json() == {"accepted": 5}
    stage.logged(1)
    _, _, aside = judged(stage, act=False)
    assert aside == {
        "repeated outcome": 1, "item was not shown": 1, "before its impression": 1, "unknown impression": 1,
    }  # fmt: skip
    wrong = stage.client.post("/v1/outcomes", json={"outcomes": [{"impression": "", "item": "x"}]})
    assert (wrong.status_code, wrong.json()["field"]) == (422, "outcomes.0.impression")


def test_what_cannot_be_started_is_refused(stage: Stage) -> None:
    with pytest.raises(TesseraError, match="this is the champion"):
        start(stage.registry, None, CHAMPION, [RampStep(0.0, 0.1)])
    with pytest.raises(TesseraError, match="has no no-such"):
        start(stage.registry, None, "no-such", [RampStep(0.0, 0.1)])
    for share in (0.0, 1.5, -1.0):
        with pytest.raises(TesseraError, match="above 0 and up to 1"):
            start(stage.registry, None, CHALLENGER, [RampStep(0.0, share)])
    for name in ("<b>", "a/b", "..", " ", "x" * 81):
        with pytest.raises(TesseraError, match="expected a name of 1 to 80 letters"):
            start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.1)], name=name)
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.7)], name="a")
    with pytest.raises(TesseraError, match="'a' runs already"):
        start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.1)], name="a")
    with pytest.raises(TesseraError, match="layer 'models': 70% of it is taken"):
        start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.4)], name="b")
    start(stage.registry, None, CHALLENGER, [RampStep(0.0, 0.4)], name="b", layer="elsewhere")
    with pytest.raises(TesseraError, match="running: a, b"):
        stop(stage.registry, None, "c", why="x")
    assert parse_ramp("0:.01,3600:.1", 0.5) == [RampStep(0.0, 0.01), RampStep(3600.0, 0.1)]
    with pytest.raises(TesseraError, match="expected SECONDS:SHARE"):
        parse_ramp("soon", 0.5)
