"""Top layers tuned on a finished run: another encoder in the run's directory, which serves and can be moved."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from features.content.content import FieldReader, contents
from features.content.kinds import load_encoder
from features.content.sentence import SentenceEncoder
from features.errors import DatasetError, TesseraError
from features.jobs.encode import encode_catalogue
from features.jobs.shard import read_shards, shard_paths
from models.encoder.tuning.layers import LayerOptions
from tessera.cli.main import app
from tessera.encoders.layers import tune_encoder
from tests.integration.world import World
from tests.small_bert import small_bert

SHORT = LayerOptions(layers=1, tokens=16, rounds=2, patience=2, batch=64, rate=3e-3)
PAIRS = ("column:topic",)


def unsealed(run: Path) -> None:
    """Removes the record of the files, since the encoder was replaced."""
    (run / "encode" / "stage.json").write_text('{"key": "k"}')


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder is a transformer of two small layers."""
    opened = small_bert(2)
    directory = tmp_path_factory.mktemp("layers") / "run"
    for stage in ("encode", "frame"):
        shutil.copytree(world.directory / stage, directory / stage)
    opened.save(str(directory.parent / "model"), create_model_card=False)
    encoder = SentenceEncoder(str(directory.parent / "model"), tokens=16)
    for part in ("encoder", "vectors"):
        shutil.rmtree(directory / "encode" / part)
    (directory / "encode" / "encoder").mkdir()
    encoder.save(directory / "encode" / "encoder")
    texts = shard_paths(directory / "encode" / "texts")
    encode_catalogue(texts, directory / "encode" / "encoder", directory / "encode" / "vectors")
    unsealed(directory)
    return directory


def test_a_tuned_encoder_finds_held_out_items_and_can_be_moved(run: Path, tmp_path: Path) -> None:
    made = tune_encoder(run, "near", PAIRS, SHORT)
    assert max(made.recalls) > made.recalls[0]
    assert made.directory == run / "encoders" / "near"
    before, after = load_encoder(run / "encode" / "encoder"), load_encoder(made.directory)
    assert made.encoder == after.id != before.id
    assert after.dim == before.dim
    shutil.copytree(made.directory, tmp_path / "moved")
    moved = load_encoder(tmp_path / "moved")
    texts = contents(read_shards(run / "encode" / "texts"))[:20]
    assert moved.id == after.id
    assert moved.encode(texts).tobytes() == after.encode(texts).tobytes()
    # The states are kept, and the same fit gives the same encoder.
    assert (run / "encoders" / ".near.states" / "states.npy").is_file()
    assert tune_encoder(run, "near", PAIRS, SHORT).encoder == made.encoder


def test_a_stopped_tune_leaves_the_earlier_encoder_and_goes_on(run: Path) -> None:
    earlier = tune_encoder(run, "kept", PAIRS, SHORT).encoder
    other = LayerOptions(layers=1, tokens=16, rounds=2, patience=2, batch=64, rate=1e-3)

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_encoder(run, "kept", PAIRS, other, progress=stopped)
    assert load_encoder(run / "encoders" / "kept").id == earlier
    rounds: list[int] = []
    made = tune_encoder(run, "kept", PAIRS, other, progress=lambda done, total: rounds.append(done))
    assert rounds == [2]
    assert load_encoder(run / "encoders" / "kept").id == made.encoder != earlier


def test_an_exit_and_latent_attention_are_options_of_the_encoder(run: Path) -> None:
    exits = LayerOptions(layers=2, tokens=16, exits=(1,), rounds=1, batch=64, rate=3e-3)
    found = load_encoder(tune_encoder(run, "low", PAIRS, exits).directory)
    assert isinstance(found, SentenceEncoder)
    assert (found.options.layer, found.options.tokens) == (1, 16)
    latent = LayerOptions(layers=0, tokens=16, pool="latent", rounds=1, batch=64, rate=1e-2)
    found = load_encoder(tune_encoder(run, "latent", PAIRS, latent).directory)
    assert isinstance(found, SentenceEncoder)
    assert found.options.pool == "latent"
    assert np.isfinite(found.encode(["a text"])).all()


def test_a_run_without_a_transformer_and_pairs_of_pieces_are_refused(world: World, run: Path, tmp_path: Path) -> None:
    for stage in ("encode", "frame"):
        shutil.copytree(world.directory / stage, tmp_path / stage)
    with pytest.raises(DatasetError, match=r"--layers: the run's encoder is lsa-.*; only the layers of sentence"):
        tune_encoder(tmp_path, "near", PAIRS, SHORT)
    with pytest.raises(TesseraError, match=r"pairs ict: .* expected pairs of the"):
        tune_encoder(run, "pieces", ("ict",), SHORT)


def test_the_command_prints_pairs_recall_and_encoder(run: Path) -> None:
    sets = [part for value in ("rounds=1", "tokens=16", "batch=64", "rate=3e-3") for part in ("--set", value)]
    command = ["encoder", "tune", str(run), "--name", "cli", "--layers", "1", "--pairs", "column:topic", *sets]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "encoder  st-16-" in result.output
    described = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert described["pairs"]["column:topic"] > 50
    assert isinstance(load_encoder(run / "encoders" / "cli"), SentenceEncoder)
    assert CliRunner().invoke(app, [*command, "--merge", "a,b"]).exit_code != 0


def test_a_reader_of_fields_stays_a_reader(run: Path, tmp_path: Path) -> None:
    for stage in ("encode", "frame"):
        shutil.copytree(run / stage, tmp_path / stage)
    base = load_encoder(run / "encode" / "encoder")
    shutil.rmtree(tmp_path / "encode" / "encoder")
    (tmp_path / "encode" / "encoder").mkdir()
    FieldReader(base, ["title"]).save(tmp_path / "encode" / "encoder")
    unsealed(tmp_path)
    found = load_encoder(tune_encoder(tmp_path, "near", PAIRS, SHORT).directory)
    assert isinstance(found, FieldReader)
    assert found.fields == ("title",)
