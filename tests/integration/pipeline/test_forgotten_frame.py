"""A frame leaves the older events of forgotten users out, in memory and by jobs."""

import json
from pathlib import Path

import numpy as np
import pytest

from features.dataset.input_files import InputFiles
from features.dataset.tables import read_events, read_users
from features.errors import DatasetError
from features.value.forgotten import hashed
from tests.integration.pipeline.test_frame_jobs import assert_same, by_jobs, dataset, write_tables

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
