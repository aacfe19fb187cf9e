"""A negative that the step draws has features of several tables with its own item, not with its positive's."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from features.dataset.descriptor import load_dataset
from features.dataset.tables import load_events, message_columns
from features.jobs.messages import encode_rows
from models.bundle.catalogue import Catalogue
from models.ranker.train import TrainConfig
from streaming.log.protocol import Message
from streaming.log.topics import Topics
from streaming.step import Step
from tessera.bench.harness.live_data import NEVER_LATE_S
from tessera.demo.synthetic import write_synthetic
from tessera.pipeline.run import RunOptions, run
from tests.integration.world import quiet


def test_a_drawn_negative_of_the_step_has_features_of_its_own_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_synthetic(tmp_path / "data", users=60, items=120, events=1_500)
    text = path.read_text().replace("text = [", 'read = { year = "number" }\n# text = [')
    text = text.replace(
        '{ column = "clicked" }', '{ column = "clicked", positive = "== 1", implicit = true, negatives = 2 }'
    )
    path.write_text(text + '\n[features]\nage = "EXTRACT(YEAR FROM event.time) - item.year"\n')
    options = RunOptions(aggregates="off", training=TrainConfig(max_epochs=1))
    dataset = load_dataset(path)
    bundle = run(dataset, tmp_path / "run", options, console=quiet(), registry=None, until="publish").bundle
    assert bundle is not None
    given: list[tuple[pl.DataFrame, Any]] = []
    crossed, assembled = Catalogue.crossed, []

    def capture(self: Catalogue, events: pl.DataFrame, users: Any, items: Any) -> pl.DataFrame:
        given.append((crossed(self, events, users, items), items))
        return given[-1][0]

    monkeypatch.setattr(Catalogue, "crossed", capture)
    topics = Topics()
    step = Step(bundle, topics, lateness_s=NEVER_LATE_S, trained_until=-(2**62))
    train = step._train_whole
    monkeypatch.setattr(
        step, "_train_whole", lambda batch, outcome: assembled.append(batch.numeric.numpy()) or train(batch, outcome)
    )
    raw = message_columns(load_events(dataset), dataset.events).filter(pl.col("clicked") == 1).head(50)
    lines = enumerate(encode_rows(raw))
    outcome = step.apply([Message(topics.events, 0, place, None, line, 2_000_000_000_000) for place, line in lines])
    assert outcome.events == 50
    (_, own), (drawn, items) = given
    assert (len(own), len(items)) == (50, 150)
    assert (items.reshape(50, 3)[:, 0] == own).all()
    assert (items.reshape(50, 3)[:, 1:] != own[:, None]).all()
    year = bundle.items["item.year"].gather(items)
    assert drawn["age"].equals((2025 - year).cast(pl.Float32).alias("age"))
    # The network reads these values: an item's age differs between a positive and its negatives.
    place = [numeric.name for numeric in bundle.schema.numeric].index("event.age")
    ages = assembled[0][:, place].reshape(50, 3)
    assert (np.ptp(ages, axis=1) > 0).mean() > 0.5
