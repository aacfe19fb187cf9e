"""Every script of `examples/` runs, and does what its first lines say."""

import asyncio
import contextlib
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from features.content.kinds import load_encoder
from models.export.write import write_export
from models.semantic_id.codebook import kinds as codebooks
from serving.skew.drift import DriftMeasure, DriftReport
from serving.skew.report import SkewReport
from streaming.forget.request import forget
from streaming.log.sqlite import LocalLog
from streaming.log.topics import Topics
from streaming.shown.export import export_topic
from streaming.trainer import Trainer, TrainerOptions
from tessera.export_source import open_source
from tests.examples.conftest import EXAMPLES
from tests.integration.world import World


def test_every_example_has_a_test_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    own = {"own_encoder", "own_model", "own_quantizer", "own_ranker", "own_vectors"}
    shown = {"embeddings", "exported", "forgotten", "placement", "request_fields", "semantic_ids", "served"}
    shown |= {"explored_items", "several_labels"}
    assert names == {"arrow_batches", "client"} | shown | own


def test_embeddings(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    scores = importlib.import_module("embeddings").main(str(world.bundle.directory))
    assert scores.shape == (5,)
    assert np.all((scores > 0) & (scores < 1))
    assert "content like that of" in capsys.readouterr().out


def test_semantic_ids(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    codes = importlib.import_module("semantic_ids").main(str(world.bundle.directory), "a red bicycle", "tea kettle")
    assert codes.shape == (2, world.bundle.codebook.levels if world.bundle.codebook else 0)
    assert capsys.readouterr().out.count("codes, such as ") == 2


def test_exported(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_export(open_source(world.directory), tmp_path / "export")
    known = importlib.import_module("exported").main(str(tmp_path / "export"))
    assert known["test"].height == 800
    assert "content_vector: 128 x float32, by encoder lsa-" in capsys.readouterr().out


def test_arrow_batches(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TESSERA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TESSERA_KAFKA", raising=False)
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(world.messages(30)))
    assert importlib.import_module("arrow_batches").main(str(tmp_path / "rows.jsonl")) == 1
    assert "30 rows in 1 messages" in capsys.readouterr().out
    options = TrainerOptions(lateness_s=1e9, wait_s=0.1)
    with contextlib.closing(LocalLog(tmp_path / "home" / "log.db")) as log:
        with contextlib.closing(Trainer(log, world.bundle, topics=Topics(), options=options)) as trainer:
            trainer.run_once()
    assert (trainer.totals.events, trainer.totals.bad) == (30, 0)


def test_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leads = importlib.import_module("placement").main(str(tmp_path), count=3_000)
    assert leads["blind"] > 0.1
    assert abs(leads["placed"]) < leads["blind"] / 2
    assert "placed: the even items lead by" in capsys.readouterr().out


def test_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(LocalLog(tmp_path / "log.db")) as log:
        log.create_topics(Topics().partitions())
        forget(log, Topics(), ["one", "other"], by="command line")
        assert export_topic(log, "forgotten", tmp_path / "audit.jsonl") == 2
    (line,) = importlib.import_module("forgotten").main(str(tmp_path / "audit.jsonl"), "one")
    assert line["kind"] == "requested"
    assert "requested command line" in capsys.readouterr().out
    assert "one" not in json.dumps(line)


def test_client(world: World, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    example = importlib.import_module("client")
    items = example.main(url)
    assert len(items) == 5
    assert set(items) <= set(world.bundle.items["item_id"])
    assert f"bundle {world.bundle.id}" in capsys.readouterr().out
    assert len(asyncio.run(example.at_once(url, ["a", "b"]))) == 2


def test_own_encoder_and_own_quantizer_serve_a_run(world: World, tmp_path: Path) -> None:
    encoder, quantizer = (importlib.import_module(name) for name in ("own_encoder", "own_quantizer"))
    run = encoder.main(str(world.dataset.source), str(tmp_path / "a"), until="encode")
    assert load_encoder(run / "encode" / "encoder").id.startswith("random-words-")
    run = quantizer.main(str(world.dataset.source), str(tmp_path / "b"), until="assign")
    assert codebooks.load(run / "assign" / "codebook").id.startswith("random-directions-")


def test_own_ranker_serves_a_run(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = importlib.import_module("own_ranker").main(str(world.dataset.source), str(tmp_path))
    assert bundle.manifest.network["kind"] == "own_ranker:GatedProducts"
    assert ": test AUC 0." in capsys.readouterr().out


def test_own_vectors_serve_a_run(world: World, tmp_path: Path) -> None:
    result = importlib.import_module("own_vectors").main(str(world.dataset.source), str(tmp_path), until="encode")
    encoder = load_encoder(result.directory / "encode" / "encoder")
    assert encoder.id.startswith("letters-v1-")
    assert encoder.dim == 32


def test_explored_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    clicks = np.array([0.1] * 4 + [0.6] * 4)
    shown, outcomes = [], []
    for number in range(3_000):
        # Chance draws two of eight new items; the ranker's item is clicked half the time.
        drawn = rng.choice(8, 2, replace=False)
        items = ["ranked", *(f"new-{item}" for item in drawn)]
        chances = {"policy": "home", "propensities": [1, 0.25, 0.25]}
        shown.append({"kind": "shown", "id": f"{number}", "items": items} | chances)
        hits = [name for name, rate in zip(items, [0.5, *clicks[drawn]], strict=True) if rng.random() < rate]
        outcomes += [{"impression": f"{number}", "item": name} for name in hits]
    paths = []
    for name, rows in (("impressions", shown), ("outcomes", outcomes)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    rates = importlib.import_module("explored_items").main(*map(str, paths))
    # 6,000 clicks of a rate of .35 have a standard deviation of .0062.
    assert rates["home"] == pytest.approx((clicks.mean(), 0.5), abs=0.03)
    assert "home: new items would be clicked in 3" in capsys.readouterr().out


def test_request_fields_decide(tmp_path: Path) -> None:
    cheap, usual = importlib.import_module("request_fields").main(str(tmp_path))
    assert cheap > usual + 0.2


def test_several_labels_rank_by_the_formula(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # .8 x sqrt(.04) = .16 for an even item, .4 x sqrt(.24) = .20 for an odd one, though even items get the clicks.
    even, odd = importlib.import_module("several_labels").main(str(tmp_path))
    assert even == pytest.approx(0.16, abs=0.04)
    assert odd == pytest.approx(0.196, abs=0.04)
    assert odd > even
    assert "buy: test AUC 0." in capsys.readouterr().out


def test_served_names_wrong_values_before_distributions(tmp_path: Path) -> None:
    one = DriftMeasure("item.topic", "missing", 90, 0.4, 0.3, 0.5, 0.2, 0.1, 0.4, "missing", 0.12, 9.0, True)
    quiet = dataclasses.replace(one, measure="values", alarm=False)
    report = SkewReport("b-1", requests=7, drift=DriftReport("b-1", users=90, measures=(one, quiet)))
    path, example = tmp_path / "served.json", importlib.import_module("served")
    path.write_text(json.dumps(report.to_json()))
    drifted = "item.topic missing: PSI 0.40 (0.30 to 0.50), missing from 10.0% to 40.0%"
    assert example.main(str(path)) == [drifted]
    report.difference("item.format", "absent").add(1_200, [])
    path.write_text(json.dumps(report.to_json()))
    assert example.main(str(path)) == ["item.format: 1,200 served values differ from the log", drifted]


def test_own_model_learns() -> None:
    assert importlib.import_module("own_model").main(steps=60) > 0.9
