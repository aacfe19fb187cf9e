"""`retrieval`: users' next items by the two towers, beside popularity, content, and the methods of today.

Two arms. In `known` training sees all items, and the peers are item-kNN, ALS and BPR of `implicit` and, in a part that
takes hours, SASRec and HSTU of RecTools. In `new` a fifth of the items is removed from training, so only content and
the towers can find them. Both arms measure the list of towers and content, fused as a server does with the weight that
validation chose, and with equal weights.
"""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from features.content.encoder import unit
from features.dataset.descriptor import Dataset
from features.errors import TesseraError
from features.frame import Frame
from models.ranker.loading import content_vectors
from models.towers.config import TowerConfig
from models.towers.evaluate import tastes
from models.towers.sequences import TEST
from models.towers.shape import tower_schema
from models.towers.train import train_towers
from models.towers.validation import visits_of
from tessera.bench.harness.data import remembered
from tessera.bench.harness.needs import RETRIEVAL, Peers
from tessera.bench.harness.peer import PEER_FOLDER
from tessera.bench.harness.result import BenchResult, Claim, at_least
from tessera.bench.harness.rows import measured_rows
from tessera.bench.peers.ctr import save
from tessera.bench.retrieval.protocol import FUSED, RECALL_AT, Questions, fused, leave_last_out, measured, top_lists
from tessera.pipeline.artifact import read_frame
from tessera.pipeline.options import RunOptions, load_options
from tessera.pipeline.run import run

TOWERS, CONTENT, POPULARITY, MIXED = "towers", "content", "popularity", "towers + content"
EQUAL = "towers + content, equal weights"
KNOWN, SEQUENCES, NEW = "known", "sequences", "new"
PEERS = {KNOWN: ("item-knn", "als", "bpr"), SEQUENCES: ("sasrec", "hstu")}
THREADS, LENGTH, HIDDEN = 1, 100, 0.2
_MEASURES = ("recall_50", "ndcg_10")
_PEER_SCRIPT = "tessera.bench.peers.retrieval"


