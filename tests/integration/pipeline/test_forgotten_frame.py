"""A frame leaves the older events of forgotten users out, in memory and by jobs, and a bundle says whose."""

import json
from pathlib import Path

import numpy as np
import pytest

from features.dataset.descriptor import load_dataset
from features.dataset.input_files import InputFiles
from features.dataset.tables import read_events, read_users
from features.errors import DatasetError
from features.value.forgotten import Forgotten, hashed, read_forgotten
from models.bundle.contents import FORGOTTEN
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.run import RunOptions, run
from tests.integration.pipeline.test_frame_jobs import assert_same, by_jobs, dataset, write_tables
from tests.integration.world import quiet

SALT = "cd" * 16


def test_jobs_and_memory_leave_the_same_events_out(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shop = dataset(tmp_path)
    whole, _ = read_events(shop)
    middle = int(np.median(whole["time"].to_numpy()))
    listed = shop.model_copy(update={"events": shop.events.model_copy(update={"forgotten": "gone.jsonl"})})
    with pytest.raises(DatasetError, match="topics export forgotten"):
        InputFiles(listed)
    requests = [{"user": hashed("u3", SALT), "salt": SALT, "at_us": middle}]
    requests += [{"user": hashed("u4", SALT), "salt": SALT, "at_us": 2**62}]
    (tmp_path / "gone.jsonl").write_text("\n".join(json.dumps(one) for one in requests))
    before = InputFiles(listed).hashes
    left, _ = read_events(listed)
    gone = whole.filter(((whole["user_id"] == "u3") & (whole["time"] <= middle)) | (whole["user_id"] == "u4"))
    assert gone.height > 4
    assert left.height == whole.height - gone.height
    assert not set(left["event"]) & set(gone["event"])
    assert (left["user_id"] == "u3").any()
    users = read_users(listed)
    assert users is not None
    assert not {"u3", "u4"} & set(users["user_id"])
    built, found = by_jobs(listed, tmp_path / "out", 3)
    assert_same(listed, built, found, tmp_path / "out")
    (tmp_path / "gone.jsonl").write_text(json.dumps(requests[0]))
    assert InputFiles(listed).hashes != before


def test_the_bundle_of_a_run_holds_the_requests_and_not_the_user(tmp_path: Path) -> None:
    shop = load_dataset(write_synthetic(tmp_path / "data", users=50, items=100, events=1_000))
    user = read_events(shop)[0]["user_id"][0]
    request = Forgotten(hashed(user, SALT), SALT, 2**62)
    line = {"user": request.user, "salt": SALT, "at_us": request.at_us, "kind": "requested", "by": "test"}
    (shop.directory / "gone.jsonl").write_text(json.dumps(line) + "\n")
    listed = shop.model_copy(update={"events": shop.events.model_copy(update={"forgotten": "gone.jsonl"})})
    bundle = run(listed, tmp_path / "run", RunOptions(), console=quiet(), registry=None, until="publish").bundle
    assert bundle is not None
    assert list(read_forgotten(bundle.directory / FORGOTTEN)) == [request]
    assert user not in bundle.users["user_id"].to_list()
