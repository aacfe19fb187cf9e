"""Small worlds that several tests start from: a dataset whose right answer is known, and what is trained on it.

Labels are decided by one attribute of the item, its colour, so that a ranker that works is nearly always right, on
items it never trained on as well.
"""

import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from features.aggregate.plan import plan_of
from features.aggregate.stored import save_aggregates
from features.aggregate_frame import with_aggregates
from features.content import lsa
from features.dataset.aggregate import Aggregate
from features.dataset.descriptor import Dataset, Events, Items, Users
from features.dataset.label import Label
from features.dataset.source import Categorical
from features.dataset.split import Split
from features.durable import write_directory
from features.frame import Frame, build_frame
from features.jobs.shard import write_parquet
from models.bundle.bundle import Bundle, BundleParts, Training, load_bundle, write_manifest
from models.bundle.contents import CORRECTION, LABELLED_ITEMS, LABELLED_SCHEMA
from models.encoder.meaning.neighbours import NeighbourCorrection
from models.ranker.network import NetworkConfig
from models.ranker.train import TrainConfig, Trained, new_ranker, train
from models.semantic_id.codebook import rqvae, rqvae_fit
from models.semantic_id.tokens import Tokenizer
from models.table.admission import Sketch
from models.table.batch import Batch
from models.table.default_schema import TableOptions, default_schema
from models.table.schema import SEMANTIC_ID, Feature, Schema

COLOURS = ("red", "blue", "green", "grey")
LIKED = ("red", "blue")
SMALL_NETWORK = NetworkConfig(cross_layers=1, cross_rank=8, hidden=(16,))
SMALL_TRAIN = TrainConfig(batch=64, max_epochs=4, table_rate=0.1, network_rate=0.01, network=SMALL_NETWORK)
SMALL_CODEBOOK = rqvae.RqVaeConfig(levels=2, codes=4, latent=4, hidden=(8,), steps=40, batch=32)


def coloured_dataset(directory: Path = Path("nowhere"), *, name: str = "coloured", **events: Any) -> Dataset:
    """The descriptor of the tables of `coloured_tables`; `events` changes fields of its events."""
    label = Label(column="label")
    fields = {"path": "events.parquet", "user": "user_id", "item": "item_id", "time": "time", "label": label, **events}
    return Dataset(
        name=name,
        source=directory / f"{name}.toml",
        items=Items(path="items.parquet", id="item_id", text=("text",), categorical={"colour": Categorical()}),
        users=Users(path="users.parquet", id="user_id", numeric=("age",)),
        events=Events.model_validate(fields),
        split=Split(by="time"),
    )


def coloured_tables(*, events: int = 1500, items: int = 40, users: int = 20, seed: int = 0) -> dict[str, pl.DataFrame]:
    """Tables whose label is 1 exactly where the item's colour is liked."""
    rng = np.random.default_rng(seed)
    colours = [COLOURS[number % len(COLOURS)] for number in range(items)]
    chosen = rng.integers(0, items, events)
    return {
        "items": pl.DataFrame(
            {
                "item_id": [f"i{number}" for number in range(items)],
                "text": [f"a {colour} thing of kind{number % 7}" for number, colour in enumerate(colours)],
                "colour": colours,
            }
        ),
        "users": pl.DataFrame({"user_id": [f"u{number}" for number in range(users)], "age": np.arange(users) * 1.5}),
        "events": pl.DataFrame(
            {
                "event": np.arange(events, dtype=np.uint32),
                "user_id": [f"u{number}" for number in rng.integers(0, users, events)],
                "item_id": [f"i{number}" for number in chosen],
                "time": np.arange(events) // 2,
                "label": pl.Series([int(colours[item] in LIKED) for item in chosen], dtype=pl.Int8),
            }
        ),
    }


def coloured_frame(**size: int) -> Frame:
    """The training frame of `coloured_tables`."""
    dataset = coloured_dataset()
    return build_frame(dataset, coloured_tables(**size), split=dataset.split, history_length=5)


def coloured_schema(frame: Frame) -> Schema:
    """A narrow schema of that frame."""
    return default_schema(coloured_dataset(), frame, TableOptions(dim=4), history_length=5)


def clicked_tables(events: int, every_us: int, devices: int) -> dict[str, pl.DataFrame]:
    """The tables of `coloured_tables`, whose events come `every_us` apart and may have a device: d0, d1 and so on."""
    tables = coloured_tables(events=events)
    columns = [pl.col("time") * every_us]
    if devices:
        columns.append(pl.Series("device", [f"d{number % devices}" for number in range(events)]))
    return tables | {"events": tables["events"].with_columns(columns)}


