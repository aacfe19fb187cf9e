"""New items are ranked among the catalogue over HTTP, for users who like their kind and for users who do not."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from serving.client import Client
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from tessera.demo import synthetic
from tessera.demo.live import http_server
from tessera.demo.new_items import NewItemPlan, measure_ranks, new_items, plan_new_items
from tessera.pipeline.artifact import read_frame
from tessera.stream_service import StreamConnections, StreamService
from tests.integration.world import World


@pytest.fixture(scope="module")
def plan(world: World) -> NewItemPlan:
    made = plan_new_items(world.dataset, world.bundle, world.directory, seed=0)
    assert made is not None
    return made


@contextlib.contextmanager
def live(world: World, home: Path) -> Iterator[tuple[LocalLog, StreamService, str]]:
    store = MemoryStore()
    fill_store(store, world.bundle)
    with contextlib.closing(LocalLog(home / "log.db")) as log:
        stream = StreamService(world.bundle, StreamConnections.shared(log, store, topics=Topics()))
        with stream, http_server(world.bundle, store) as (client, _):
            yield log, stream, str(client.base_url)


def test_new_items_have_ranks_with_content_and_without_and_leave_no_trace(
    world: World, plan: NewItemPlan, tmp_path: Path
) -> None:
    few = replace(plan, users=plan.users[:8], fans=plan.fans[:8], others=plan.others[:8])
    name = plan.messages[0][0]
    with live(world, tmp_path) as (log, stream, url), contextlib.closing(Client(url)) as client:
        with new_items(log, stream, Topics(), few):
            found = measure_ranks(client, few)
            answer = client.rank(few.users[0], [*plan.catalogue, name], k=2_000)
        gone = client.rank(few.users[0], [name, plan.catalogue[0]]).unknown_items
        with pytest.raises(ValueError, match="does not know the new item"):
            measure_ranks(client, few)
    assert gone == [name]
    assert (found.items, found.users, found.catalogue) == (72, 8, 300)
    assert len(found.with_content.fans) == len(found.without_content.fans) == few.fans.sum()
    assert len(found.with_content.others) == len(found.without_content.others) == few.others.sum()
    # With one new item alone, the rank is its place in the answer.
    place = [ranked.item for ranked in answer.items].index(name) + 1
    either = few.fans[0, 0] or few.others[0, 0]
    assert not either or place in (found.with_content.fans[0], found.with_content.others[0])
    # Ids alone say nothing about a kind.
    assert abs(found.without_content.ratio - 1) < abs(found.with_content.ratio - 1)


def test_a_plan_holds_the_users_of_known_taste_and_no_content_in_the_control(world: World, plan: NewItemPlan) -> None:
    assert len(plan.with_content) == len(plan.without_content) == 72
    assert all(set(row) == {"item_id"} for row in plan.without_content)
    assert all(row["title"] for row in plan.with_content)
    assert not {name for name, _ in plan.messages} & set(world.bundle.items["item_id"])
    assert len({name for name, _ in plan.messages}) == 144
    assert not (plan.fans & plan.others).any()
    taste = synthetic.tastes(world.dataset.directory, plan.users)
    assert (np.where(plan.fans, taste, np.inf).min(axis=0) > np.where(plan.others, taste, -np.inf).max(axis=0)).all()
    other = plan_new_items(world.dataset, world.bundle, world.directory, seed=1)
    assert other is not None
    assert other.users != plan.users


def test_the_fans_of_a_copy_liked_the_original_in_a_held_back_event_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "is_synthetic", lambda directory: False)
    plan = plan_new_items(world.dataset, world.bundle, world.directory, seed=0)
    assert plan is not None
    assert plan.before_events
    assert plan.fans.any(axis=0).all()
    frame = {name: pl.read_parquet(world.directory / "frame" / f"{name}.parquet") for name in ("users", "items")}
    liked = read_frame(world.directory / "frame").examples.filter(pl.col("label") == 1)
    titles = _titles(world)
    for number, row in enumerate(plan.with_content):
        original = titles[row["title"], row["description"]]
        of_item = liked.filter(pl.col("item") == frame["items"]["item_id"].to_list().index(original))
        by_user = {frame["users"]["user_id"][user]: set(splits) for user, splits in _splits(of_item)}
        fans = {user for user, fan in zip(plan.users, plan.fans[:, number], strict=True) if fan}
        others = {user for user, other in zip(plan.users, plan.others[:, number], strict=True) if other}
        assert fans == {user for user in plan.users if by_user.get(user) == {"test"}}
        assert others == {user for user in plan.users if user not in by_user}


def test_a_dataset_without_content_has_no_new_items(world: World) -> None:
    bare = world.dataset.model_copy(update={"items": None})
    assert plan_new_items(bare, world.bundle, world.directory, seed=0) is None


def _titles(world: World) -> dict[tuple[str, str], str]:
    rows = pl.read_ndjson(world.dataset.directory / "items.jsonl")
    return {(title, text): name for name, title, text in rows.select("item_id", "title", "description").iter_rows()}


def _splits(examples: pl.DataFrame) -> list[tuple[int, list[str]]]:
    return list(examples.group_by("user").agg(pl.col("split")).iter_rows())
