"""A bundle ranks as what it was made from, is named by its content, and is whole and unaltered or refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from features.aggregate_frame import with_aggregates
from features.durable import write_directory
from features.errors import BundleError, TesseraError
from features.frame import Frame, build_frame
from models.bundle.bundle import Bundle, BundleParts, load_bundle, write_bundle
from models.ranker.loading import assembler, examples
from models.ranker.network import Ranker
from models.ranker.train import predict, snapshot
from models.semantic_id.tokens import Tokenizer
from models.table.admission import Admission
from tests.build import coloured_parts, coloured_tables

FILES = (
    "admission.safetensors",
    "aggregates.safetensors",
    "table.safetensors",
    "tokens/tokens.json",
    "network.safetensors",
    "users.parquet",
    "items.parquet",
    "history.parquet",
    "encoder/encoder.json",
    "encoder/lsa.safetensors",
    "codebook/codebook.json",
    "codebook/codebook.safetensors",
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> BundleParts:
    return coloured_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def written(parts: BundleParts, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(parts, tmp_path_factory.mktemp("bundles") / "one")


@pytest.fixture
def copy(written: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.directory, tmp_path / "copy"))


def scores(parts: BundleParts, ranker: Ranker, users: pl.DataFrame, items: pl.DataFrame) -> Any:
    events = coloured_tables(events=400)["events"]
    tables = {"events": events, "items": items.drop("listed"), "users": users.drop("listed")}
    frame = build_frame(parts.dataset, tables, split=parts.dataset.split, history_length=5)
    frame, _ = with_aggregates(frame, parts.schema.aggregates)
    test = frame.part("test")
    return predict(
        ranker,
        assembler(parts.schema, Frame(users, items, test), test, Admission(parts.sketch, parts.schema.admission)),
        examples(test),
    )


def test_a_loaded_bundle_ranks_as_what_was_trained_bit_for_bit(parts: BundleParts, written: Bundle) -> None:
    expected = scores(parts, parts.ranker, parts.users, parts.items)
    bundle = load_bundle(written.directory)
    found = scores(parts, bundle.ranker().eval(), bundle.users, bundle.items)
    assert len(found) == 40
    assert found.tobytes() == expected.tobytes()
    assert np.ptp(found) > 0


def test_a_loaded_bundle_holds_all_that_was_written(parts: BundleParts, written: Bundle) -> None:
    bundle = load_bundle(written.directory)
    assert bundle.schema == parts.schema
    assert bundle.dataset == parts.dataset.model_copy(update={"source": Path("coloured.toml")})
    for name in ("users", "items", "history"):
        assert getattr(bundle, name).equals(getattr(parts, name))
        assert getattr(bundle, name).schema == getattr(parts, name).schema
    state, kept = snapshot(parts.ranker), snapshot(bundle.ranker())
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert bundle.rows().tobytes() == parts.ranker.table.weight.numpy().tobytes()
    assert bundle.manifest.metrics == parts.metrics
    assert bundle.encoder is not None
    assert bundle.codebook is not None
    assert (bundle.encoder.id, bundle.codebook.id) == (bundle.manifest.encoder, bundle.manifest.codebook)
    assert bundle.tokenizer == Tokenizer("prefix", bundle.codebook.levels, bundle.codebook.codes)
    assert {str(path.relative_to(written.directory)) for path in written.directory.rglob("*") if path.is_file()} == {
        "manifest.json",
        *FILES,
    }


def test_a_bundle_of_events_alone_has_neither_encoder_nor_codebook(parts: BundleParts, tmp_path: Path) -> None:
    bundle = write_bundle(replace(parts, encoder=None, codebook=None, tokens=None), tmp_path / "bare")
    assert (bundle.encoder, bundle.codebook, bundle.tokenizer) == (None, None, None)


def test_training_a_bundles_ranker_leaves_the_bundle_as_it_is(written: Bundle) -> None:
    bundle = load_bundle(written.directory)
    bundle.ranker().table.weight.zero_()
    assert bundle.rows().any()
    assert bundle.ranker().table.weight.any()


def test_equal_content_has_an_equal_id_wherever_it_is_written(
    parts: BundleParts, written: Bundle, tmp_path: Path
) -> None:
    elsewhere = parts.dataset.model_copy(update={"source": tmp_path / "other" / "coloured.toml"})
    again = write_bundle(replace(parts, dataset=elsewhere), tmp_path / "another-name")
    assert again.id == written.id
    for name in (*FILES, "manifest.json"):
        assert (again.directory / name).read_bytes() == (written.directory / name).read_bytes()


def test_other_content_has_another_id(parts: BundleParts, written: Bundle, tmp_path: Path) -> None:
    other = [
        replace(parts, metrics={"auc": 0.1}),
        replace(parts, history=parts.history[:1]),
        replace(parts, training=replace(parts.training, table_rate=0.5)),
        replace(parts, codebook=None),
    ]
    ids = {write_bundle(changed, tmp_path / str(number)).id for number, changed in enumerate(other)}
    assert len(ids | {written.id}) == 5


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_refused_by_name(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} .*altered"):
        load_bundle(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        load_bundle(copy)


@pytest.mark.parametrize("name", ["more.txt", "encoder/more.json", ".hidden", "encoder/manifest.json"])
def test_a_file_too_many_is_refused_by_name(copy: Path, name: str) -> None:
    (copy / name).write_text("{}")
    with pytest.raises(BundleError, match=f"{name} is not in the manifest"):
        load_bundle(copy)


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (edited(metrics={"auc": 1.0}), "altered"),
        (edited(id="b-0000000000000000"), "altered"),
        (edited(files={}), "altered"),
        (edited(encoder="lsa-000000000000"), "altered"),
        (edited(format=99), "format 99, this release reads 3 to 9"),
        (edited(more=1), "more"),
        (lambda path: path.write_text("{"), "manifest"),
        (lambda path: path.write_text("[]"), "manifest"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"coloured', b'"\xffoloured')), "manifest"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=[
        "metrics",
        "id",
        "files",
        "encoder",
        "format",
        "unknown",
        "not JSON",
        "not an object",
        "not UTF-8",
        "none",
    ],
)
def test_an_edited_manifest_is_refused(copy: Path, edit: Callable[[Path], Any], problem: str) -> None:
    edit(copy / "manifest.json")
    with pytest.raises(BundleError, match=problem):
        load_bundle(copy)


def test_a_manifest_written_in_another_layout_is_the_same_bundle(copy: Path, written: Bundle) -> None:
    edited()(copy / "manifest.json")
    assert load_bundle(copy).id == written.id


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        load_bundle(tmp_path)


def test_what_stands_at_the_destination_is_never_written_over(parts: BundleParts, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(TesseraError, match="exists already"):
        write_bundle(parts, tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_nothing_stands_anywhere_when_filling_fails(
    parts: BundleParts, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def fill(directory: Path) -> None:
        (directory / "half.txt").write_text("half")
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "out", fill)
    with pytest.raises(BundleError, match="does not hold an encoder"):
        write_bundle(replace(parts, encoder=tmp_path_factory.mktemp("empty")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
