"""`retrieval`: what is asked, how lists are measured and fused, what is judged, and a small measurement as a whole."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from features.dataset.descriptor import load_dataset
from features.errors import DatasetError, TesseraError
from models.towers.config import TowerConfig
from models.towers.evaluate import measures
from models.towers.sequences import TEST, TRAIN, VALIDATION
from models.towers.validation import next_item_ranks
from tessera.bench.harness.needs import RETRIEVAL, Peers
from tessera.bench.peers.ctr import save
from tessera.bench.retrieval.protocol import fused, leave_last_out, measured, top_lists
from tessera.bench.retrieval.retrieval import (
    CONTENT,
    EQUAL,
    MIXED,
    POPULARITY,
    TOWERS,
    claims,
    peer_lists,
    retrieval,
    store,
)
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.options import RunOptions
from tests.build import coloured_frame

NO_PEERS = Peers({}, {RETRIEVAL: "uv is missing"})


def test_the_last_positive_is_asked_and_the_one_before_stops_training() -> None:
    frame = coloured_frame()
    questions = leave_last_out(frame)
    sequences = questions.sequences
    assert set(questions.frame.examples["label"]) == {1}
    for user in range(frame.users.height):
        parts = sequences.parts[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()
        assert parts == [TRAIN] * (len(parts) - 2) + [VALIDATION, TEST]
        times = sequences.times[sequences.offsets[user] : sequences.offsets[user + 1]]
        assert (np.diff(times) >= 0).all()
    assert questions.users.tolist() == list(range(frame.users.height))


def test_new_items_occur_in_questions_alone() -> None:
    questions = leave_last_out(coloured_frame(), hidden=0.4, seed=3)
    assert 0 < questions.new.sum() < 40
    seen = questions.sequences.items[questions.sequences.parts != TEST]
    assert not questions.new[seen].any()
    assert questions.new[questions.goals].any()
    again, other = (leave_last_out(coloured_frame(), hidden=0.4, seed=seed) for seed in (3, 4))
    assert np.array_equal(again.new, questions.new)
    assert not np.array_equal(other.new, questions.new)


def test_users_with_too_few_positives_are_refused() -> None:
    frame = coloured_frame()
    with pytest.raises(DatasetError, match="needs users with 3 positive events"):
        leave_last_out(frame.replace(examples=frame.examples[:4]))


def test_lists_give_the_measures_of_ranks() -> None:
    questions = leave_last_out(coloured_frame())
    rng = np.random.default_rng(0)
    users, vectors = (rng.standard_normal((count, 5)).astype(np.float32) for count in (len(questions.asked), 40))
    ranks = next_item_ranks(questions.sequences, questions.asked, users, vectors, np.arange(40))
    # A visited item cannot be found, wherever it would stand.
    lists = top_lists(questions, users, vectors, 50)
    assert measured(lists, questions.goals.tolist()) == pytest.approx(measures(np.where(ranks == 40, 50, ranks)))
    for number, found in enumerate(lists):
        assert not set(found) & questions.visited(number)
    vectors[5] = 0
    assert all(5 not in found for found in top_lists(questions, users, vectors, 50))


def test_measures_by_hand() -> None:
    lists = [[4, 2, 3], [1, 2], list(range(60)), []]
    found = measured(lists, [2, 1, 50, 7])
    assert found == {"users": 4, "recall_50": 0.5, "ndcg_10": pytest.approx((1 / np.log2(3) + 1) / 4)}
    assert measured([], []) == {"users": 0, "recall_50": None, "ndcg_10": None}


def test_lists_are_fused_by_the_ranks_alone() -> None:
    assert fused([[1, 2, 3]], [[3, 4]], 3) == [[3, 1, 2]]
    assert fused([[1, 2, 3]], [[4, 3]], 3, 0.25) == [[3, 1, 2]]
    assert fused([[1, 2, 3]], [[4, 3]], 3, 0.01) == [[1, 2, 3]]
    assert fused([[1, 2, 3]], [[4, 5]], 4, 0.01) == [[1, 2, 3, 4]]
    assert fused([[1, 2, 3]], [[3, 4]], 2, 0.0) == [[1, 2]]


def test_peers_get_what_training_may_see_and_no_answer(tmp_path: Path) -> None:
    questions = leave_last_out(coloured_frame())
    store(questions, tmp_path)
    user, item = (np.load(tmp_path / f"{name}.npy") for name in ("user", "item"))
    assert len(user) == (questions.sequences.parts != TEST).sum()
    for number, goal in enumerate(questions.goals.tolist()):
        assert np.load(tmp_path / "asked.npy")[number] == questions.users[number]
        own = questions.sequences.items[questions.asked[number, 1] : questions.asked[number, 2]]
        assert np.array_equal(item[user == questions.users[number]], own)
        assert goal == questions.sequences.items[questions.asked[number, 0]]


def _row(arm: str, method: str, goals: str, recall: float, gain: float = 0.0) -> dict[str, Any]:
    return {"arm": arm, "method": method, "goals": goals, "recall_50": recall, "ndcg_10": gain, "seed": 0}


def test_the_best_of_the_peers_is_the_bar() -> None:
    rows = [
        _row("known", TOWERS, "known", 0.5, 0.2),
        _row("known", "als", "known", 0.3, 0.3),
        _row("known", "sasrec", "known", 0.51, 0.1),
        _row("new", TOWERS, "new", 0.2),
        _row("new", CONTENT, "new", 0.1),
        _row("new", MIXED, "new", 0.25),
        _row("new", TOWERS, "known", 0.5),
        _row("new", CONTENT, "known", 0.1),
        _row("new", MIXED, "known", 0.4),
    ]
    found = {claim.claim: (round(claim.value, 3), claim.holds) for claim in claims(rows)}
    assert found == {
        "recall_50 of known items, towers less sasrec": (-0.01, False),
        "ndcg_10 of known items, towers less als": (-0.1, False),
        "recall_50 of known items, both lists less the better": (-0.1, False),
        "recall_50 of new items, towers less content": (0.1, True),
        "recall_50 of new items, both lists less the better": (0.05, True),
    }


def test_a_small_measurement_without_peers(tmp_path: Path) -> None:
    dataset = load_dataset(write_synthetic(tmp_path / "data", users=60, items=100, events=1_500))
    towers = TowerConfig(width=16, blocks=1, max_epochs=1)
    options = RunOptions(quantizer="residual-kmeans", levels=2, codes=4, towers=towers)
    measure = {"seeds": 1, "console": Console(quiet=True), "peers": NO_PEERS, "options": options, "length": 5}
    result = retrieval(dataset, tmp_path / "out", **measure)
    found = {(row["arm"], row["method"], row["goals"]) for row in result.rows if "arm" in row}
    assert found == {("known", name, "known") for name in (TOWERS, POPULARITY, CONTENT, MIXED, EQUAL)} | {
        ("new", name, goals) for name in (TOWERS, POPULARITY, CONTENT, MIXED, EQUAL) for goals in ("known", "new")
    }
    assert result.rows[-1] == {"method": "implicit and RecTools", "missing": "uv is missing"}
    popular = next(row for row in result.rows if row["method"] == POPULARITY and row["goals"] == "new")
    assert popular["recall_50"] == 0
    again = retrieval(dataset, tmp_path / "out", **measure)
    assert list(again.rows) == list(result.rows)
    with pytest.raises(TesseraError, match="--part none: retrieval has the parts known, sequences, new"):
        retrieval(dataset, tmp_path / "out", parts=["none"], **measure)


def test_a_peers_lists_are_kept_until_script_or_data_change(tmp_path: Path) -> None:
    data, kept, calls = tmp_path / "data", tmp_path / "als-0.json", tmp_path / "calls"
    save(data, {"user": np.array([0, 1])})
    # Stands for the peers' interpreter: notes the call and writes what the script would.
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, numpy, pathlib\n"
        f"with open({str(calls)!r}, 'a') as file: file.write(' '.join(sys.argv[2:4]) + '\\n')\n"
        "result = pathlib.Path(sys.argv[5])\n"
        "numpy.save(result.with_suffix('.npy'), numpy.array([[4, 2, -1], [7, -1, -1]]))\n"
        "result.with_suffix('.json').write_text(json.dumps({'seconds': 1.5}))\n"
    )
    python.chmod(0o755)
    expected = {"lists": [[4, 2], [7]], "about": {"seconds": 1.5}}
    for _ in range(2):
        assert peer_lists(python, "als", data, 0, 5, kept) == expected
    assert calls.read_text() == "--model als\n"
    save(data, {"user": np.array([0, 2])})
    assert peer_lists(python, "als", data, 0, 5, kept) == expected
    assert calls.read_text() == "--model als\n" * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["als-0.json", "als-0.log", "calls", "data", "python"]
    python.write_text("#!/bin/sh\necho out of memory; exit 3\n")
    with pytest.raises(TesseraError, match=r"retrieval: bpr failed, see .*bpr-0.log; its last words: out of memory"):
        peer_lists(python, "bpr", data, 0, 5, tmp_path / "bpr-0.json")