def retrieval(
    dataset: Dataset,
    out: Path,
    *,
    seeds: int,
    console: Console,
    peers: Peers,
    options: RunOptions | None = None,
    parts: Sequence[str] = (KNOWN, SEQUENCES, NEW),
    length: int = LENGTH,
) -> BenchResult:
    """Measures each method in each seed.

    Args:
        dataset: Dataset with users and a catalogue; its own split is not used.
        out: Directory of the run, the data and kept results, so that a later call continues there.
        seeds: Number of seeds, from 0.
        console: Prints progress.
        peers: May lack the peers. Then the rest is measured.
        options: Choices of the run; None for those of the descriptor.
        parts: Parts to measure: `known` (all but the sequence models), `sequences` (these alone) and `new`.
        length: Visits that the towers and the sequence models read.

    Raises:
        TesseraError: A training fails.
    """
    unknown = [part for part in parts if part not in (KNOWN, SEQUENCES, NEW)]
    if unknown:
        raise TesseraError(f"--part {unknown[0]}: retrieval has the parts {KNOWN}, {SEQUENCES}, {NEW}")
    chosen = load_options(dataset) if options is None else options
    run(dataset, out / "run", chosen, console=console, registry=None, until="frame")
    frame = read_frame(out / "run" / "frame")
    decided_by = dataset.model_dump(mode="json", exclude={"source"}), chosen.choices(), length
    rows = measured_rows()
    for seed in range(seeds):
        if {KNOWN, SEQUENCES} & set(parts):
            questions = leave_last_out(frame)
            console.print(f"retrieval: seed {seed}, {KNOWN} items, {len(questions.asked):,} users")
            data = store(questions, out / "data")
            if KNOWN in parts:
                work = partial(_ours, dataset, questions, chosen, seed, length)
                rows += _rows(KNOWN, seed, remembered(out / f"known-{seed}.json", __name__, (*decided_by, seed), work))
            python = peers.python(RETRIEVAL)
            for model in [model for part in parts for model in PEERS.get(part, ())]:
                if python is None:
                    break
                console.print(f"retrieval: seed {seed}, {model}")
                found = peer_lists(python, model, data, seed, length, out / f"{model}-{seed}.json")
                rows += _rows(KNOWN, seed, {"rows": _row(model, questions, found["lists"], **found["about"])})
        if NEW in parts:
            questions = leave_last_out(frame, hidden=HIDDEN, seed=seed)
            console.print(f"retrieval: seed {seed}, {int(questions.new.sum()):,} items removed from training")
            work = partial(_ours, dataset, questions, chosen, seed, length)
            rows += _rows(NEW, seed, remembered(out / f"new-{seed}.json", __name__, (*decided_by, seed), work))
    rows += peers.rows("method")
    return BenchResult("retrieval", dataset.name, seeds, rows, claims(rows))


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Judges the mean over the seeds."""

    def mean(arm: str, method: str, goals: str, measure: str) -> float | None:
        named = {"arm": arm, "method": method, "goals": goals}
        found = [row[measure] for row in rows if named.items() <= row.items()]
        return float(np.mean(found)) if found and None not in found else None

    judged = []
    for measure in _MEASURES:
        ours = mean(KNOWN, TOWERS, KNOWN, measure)
        peers = [name for part in PEERS.values() for name in part]
        others = {name: mean(KNOWN, name, KNOWN, measure) for name in (POPULARITY, CONTENT, *peers)}
        known = {name: found for name, found in others.items() if found is not None}
        if ours is not None and set(peers) & set(known):
            best = max(known, key=lambda name: known[name])
            judged.append(at_least(f"{measure} of known items, towers less {best}", ours - known[best], 0.0))
    for goals in (KNOWN, NEW):
        found = {name: mean(NEW, name, goals, "recall_50") for name in (TOWERS, CONTENT, MIXED)}
        ours, content, both = found[TOWERS], found[CONTENT], found[MIXED]
        if ours is None or content is None or both is None:
            continue
        if goals == NEW:
            judged.append(at_least("recall_50 of new items, towers less content", ours - content, 0.0))
        better = max(ours, content)
        judged.append(at_least(f"recall_50 of {goals} items, both lists less the better", both - better, 0.0))
    return judged


def store(questions: Questions, directory: Path) -> Path:
    """Writes the positives before the questions as arrays for the peers, and the users asked with their times."""
    sequences = questions.sequences
    before = np.flatnonzero(sequences.parts != TEST)
    arrays = {
        "user": sequences.users[before],
        "item": sequences.items[before],
        "time": sequences.times[before],
        "asked": questions.users,
        "asked_time": sequences.times[questions.asked[:, 0]],
    }
    save(directory, arrays)
    return directory


def _rows(arm: str, seed: int, result: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"arm": arm, "seed": seed} | row for row in result["rows"]]


def _row(method: str, questions: Questions, lists: Sequence[Sequence[int]], **about: Any) -> list[dict[str, Any]]:
    """Returns the measures of a method for known and for new items."""
    found = []
    new = questions.new[questions.goals]
    for goals, chosen in ((KNOWN, ~new), (NEW, new)):
        index = np.flatnonzero(chosen).tolist()
        if index:
            own = measured([lists[n] for n in index], [int(questions.goals[n]) for n in index])
            found.append({"method": method, "goals": goals} | own | about)
    return found


def _ours(dataset: Dataset, questions: Questions, options: RunOptions, seed: int, length: int) -> dict[str, Any]:
    """Measures towers, content, both and popularity."""
    frame, config = questions.frame, options.towers
    began, cpu = time.perf_counter(), time.process_time()
    vectors, users, epochs, weight = _trained(dataset, questions, config, options.table.dim, seed, length)
    spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu, "epochs": epochs}
    own = top_lists(questions, users, vectors, FUSED)
    rows = _row(TOWERS, questions, own, **spent)
    trained = np.bincount(questions.sequences.items[questions.sequences.parts != TEST], minlength=len(vectors))
    popular = np.ones((len(users), 1), dtype=np.float32), trained.astype(np.float32)[:, None]
    rows += _row(POPULARITY, questions, top_lists(questions, *popular, RECALL_AT))
    if "content_vector" in frame.items.columns:
        content = unit(content_vectors(frame.items))
        near = top_lists(questions, tastes(questions.sequences, questions.asked, content, length), content, FUSED)
        rows += _row(CONTENT, questions, near)
        rows += _row(MIXED, questions, fused(own, near, RECALL_AT, weight), content_weight=weight)
        rows += _row(EQUAL, questions, fused(own, near, RECALL_AT))
    return {"rows": rows}


def _trained(
    dataset: Dataset, questions: Questions, config: TowerConfig, dim: int, seed: int, length: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], int, float]:
    """Returns the vectors of all items and of the users asked, the number of rounds, and the weight of content."""
    frame: Frame = questions.frame
    schema = tower_schema(dataset, frame, config, dim=dim, length=length)
    trained = train_towers(schema, frame, config, seed=seed, threads=THREADS, lag=0)
    read_rows = trained.rows.__getitem__
    vectors = trained.towers.item_vectors(read_rows, frame.items)
    visits = visits_of(questions.sequences, questions.asked, vectors, length)
    users = trained.towers.user_vectors(read_rows, frame.users[questions.users], visits)
    return vectors, users, len(trained.gains), trained.towers.content_weight


def peer_lists(python: Path, model: str, data: Path, seed: int, length: int, kept: Path) -> dict[str, Any]:
    """Returns a peer's lists and what its training took.

    They are kept and belong to the peer's script, its pins and the data, so a change of Tessera trains no peer again.
    """
    content = sha256()
    for path in sorted(data.glob("*.npy")):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    pins = (PEER_FOLDER / RETRIEVAL.pins).read_text(encoding="utf-8")
    decided_by = content.hexdigest(), pins, model, seed, length
    return remembered(kept, _PEER_SCRIPT, decided_by, partial(_in_process, python, model, data, kept, seed, length))


def _in_process(python: Path, model: str, data: Path, kept: Path, seed: int, length: int) -> dict[str, Any]:
    """Trains a peer in its own environment and reads its lists."""
    log = kept.with_suffix(".log")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "OPENBLAS_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(dir=kept.parent) as directory:
        result = Path(directory) / model
        command = [str(python), str(PEER_FOLDER / "retrieval.py"), "--model", model, str(data), str(result)]
        command += ["--seed", str(seed), "--length", str(length)]
        with log.open("w") as output:
            ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
        if ended.returncode:
            words = log.read_text()[-500:].strip()
            raise TesseraError(f"retrieval: {model} failed, see {log}; its last words: {words}")
        lists = [[item for item in row if item >= 0] for row in np.load(result.with_suffix(".npy")).tolist()]
        return {"lists": lists, "about": json.loads(result.with_suffix(".json").read_text())}