def coloured_parts(
    directory: Path,
    *,
    name: str = "coloured",
    epochs: int = 1,
    events: int = 400,
    options: TableOptions | None = None,
    aggregates: dict[str, Aggregate] | None = None,
    every_us: int = 1,
    devices: int = 0,
) -> BundleParts:
    """Everything a bundle needs, made in a moment; `directory` takes the encoder and the codebook.

    `aggregates` are declared beside the default ones; two events have one time, and the next two come `every_us` later.
    Events have a categorical column `device` of `devices` values, d0, d1 and so on, if there are any.
    """
    context = {"categorical": {"device": Categorical()}} if devices else {}
    dataset, tables = coloured_dataset(directory, name=name, **context), clicked_tables(events, every_us, devices)
    dataset = dataset.model_copy(update={"aggregates": aggregates or {}})
    encoder = lsa.fit(tables["items"]["text"].to_list(), dim=4, seed=0)
    vectors = encoder.encode(tables["items"]["text"].to_list())
    codebook = rqvae_fit.fit(vectors, SMALL_CODEBOOK)
    codes = codebook.encode(vectors)
    tokenizer = Tokenizer("prefix", codebook.levels, codebook.codes)
    for part, model in (("encoder", encoder), ("codebook", codebook), ("tokens", tokenizer)):
        write_directory(directory / part, model.save)
    tables["items"] = tables["items"].with_columns(
        pl.Series("content_vector", vectors, dtype=pl.Array(pl.Float32, vectors.shape[1])),
        pl.Series("semantic_codes", codes, dtype=pl.Array(pl.UInt16, codes.shape[1])),
        pl.Series(SEMANTIC_ID, tokenizer.tokens(codes), dtype=pl.List(pl.String)),
    )
    frame = build_frame(dataset, tables, split=dataset.split, history_length=5)
    frame, aggregator = with_aggregates(frame, plan_of(dataset))
    save_aggregates(aggregator, directory / "aggregates.safetensors")
    schema = default_schema(dataset, frame, options or TableOptions(dim=4), history_length=5)
    config = TrainConfig(batch=64, max_epochs=epochs, network=SMALL_NETWORK)
    untrained = Trained(new_ranker(schema, config), Sketch.sized(0), ())
    trained = train(schema, frame, config) if epochs else untrained
    return BundleParts(
        dataset=dataset,
        schema=schema,
        ranker=trained.ranker,
        sketch=trained.sketch,
        training=Training(table_rate=config.table_rate, batch=config.batch),
        users=frame.users,
        items=frame.items.with_columns(train_positives=pl.lit(1, dtype=pl.UInt32)),
        history=pl.DataFrame({"user_id": ["u0", "u0"], "item_id": ["i1", "i2"], "time": [1, 2]}),
        metrics={"quality": {"ranker": {"all": {"auc": 0.75}}}},
        encoder=directory / "encoder",
        codebook=directory / "codebook",
        tokens=directory / "tokens",
        aggregates=directory / "aggregates.safetensors",
    )


def pooled_schema(*, rows: int = 50, dim: int = 8, permuted: bool = False) -> Schema:
    """Three multi-valued features, pooled by mean and sum, of one and two chunks; `permuted` turns their order."""
    features = (
        Feature("a", "item", "a", "a", 1, "mean"),
        Feature("b", "item", "b", "b", 2, "sum"),
        Feature("c", "user", "c", "c", 2, "mean"),
    )
    return Schema(features[::-1] if permuted else features, (), rows=rows, dim=dim, history_length=3)


def pooled_batch(schema: Schema, size: int, rng: np.random.Generator) -> Batch:
    """A batch of random rows, 0 to 3 of them for each feature and example."""
    values: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []
    scales: list[NDArray[np.float32]] = []
    for feature in schema.features:
        count = rng.integers(0, 4, size)
        for _ in range(feature.chunks):
            values.append(rng.integers(0, schema.rows, int(count.sum())))
            lengths.append(count)
            mean = 1 / np.maximum(count, 1) if feature.pooling == "mean" else np.ones(size)
            scales.append(mean.astype(np.float32))
    return Batch(
        values=torch.from_numpy(np.concatenate(values)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        scale=torch.from_numpy(np.stack(scales, axis=1)),
        numeric=torch.zeros(size, 0),
        labels=torch.zeros(size),
    )


def corrected_bundle(bundle: Bundle, destination: Path, *, weight: float = 6.0) -> Bundle:
    """The same bundle with a correction: each user liked its visits, and disliked three items by chance."""
    shutil.copytree(bundle.directory, destination)
    rng = np.random.default_rng(5)
    users, items = bundle.users["user_id"].to_list(), bundle.items["item_id"].to_list()
    rates = rng.normal(0, 0.3, len(items)).astype(np.float32)
    correction = NeighbourCorrection(bundle.manifest.encoder or "", weight, 0.6, rates)
    (destination / CORRECTION).mkdir()
    correction.save(destination / CORRECTION)
    disliked = pl.DataFrame(
        {
            "user_id": np.repeat(users, 3),
            "item_id": rng.choice(items, 3 * len(users)),
            "time": pl.Series([0] * 3 * len(users), dtype=pl.Int64),
            "label": pl.Series([0] * 3 * len(users), dtype=pl.UInt8),
        },
        schema=LABELLED_SCHEMA,
    )
    liked = bundle.history.with_columns(label=pl.lit(1, dtype=pl.UInt8))
    write_parquet(pl.concat([disliked, liked]), destination / LABELLED_ITEMS)
    write_manifest(destination, msgspec.structs.replace(bundle.manifest, format=5, correction=correction.id))
    return load_bundle(destination)
