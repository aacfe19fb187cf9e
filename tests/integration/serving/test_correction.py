"""New items are corrected by a user's labelled items: alone, in the stream, in a server, and for a forgotten user."""

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from fastapi.testclient import TestClient

from features.errors import BundleError
from models.bundle import record
from models.bundle.bundle import Bundle, load_bundle, write_bundle
from models.bundle.contents import CORRECTION, LABELLED_ITEMS
from models.encoder.meaning.neighbours import LABELLED, corrected, load_correction
from models.ranker.correct import labelled_before
from models.table.admission import Admission, Sketch
from serving.api.app import create_app
from serving.ranking.service import RankService
from serving.store.fill import fill_store
from serving.store.memory import MemoryStore
from serving.store.verify import replay, verify
from serving.store.writer import StoreWriter
from serving.traffic.router import Router
from streaming.forget.request import forget
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.snapshot import Snapshots
from streaming.step_state import snapshot_of
from streaming.trainer import Trainer, TrainerOptions
from tests.build import coloured_parts, corrected_bundle

NEW = {"item_id": "new", "text": "a red thing of kind1", "colour": "red"}
# Training has not met i6 often enough.
KNOWN = [f"i{number}" for number in range(11) if number != 6]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    directory = tmp_path_factory.mktemp("plain")
    return write_bundle(coloured_parts(directory, events=400, every_us=3_600_000_000), directory / "bundle")


