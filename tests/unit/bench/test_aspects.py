"""The bench of aspects: it runs on a dataset that declares aspects, refuses another, and judges planted rows."""

from pathlib import Path
from typing import Any

import pytest

from features.dataset.descriptor import Dataset, load_dataset
from features.errors import DatasetError
from tessera.bench.encoder import aspects as module
from tessera.bench.encoder.aspect_claims import aspect_claims
from tessera.bench.encoder.aspects import aspects
from tessera.demo.synthetic import write_synthetic
from tests.integration.world import quiet


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return load_dataset(write_synthetic(tmp_path_factory.mktemp("data"), users=120, items=400, events=5_000))


def test_the_bench_measures_every_part(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COMMON", 0.5)
    monkeypatch.setattr(module, "_DIM", 32)
    assert dataset.items is not None
    meaning = {"aspects": {"topic": ("topic",), "era": ("year",)}, "concepts": "topic"}
    declared = dataset.model_copy(update={"items": dataset.items.model_copy(update=meaning)})
    result = aspects(declared, tmp_path, seeds=1, console=quiet())
    parts = {row["part"] for row in result.rows}
    assert parts == {"aspects", "shared concept", "erase", "top 20", "5 examples"}
    by_claim = {claim.claim: claim for claim in result.claims}
    assert by_claim["top shared concept is truly shared"].holds
    assert by_claim["new items, columns shown: precision@10 of topic in its aspect over generic"].value >= 1
    # Kept: the second call measures nothing.
    monkeypatch.setattr(module, "_World", None)
    assert aspects(declared, tmp_path, seeds=1, console=quiet()).rows == result.rows


def test_a_dataset_without_aspects_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"needs \[items.aspects\] and concepts"):
        aspects(dataset, tmp_path, seeds=1, console=quiet())


def _rows(**changed: float) -> list[dict[str, Any]]:
    value = {"gated": 0.7, "kept": 0.98, "leace": 0.6, "avoid": 0.7, "predicted": 0.2}
    value |= changed
    spaces = [("columns hidden", "generic", 0.3), ("columns hidden", "people", 0.5)]
    spaces += [("columns shown", "generic", 0.3), ("columns shown", "people", 0.9)]
    rows: list[dict[str, Any]] = [
        {"part": "aspects", "way": way, "space": space, "people_p10": precision} for way, space, precision in spaces
    ]
    rows += [{"part": "shared concept", "way": "concept head", "true": 0.85}]
    rows += [{"part": "shared concept", "way": "most frequent", "true": 0.4}]
    erased = {
        "nothing": (1.0, 1.0, 0.9),
        "random subspace": (1.0, 0.9, 0.9),
        "LEACE": (0.8, 0.9, value["leace"]),
        "cluster means, gated": (value["gated"], value["kept"], 0.7),
    }
    rows += [
        {"part": "erase", "way": way, "concept": "war", "share": share, "kept": kept, "auc": auc}
        for way, (share, kept, auc) in erased.items()
    ]
    shares = {
        "nothing": 1.0,
        "avoid": value["avoid"],
        "without, predicted": value["predicted"],
        "without, declared": 0.0,
    }
    rows += [
        {"part": "top 20", "way": way, "concept": "war", "share": share, "kept": 0.9} for way, share in shares.items()
    ]
    return rows


def test_every_claim_holds_on_rows_that_reach_the_targets() -> None:
    assert all(claim.holds for claim in aspect_claims(_rows()))


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"gated": 0.9}, "erase war, gated: share"),
        ({"kept": 0.9}, "erase war, gated: other neighbours kept"),
        ({"leace": 0.7}, "LEACE"),
        ({"avoid": 0.8}, "avoid war: share"),
        ({"predicted": 0.5}, "without war, predicted"),
    ],
)
def test_a_row_that_misses_its_target_fails_its_claim_alone(changed: dict[str, float], fault: str) -> None:
    failed = [claim.claim for claim in aspect_claims(_rows(**changed)) if not claim.holds]
    assert len(failed) == 1
    assert fault in failed[0]
