"""The training benchmark: its data follow the stated law, its claims follow its rows, and Tessera's side runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import roc_auc_score

from features.errors import TesseraError
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig
from tessera.bench.harness import peer
from tessera.bench.harness.peer import PEER_FOLDER, peer_python
from tessera.bench.offline import ctr_worker
from tessera.bench.offline import training_speed as bench
from tessera.bench.offline.ctr_data import TrainingSpec, generate, schema_of, star, store
from tessera.bench.offline.ctr_worker import tessera
from tessera.bench.offline.training_speed import as_row, claims
from tessera.bench.peers.ctr import Arrays, PeerRun, label_encoded

SMALL = TrainingSpec(rows=6_000, test_rows=2_000, features=4, values=1_000, numeric=3)
QUICK = TrainConfig(
    batch=128, max_epochs=1, table_rate=0.1, network_rate=0.01, network=NetworkConfig(1, 4, hidden=(16,))
)


def test_a_seed_decides_the_data_and_another_draws_others() -> None:
    (first, *_), (again, *_), (other, *_) = (generate(spec) for spec in (SMALL, SMALL, replace(SMALL, seed=1)))
    for name in ("values", "numeric", "labels"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


def test_the_data_have_the_stated_rate_head_and_signal() -> None:
    training, test, probability = generate(TrainingSpec(rows=30_000, test_rows=20_000))
    assert training.values.shape == (30_000, 26)
    assert training.numeric.shape == (30_000, 13)
    assert abs(training.labels.mean() - 0.25) < 0.01
    # Zipf's law with exponent a gives its most frequent value 1 / zeta(a), 1 / 5.59 for 1.2.
    assert np.allclose((training.values == 0).mean(axis=0), 1 / 5.59, atol=0.01)
    assert training.values.max() == 99_999
    assert 0.75 < roc_auc_score(test.labels, probability) < 0.8


def test_every_process_reads_the_stored_arrays_and_as_many_rows_as_it_asks_for(tmp_path: Path) -> None:
    ceiling = store(SMALL, tmp_path)
    training, test, probability = generate(SMALL)
    found, fewer = Arrays.load(tmp_path / "train"), Arrays.load(tmp_path / "train", 10)
    assert np.array_equal(found.values, training.values)
    assert np.array_equal(fewer.labels, training.labels[:10])
    assert ceiling == roc_auc_score(test.labels, probability)


def test_the_frame_holds_the_arrays_and_the_table_a_row_for_each_distinct_value() -> None:
    training, test, _ = generate(SMALL)
    frame = star(training, test)
    part = frame.part("test")
    assert frame.part("train").height == len(training.labels)
    assert part["C1"].to_list() == [str(value) for value in test.values[:, 1]]
    assert np.array_equal(part["I2"].to_numpy(), test.numeric[:, 2])
    schema = schema_of(frame)
    assert schema.rows == sum(len(np.unique(column)) for column in training.values.T)
    assert len(schema.numeric) == SMALL.numeric


def test_tessera_learns_the_signal_and_accounts_for_its_time_and_memory() -> None:
    training, test, probability = generate(SMALL)
    found = tessera(training, test, 0, QUICK)
    assert found.rows == len(training.labels)
    assert found.setup_seconds is not None
    assert 0 < found.setup_seconds < found.seconds
    assert found.cpu_seconds > 0
    # Other tests of the process may give memory back meanwhile.
    assert -0.1 < found.fit_gb < found.peak_gb
    assert 0.55 < found.test_auc < roc_auc_score(test.labels, probability) + 0.01


def test_the_worker_trains_on_as_many_rows_as_asked_and_leaves_its_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(SMALL, tmp_path)
    monkeypatch.setattr(ctr_worker, "TRAIN", QUICK)
    ctr_worker.worker(tmp_path, tmp_path / "result.json", 1_000, 0, "tessera-auto")
    found = PeerRun(**json.loads((tmp_path / "result.json").read_text()))
    assert found.rows == 1_000
    assert found.precision in ("float32", "bfloat16")
    assert as_row(found)["samples_per_second"] == 1_000 / found.seconds


def made_up(model: str, seed: int, speed: float, auc: float = 0.74, fit: float = 0.3) -> dict[str, Any]:
    measured = PeerRun(100_000, 100_000 / speed, 1.0, None, 1.0, fit, auc)
    return {"model": model, "seed": seed, **as_row(measured), "equal_time_auc": auc - 0.01 * (model != "tessera")}


GOOD = [
    made_up("floor", 0, 110_000),
    made_up("tessera", 0, 100_000),
    made_up("tessera-auto", 0, 150_000),
    made_up("deepctr", 0, 30_000, 0.73, 0.8),
    made_up("rechub", 0, 25_000, 0.73, 0.8),
]


def test_all_claims_hold_where_tessera_is_near_the_floor_and_better_than_both_peers() -> None:
    found = claims(GOOD)
    assert len(found) == 10
    assert all(claim.holds for claim in found)


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        (made_up("floor", 1, 130_000), [0]),
        (made_up("tessera-auto", 1, 80_000), [1]),
        (made_up("deepctr", 1, 34_000, 0.73, 0.8), [2]),
        (made_up("deepctr", 1, 30_000, 0.745, 0.8), [3]),
        (made_up("deepctr", 1, 30_000, 0.76, 0.8), [3, 4]),
        (made_up("deepctr", 1, 30_000, 0.73, 0.5), [5]),
        (made_up("rechub", 1, 34_000, 0.73, 0.5), [6, 9]),
    ],
)
def test_a_claim_fails_by_the_seed_that_speaks_most_against_it(row: dict[str, Any], fails: list[int]) -> None:
    second = [{**one, "seed": 1} for one in GOOD if one["model"] != row["model"]]
    assert [n for n, claim in enumerate(claims([*GOOD, *second, row])) if not claim.holds] == fails


def test_the_fast_precision_is_claimed_over_nothing_but_our_own_float32() -> None:
    faster = [made_up("tessera-auto", 0, 1e9) if row["model"] == "tessera-auto" else row for row in GOOD]
    changed = [n for n, (a, b) in enumerate(zip(claims(GOOD), claims(faster), strict=True)) if a != b]
    assert changed == [1]


def test_peers_get_tables_of_the_values_there_are() -> None:
    training, test, _ = generate(SMALL)
    ours, held_out, sizes = label_encoded(training, test)
    assert sum(sizes) == schema_of(star(training, test)).rows + SMALL.features
    for number, size in enumerate(sizes):
        column, known = training.values[:, number], np.unique(training.values[:, number])
        assert np.array_equal(known[ours.values[:, number] - 1], column)
        assert ours.values[:, number].min() == 1
        assert ours.values[:, number].max() == size - 1
        assert np.array_equal(held_out.values[:, number] == 0, ~np.isin(test.values[:, number], known))
    assert np.array_equal(ours.labels, training.labels)


def test_the_floor_learns_the_same_from_ready_tensors() -> None:
    training, test, probability = generate(SMALL)
    found = ctr_worker.floor(training, test, 0, QUICK)
    assert found.rows == len(training.labels)
    assert 0.55 < found.test_auc < roc_auc_score(test.labels, probability) + 0.01


def test_the_processor_says_what_it_multiplies_fast() -> None:
    assert set(bench.processor().replace("none of ", "").split()) <= set(bench._MARKS)


def test_where_the_peers_cannot_be_installed_the_error_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(peer, "_OWN_UV", tmp_path / "uv")
    with pytest.raises(TesseraError, match=r"install uv.*package index"):
        peer_python(tmp_path / "peers", PEER_FOLDER / "ctr_requirements.txt", Console(quiet=True))


def test_a_failed_run_tells_its_last_words(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(TesseraError, match=r"deepctr failed, .*\.log; its last words: no such module"):
        bench._run(broken, "deepctr", tmp_path, SMALL, 10)


def test_measured_survives_json() -> None:
    found = PeerRun(1, 2.0, 3.0, None, 4.0, 5.0, 0.6)
    assert PeerRun(**json.loads(json.dumps(asdict(found)))) == found