@pytest.fixture(scope="module")
def bundle(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return corrected_bundle(plain, tmp_path_factory.mktemp("corrected") / "bundle")


class Site:
    """A stream with one new item, its store and a server."""

    def __init__(self, bundle: Bundle, directory: Path) -> None:
        self.bundle, self.topics, self.store = bundle, Topics(), MemoryStore()
        self.log = LocalLog(directory / "log.db")
        self.log.create_topics(self.topics.partitions())
        self.directory = directory / "snapshots"
        self.snapshots = Snapshots(self.directory)
        fill_store(self.store, bundle)
        self.service = RankService(bundle, self.store, deltas=self.topics.deltas)
        self.log.append(self.topics.items, [(b"new", json.dumps(NEW).encode())])
        self.sent = 0

    def send(self, user: str, labels: dict[str, int], *, age: timedelta = timedelta(0)) -> None:
        rows: list[tuple[bytes | None, bytes]] = []
        for item, label in labels.items():
            self.sent += 1
            moment = (datetime.now(UTC) - age + timedelta(microseconds=self.sent)).isoformat()
            row = {"user_id": user, "item_id": item, "label": label, "time": moment}
            rows.append((user.encode(), json.dumps(row).encode()))
        self.log.append(self.topics.events, rows)

    def drain(self) -> Trainer:
        options = TrainerOptions(batch=16, wait_s=0)
        trainer = Trainer(self.log, self.bundle, topics=self.topics, options=options, snapshots=self.snapshots)
        while not trainer.drained():
            trainer.run_once()
        with contextlib.closing(StoreWriter(self.log, self.bundle.id, self.store, topics=self.topics)) as writer:
            while writer.run_once():
                pass
        self.service.refresh()
        return trainer

    def scores(self, user: str, items: list[str]) -> dict[str, float]:
        return dict(self.service.rank(user, items, len(items)).items)

    def labels_of(self, user: str) -> dict[str, int]:
        (payload,) = self.store.read_records(self.bundle.id, record.HISTORY, [user])
        found = record.decode_history(payload or record.encode(record.HistoryRecord([], [])))
        return dict(zip(found.labelled, found.labels, strict=True))


@pytest.fixture
def site(bundle: Bundle, tmp_path: Path) -> Iterator[Site]:
    made = Site(bundle, tmp_path)
    with contextlib.closing(made.log):
        yield made


def test_a_known_item_keeps_its_bits_and_an_item_without_content_too(plain: Bundle, bundle: Bundle) -> None:
    items = [*KNOWN, "nobody knows this item"]
    for user in ("u0", "u7", "stranger"):
        assert plain.rank(user, items).tobytes() == bundle.rank(user, items).tobytes()


def test_a_new_item_is_corrected_alone_as_in_the_server(bundle: Bundle, plain: Bundle, tmp_path: Path) -> None:
    # No value of the ids was sighted, so all items are new.
    blank, ranked = load_bundle(bundle.directory), load_bundle(plain.directory)
    for one in (blank, ranked):
        one.__dict__["admission"] = lambda: Admission(Sketch.sized(0), 2)
    store = MemoryStore()
    fill_store(store, blank)
    service = RankService(blank, store)
    for user in ("u0", "u7"):
        served, own = service.rank(user, KNOWN, 10), blank.rank(user, KNOWN)
        assert own.tolist() == [np.float32(dict(served.items)[item]) for item in KNOWN]
        assert (own != ranked.rank(user, KNOWN)).all()
    assert blank.rank("stranger", KNOWN).tolist() == ranked.rank("stranger", KNOWN).tolist()


def test_the_streams_labels_correct_a_new_item_and_the_server_names_them(site: Site) -> None:
    site.drain().close()
    before = site.scores("u0", ["new", *KNOWN])
    site.send("u0", {"i0": 0, "i4": 0, "i1": 1, "i5": 1, "i2": 1})
    site.drain().close()
    after = site.service.rank("u0", ["new", *KNOWN], 11, explain=True)
    labels = site.labels_of("u0")
    assert {name: labels[name] for name in ("i0", "i4", "i1", "i5", "i2")} == {
        "i0": 0,
        "i4": 0,
        "i1": 1,
        "i5": 1,
        "i2": 1,
    }
    assert dict(after.items)["new"] != before["new"]
    by_item = dict(zip([item for item, _ in after.items], after.corrections, strict=True))
    correction = by_item.pop("new")
    assert set(by_item.values()) == {None}
    assert correction is not None
    # The red items i0 and i4 are near to the new one.
    assert correction.log_odds < 0
    assert {one.item for one in correction.neighbours[:2]} <= {"i0", "i4"}
    assert all(one.label == labels[one.item] for one in correction.neighbours)
    with TestClient(create_app(Router(site.service))) as client:
        body = {"user": "u0", "candidates": ["new", "i1"], "explain": True}
        answer = client.post("/v1/rank", json=body).json()
        shown = {one["item"]: one.get("correction") for one in answer["items"]}
        assert shown["i1"] is None
        assert shown["new"]["neighbours"][0]["label"] == 0
        assert shown["new"]["log_odds"] == pytest.approx(correction.log_odds)


def test_a_served_correction_is_that_of_a_batch_bit_for_bit(site: Site) -> None:
    liked = {f"i{number}": int(number % 3 == 0) for number in range(25)}
    site.send("u3", liked)
    trainer = site.drain()
    service = site.service
    corrector, service._corrector = service._corrector, None
    own = site.scores("u3", ["new", *KNOWN])["new"]
    service._corrector = corrector
    catalogue, correction = service._catalogue, site.bundle.correction
    assert correction is not None
    published = site.bundle.labelled.filter(pl.col("user_id") == "u3").select("item_id", "time", "label")
    sent = pl.DataFrame({"item_id": list(liked), "time": range(1_000, 1_025), "label": list(liked.values())})
    known = pl.concat([published, sent.cast({"label": pl.UInt8})])
    numbers = catalogue.item_numbers
    known = known.select(
        pl.lit(0).alias("user"), pl.Series("item", [numbers[name] for name in known["item_id"]]), "time", "label"
    )
    new = numbers["new"]
    asked = pl.DataFrame({"user": [0] * 3, "item": [new] * 3, "time": [2_000] * 3, "label": [1] * 3})
    asked = asked.cast({"label": pl.UInt8, "user": known.schema["user"]})
    labelled = labelled_before(asked, known)
    votes, _ = correction.votes(asked["item"].to_numpy(), labelled, catalogue.ranker_vectors)
    batch = corrected(np.full(3, own, dtype=np.float32), votes)
    assert votes.all()
    assert batch.tolist() == [np.float32(site.scores("u3", ["new", *KNOWN])["new"])] * 3
    trainer.close()


def test_a_restart_a_replay_and_the_fold_have_the_same_labels(site: Site) -> None:
    for user in ("u0", "guest", "u9"):
        site.send(user, {f"i{number}": number % 2 for number in range(20)})
    whole = site.drain()
    arrays = snapshot_of(whole.step, deltas=(0,), inputs={}).arrays
    whole.write_snapshot()
    whole.close()
    site.send("guest", {f"i{number}": 0 for number in range(20, 40)})
    again = site.drain()
    assert site.snapshots.newest(site.bundle) is not None
    now = snapshot_of(again.step, deltas=(0,), inputs={}).arrays
    assert len(now["labelled_users"]) > len(arrays["labelled_users"])
    again.close()
    for snapshot in (None, site.snapshots.newest(site.bundle)):
        assert verify(site.log, site.bundle, site.store, site.topics, snapshot=snapshot).difference == ""
        other = MemoryStore()
        replay(site.log, site.bundle, other, site.topics, snapshot)
        assert verify(site.log, site.bundle, other, site.topics).difference == ""
    fresh = Trainer(site.log, site.bundle, topics=site.topics, options=TrainerOptions(batch=16, wait_s=0))
    folded = snapshot_of(fresh.step, deltas=(0,), inputs={}).arrays
    fresh.close()
    assert {name: array.tobytes() for name, array in folded.items() if name.startswith("labelled")} == {
        name: array.tobytes() for name, array in now.items() if name.startswith("labelled")
    }
    assert len(site.labels_of("guest")) == 40
    site.send("guest", {f"i{number % 40}": 1 for number in range(40)} | {"new": 1})
    site.drain().close()
    (payload,) = site.store.read_records(site.bundle.id, record.HISTORY, ["guest"])
    assert payload is not None
    assert len(record.decode_history(payload).labelled) == LABELLED


def test_a_forgotten_user_has_no_label_anywhere_and_is_ranked_as_a_stranger(site: Site) -> None:
    labels = {"i0": 0, "i4": 0, "i8": 0, "i1": 1}
    for user in ("u1", "secret"):
        site.send(user, labels, age=timedelta(minutes=5))
    trainer = site.drain()
    gone = [trainer.step.catalogue.user_numbers[user] for user in ("u1", "secret")]
    trainer.close()
    corrected_score = site.scores("secret", ["new"])["new"]
    assert site.labels_of("u1")
    forget(site.log, site.topics, ["u1", "secret"], by="test")
    trainer = site.drain()
    arrays = snapshot_of(trainer.step, deltas=(0,), inputs={}).arrays
    assert not np.isin(arrays["labelled_users"], gone).any()
    trainer.write_snapshot()
    trainer.close()
    assert site.labels_of("u1") == site.labels_of("secret") == {}
    assert site.service.rank("secret", ["new"], 1, explain=True).corrections == [None]
    # Without the labels the score is the ranker's own. The rows of the table keep what they learnt.
    corrector, site.service._corrector = site.service._corrector, None
    own = site.scores("secret", ["new"])["new"]
    site.service._corrector = corrector
    assert site.scores("secret", ["new"])["new"] == own != corrected_score
    for snapshot in (None, site.snapshots.newest(site.bundle)):
        assert verify(site.log, site.bundle, site.store, site.topics, snapshot=snapshot).difference == ""
    # A user who comes back has the labels of the new life alone.
    site.send("u1", {"i2": 1})
    site.drain().close()
    assert site.labels_of("u1") == {"i2": 1}
    restarted = Trainer(
        site.log, site.bundle, topics=site.topics, options=TrainerOptions(wait_s=0), snapshots=site.snapshots
    )
    assert not np.isin(snapshot_of(restarted.step, deltas=(0,), inputs={}).arrays["labelled_users"], gone).any()
    restarted.close()


def test_a_server_that_outlasts_its_store_reads_the_published_labels_but_those_of_no_forgotten_user(
    site: Site, bundle: Bundle
) -> None:
    histories = site.service._histories
    payload = histories._published("u0")
    assert payload is not None
    published = bundle.labelled.filter(pl.col("user_id") == "u0")
    assert record.decode_history(payload).labelled == published["item_id"].to_list()[-LABELLED:]
    only_labels = set(bundle.labelled["user_id"]) - set(bundle.history["user_id"])
    user = sorted(only_labels)[0]
    assert histories._published(user) is not None
    forget(site.log, site.topics, ["u0", user], by="test")
    site.drain().close()
    assert histories._published("u0") is histories._published(user) is None


def test_a_bundle_has_format_5_with_a_correction_alone_and_checks_it(
    plain: Bundle, bundle: Bundle, tmp_path: Path
) -> None:
    assert (plain.manifest.format, bundle.manifest.format) == (4, 5)
    assert plain.correction is None
    assert plain.labelled.height == 0
    parts = coloured_parts(tmp_path / "parts", epochs=0)
    other = load_correction(bundle.directory / CORRECTION)
    (tmp_path / "other").mkdir()
    type(other)("lsa-of-another-run", other.weight, other.base_rate, other.rates).save(tmp_path / "other")
    wrong: dict[str, Any] = {"correction": tmp_path / "other", "labelled": bundle.labelled}
    with pytest.raises(BundleError, match="reads vectors of lsa-of-another-run"):
        write_bundle(type(parts)(**(vars(parts) | wrong)), tmp_path / "wrong")
    loaded = load_bundle(bundle.directory)
    (bundle.directory / LABELLED_ITEMS).rename(tmp_path / "aside")
    with pytest.raises(BundleError, match=r"labelled\.parquet is missing"):
        load_bundle(bundle.directory)
    (tmp_path / "aside").rename(bundle.directory / LABELLED_ITEMS)
    assert loaded.id == bundle.id
