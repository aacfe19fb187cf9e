"""`rankers`: the inputs that both sides read, and what is judged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.frame import Frame
from models.networks.kinds import DEFAULT, KINDS
from models.table.default_schema import TableOptions, default_schema
from tessera.bench.rankers.kinds import OURS, PAIRED, RECHUB, claims, for_kind
from tessera.bench.rankers.shared import PARTS, shared_schema, store
from tests.build import coloured_dataset, coloured_frame


@pytest.fixture(scope="module")
def frame() -> Frame:
    return coloured_frame()


@pytest.mark.parametrize("kind", ["dcn-v2", "din"])
def test_the_arrays_of_a_peer_number_the_values_that_the_examples_hold(frame: Frame, kind: str, tmp_path: Path) -> None:
    schema = shared_schema(default_schema(coloured_dataset(), frame, TableOptions(dim=4), history_length=5), kind)
    store(schema, frame, tmp_path)
    shapes = json.loads((tmp_path / "shapes.json").read_text())
    assert (tmp_path / "train" / "numbers.npy").exists() == (kind == "dcn-v2") == bool(shapes["numbers"])
    tables = {"user": frame.users, "item": frame.items}
    for part in PARTS:
        rows = frame.part(part)
        found = {path.stem: np.load(path) for path in (tmp_path / part).glob("*.npy")}
        assert found["labels"].tolist() == rows["label"].to_list()
        for feature in schema.features[:-1]:
            values = tables[feature.of][feature.column]
            number = {word: place for place, word in enumerate(sorted(values.unique()), start=1)}
            expected = [number[values[row]] for row in rows[feature.of]]
            assert found[feature.name.replace(".", "_")].tolist() == expected
        ids = frame.items["item_id"]
        number = {word: place for place, word in enumerate(sorted(ids), start=1)}
        for visits, own in zip(rows["history"].to_list(), found["history"].tolist(), strict=True):
            expected = [number[ids[row]] for row in visits]
            assert own == expected + [0] * (schema.history_length - len(visits))


def test_a_kind_of_sequences_reads_the_history_item_by_item(frame: Frame) -> None:
    schema = default_schema(coloured_dataset(), frame, TableOptions(dim=4), history_length=5)
    for kind in (DEFAULT, *KINDS):
        assert for_kind(schema, kind).attends == (kind in ("din", "self-attention"))
        assert len(for_kind(schema, kind).features) == len(schema.features)


def test_a_peer_that_is_as_good_or_as_fast_is_said() -> None:
    rows: list[dict[str, Any]] = [
        {"kind": kind, "model": model, "seed": 0, "test_auc": 0.8, "examples_per_cpu_s": speed}
        for kind in PAIRED
        for model, speed in ((OURS, 3.0), (RECHUB, 2.0))
    ]
    assert all(claim.holds for claim in claims(rows))
    assert len(claims(rows)) == 2 * len(PAIRED)
    rows[1] |= {"test_auc": 0.804}
    rows[3] |= {"examples_per_cpu_s": 2.1}
    assert sum(not claim.holds for claim in claims(rows)) == 2
    assert claims([row for row in rows if row["model"] == OURS]) == []
