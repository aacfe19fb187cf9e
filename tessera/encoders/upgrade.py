"""`tessera encoder upgrade`: fits the map with which a new encoder serves the index and codebook of a run.

    OUT/maps/NAME/map.json      the map, with its two spaces, aim and fidelity
    OUT/maps/NAME/encoder/      the new encoder with the map behind it: vectors in the old space, for new items
    OUT/maps/NAME/report.json   every map that was tried, and the cost of re-embedding

The run's own directories are only read. A map directory appears whole or not at all, and an upgrade that was stopped
goes on from the shards that it had encoded.
"""

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import polars as pl
from numpy.typing import NDArray

from features.content.chain import Chain
from features.content.content import contents
from features.content.encoder import DESCRIPTION, Encoder
from features.content.kinds import load_encoder
from features.content.space_map import AIMS, ENCODER, Aim, SpaceMap
from features.durable import recover_directory, replace_directory
from features.errors import DatasetError
from features.jobs.encode import encode_catalogue
from features.jobs.engine import Engine
from features.jobs.sample import take_rows
from features.jobs.shard import each_shard, read_shards, write_shards
from features.lock import locked
from models.encoder.likes import Likes, Neighbours
from models.encoder.measure import GOLD
from models.encoder.upgrade import (
    FIRST,
    LEAST,
    TASK,
    WHOLE,
    Candidate,
    OldSpace,
    UpgradeSample,
    best,
    candidates,
    refuse_below,
)
from models.semantic_id.codebook import kinds as codebooks
from models.semantic_id.vectors import SampledVectors, read_vectors
from tessera.pipeline.artifact import read_frame, write_json
from tessera.pipeline.made_of import key_of
from tessera.pipeline.stage import finished_key

MAPS, REPORT = "maps", "report.json"
_LEAST_HELD_OUT, _TIMED = 20, 64


@dataclass(frozen=True)
class UpgradeOptions:
    """Choices of an upgrade.

    Attributes:
        aim: Aim of the map.
        sample: Items to fit the maps on; as many again are held out to judge the maps, if the catalogue has them.
        items: Ids of the items to fit on, instead of a sample.
        least: Least fidelity by measure; None for that of the aim.
        name: Name of the map's directory; by default the new encoder's id and the aim.
        seed: Seed of the sample and of the fits.
    """

    aim: Aim = "codes"
    sample: int = 1_000
    items: Sequence[str] | None = None
    least: Mapping[str, float] | None = None
    name: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Upgrade:
    """Result of an upgrade.

    Attributes:
        directory: Directory of the map.
        map: The chosen map.
        tried: Kind and fidelity of every map.
        items: Items of the catalogue.
        seconds_an_item: Measured time of the new encoder for one item.
        errors: Mean cosine distance of mapped vectors to old vectors by first code; "" is the mean over all.
    """

    directory: Path
    map: SpaceMap
    tried: Sequence[Mapping[str, Any]]
    items: int
    seconds_an_item: float
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain objects."""
        chosen = {"id": self.map.id, "source": self.map.source, "target": self.map.target, "kind": self.map.kind}
        return {
            "map": chosen | {"aim": self.map.aim, "pairs": self.map.pairs, "fidelity": dict(self.map.fidelity)},
            "tried": list(self.tried),
            "items": self.items,
            "seconds_an_item": self.seconds_an_item,
            "reembed_seconds": self.seconds_an_item * self.items,
            "errors": dict(self.errors),
        }


def upgrade(run: Path, to: Path, options: UpgradeOptions, *, engine: Engine | None = None) -> Upgrade:
    """Fits, judges and chooses a map, and writes it into the run's directory.

    Args:
        run: Directory of a finished run on items with text.
        to: Directory of the new encoder, or of a run whose encoder is new.
        options: Choices.
        engine: Engine of the job that encodes the sample; by default this process.

    Raises:
        TesseraError: A directory is missing, the sample is too small or names unknown items, no map reaches the least
            fidelity, or another upgrade holds the map's directory. The run stays as it was.
    """
    for stage in ("encode", "assign"):
        finished_key(run / stage)
    place = encoder_directory(to)
    old, new = load_encoder(run / "encode" / "encoder"), load_encoder(place)
    if old.id == new.id:
        raise DatasetError(f"{to}: holds encoder {new.id}, which {run} uses already; give another encoder")
    name = options.name or f"{new.id}-{options.aim}"
    directory = map_directory(run, name)
    with locked(directory, wait_s=0):
        recover_directory(directory)
        found = read_vectors(run / "encode" / "vectors")
        fitted, held = _chosen(run, found, options)
        sample = _sample(run, found, (fitted, held), (place, new.id), directory, engine)
        space = _old_space(run, old.id, found, held)
        judged = candidates(space, sample, seed=options.seed)
        chosen = best(judged, options.aim)
        refuse_below(chosen, LEAST[options.aim] if options.least is None else options.least)
        result = Upgrade(
            directory,
            chosen.map,
            [{"kind": one.map.kind} | dict(one.fidelity) for one in judged],
            found.items,
            _seconds_an_item(run, new, found.rows[held][:_TIMED]),
            _errors(space, sample, chosen),
        )
        _write(result, new)
    return result


def map_directory(run: Path, name: str) -> Path:
    """Returns the directory of a map of a run.

    Raises:
        DatasetError: The name holds another character than letters, digits, `-` and `_`.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DatasetError(f"map {name!r}: expected letters, digits, '-' and '_' alone; choose another name")
    return run / MAPS / name


def encoder_directory(to: Path) -> Path:
    """Returns the directory of an encoder, given that directory or the `--out` of a run.

    Raises:
        DatasetError: Neither holds an encoder.
    """
    for place in (to, to / "encode" / "encoder"):
        if (place / DESCRIPTION).is_file():
            return place
    raise DatasetError(f"{to} holds no encoder: give a directory with {DESCRIPTION}, or the --out of a finished run")


def _chosen(run: Path, found: SampledVectors, options: UpgradeOptions) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the items to fit on and to judge on, as positions in the sampled vectors."""
    filled = np.random.default_rng([options.seed, 19]).permutation(np.flatnonzero(found.vectors.any(axis=1)))
    if options.items is None:
        # A small catalogue keeps a third to judge on.
        count = min(options.sample, 2 * len(filled) // 3)
        fitted, others = filled[:count], filled[count:]
    else:
        ids = read_shards(run / "encode" / "vectors", ["item_id"])["item_id"][found.rows].to_list()
        place = {item: number for number, item in enumerate(ids)}
        if unknown := [item for item in options.items if item not in place]:
            raise DatasetError(
                f"pairs: {len(unknown)} of {len(options.items)} items are not in the catalogue, "
                f"e.g. {unknown[0]!r}; name items of {run}"
            )
        fitted = np.array(sorted({place[item] for item in options.items}), dtype=np.int64)
        others = filled[~np.isin(filled, fitted)]
    if len(others) < _LEAST_HELD_OUT:
        raise DatasetError(
            f"upgrade: {len(others)} items are left to judge the maps, expected {_LEAST_HELD_OUT} or more; "
            "fit on fewer items"
        )
    return np.sort(fitted), np.sort(others[: max(len(fitted), _LEAST_HELD_OUT)])


def _sample(
    run: Path,
    found: SampledVectors,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    new: tuple[Path, str],
    directory: Path,
    engine: Engine | None,
) -> UpgradeSample:
    """Encodes the chosen items with the new encoder. The work of an upgrade that was stopped is used again."""
    place, space = new
    fitted, held = rows
    chosen = np.sort(np.concatenate(rows))
    texts = take_rows(each_shard(run / "encode" / "texts"), found.rows[chosen])
    key = key_of(space, texts["item_id"].to_list(), texts["text"].to_list())
    work = directory.with_name(f".{directory.name}.{key[:16]}.partial")
    for other in directory.parent.glob(f".{directory.name}.*.partial"):
        if other != work:
            shutil.rmtree(other)
    encode_catalogue(write_shards(texts, work / "texts"), place, work / "vectors", engine=engine)
    encoded = read_shards(work / "vectors")["vector"].to_numpy()
    vectors = np.zeros((len(found.rows), encoded.shape[1]), dtype=np.float32)
    vectors[chosen] = encoded
    return UpgradeSample(space, fitted, held, held, vectors)


def _old_space(run: Path, space: str, found: SampledVectors, held: NDArray[np.int64]) -> OldSpace:
    every = np.ones(len(found.rows), dtype=bool)
    return OldSpace(space, found.vectors, every, codebooks.load(run / "assign" / "codebook"), _wanted(run, found, held))


def _wanted(run: Path, found: SampledVectors, held: NDArray[np.int64]) -> Neighbours | None:
    """Returns the co-liked items of the held-out items; None if the run has no frame."""
    if not (run / "frame").is_dir():
        return None
    likes, _ = liked(run, read_shards(run / "encode" / "vectors", ["item_id"])["item_id"][found.rows])
    return likes.neighbours(held, np.ones(len(found.rows), dtype=bool), count=GOLD)


def liked(run: Path, items: pl.Series) -> tuple[Likes, NDArray[np.int64]]:
    """Reads the positive events of a run.

    Args:
        run: Directory of a run with the stage `frame`.
        items: (N,) ids of the items to count.

    Returns:
        The likes of the N items, and the number of positive events (N,) of each.
    """
    frame = read_frame(run / "frame")
    # Row of each item of the frame among the N.
    rows = frame.items.select("item_id").join(
        pl.DataFrame({"item_id": items}).with_row_index("row"), on="item_id", how="left", maintain_order="left"
    )["row"]
    positive = frame.examples.select("user", "item", "label").filter(pl.col("label") == 1)
    events = positive.with_columns(row=rows[positive["item"]]).drop_nulls("row")
    users, numbers = events["user"].to_numpy(), events["row"].to_numpy().astype(np.int64)
    return Likes(users, numbers, len(items)), np.bincount(numbers, minlength=len(items))


def _seconds_an_item(run: Path, new: Encoder, rows: NDArray[np.int64]) -> float:
    texts = contents(take_rows(each_shard(run / "encode" / "texts"), rows))
    start = time.perf_counter()
    new.encode(texts)
    return (time.perf_counter() - start) / len(texts)


def _errors(old: OldSpace, sample: UpgradeSample, chosen: Candidate) -> dict[str, float]:
    """Returns the mean cosine distance between mapped and old vectors, over all held-out items and by first code."""
    rows = sample.coded
    mapped = chosen.map.of(sample.vectors[rows], space=sample.space)
    distances = 1.0 - np.einsum("nd,nd->n", mapped, old.vectors[rows]).astype(np.float64)
    assert old.codebook is not None
    by_code = (
        pl.DataFrame({"code": old.codebook.encode(old.vectors[rows])[:, 0], "error": distances})
        .group_by("code", maintain_order=True)
        .agg(pl.col("error").mean())
    )
    return {"": float(distances.mean())} | {str(code): float(error) for code, error in by_code.iter_rows()}


def _write(result: Upgrade, new: Encoder) -> None:
    directory = result.directory
    made = directory.with_name(f".{directory.name}.made")
    shutil.rmtree(made, ignore_errors=True)
    (made / ENCODER).mkdir(parents=True)
    result.map.save(made)
    Chain([new], result.map.legs).save(made / ENCODER)
    write_json(made / REPORT, result.to_json())
    replace_directory(made, directory)
    for work in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(work)


def aim_of(text: str) -> Aim:
    """Returns the aim that a text names.

    Raises:
        DatasetError: No aim has this name.
    """
    for aim in AIMS:
        if aim == text:
            return aim
    raise DatasetError(f"--keep {text!r} is unknown; choose one of: {', '.join(AIMS)}")


def least_of(pairs: Sequence[str]) -> dict[str, float]:
    """Returns the least fidelity by measure of texts such as `task=0.9`.

    Raises:
        DatasetError: A text has another form, or names no measure.
    """
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise DatasetError(f"--least {pair!r}: expected MEASURE=NUMBER, such as {WHOLE}=0.5") from None
        if name not in (FIRST, WHOLE, TASK, "cosine"):
            raise DatasetError(f"--least {pair!r}: no such measure; there are: {FIRST}, {WHOLE}, {TASK}, cosine")
    return found


def read_report(directory: Path) -> dict[str, Any]:
    """Reads the report of a map's directory.

    Raises:
        DatasetError: The directory holds no upgrade.
    """
    path = directory / REPORT
    if not path.is_file():
        others = sorted(one.parent.name for one in directory.parent.glob(f"*/{REPORT}"))
        raise DatasetError(f"{directory} holds no upgrade; there are: {', '.join(others) or 'none'}")
    report: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return report
