"""Engines that `infra/test-engines.sh` started, a Dask cluster of the tests' own, and a small catalogue."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from features.content import lsa
from features.durable import write_directory
from features.errors import TesseraError
from features.jobs.encode import encode_catalogue
from features.jobs.engine import Engine
from features.jobs.shard import read_shards, write_shards
from models.semantic_id.assign import assign_catalogue
from models.semantic_id.codebook import kinds as codebooks
from tessera.settings import Settings
from tests.engines.catalogue import ITEMS, ROOT, SHARDS, STARTS_S, TEXTS
from tests.servers import free_port


def engine(runner: str, endpoint: str | None = None, *options: str) -> Engine:
    return replace(Settings.from_environment().engine(runner, endpoint, options), starts_s=STARTS_S)


def _missing(message: str) -> None:
    if os.environ.get("REQUIRE_ENGINES") == "1":
        pytest.fail(message)
    pytest.skip(message)


def _endpoint(name: str) -> str:
    variable = f"TESSERA_TEST_{name.upper()}"
    if variable not in os.environ:
        _missing(f"no {name} cluster: `make test-engines` starts one and sets {variable}")
    return os.environ[variable]


@pytest.fixture(scope="session")
def flink() -> Engine:
    return engine("flink", _endpoint("flink"))


@pytest.fixture(scope="session")
def spark() -> Engine:
    return engine("spark", _endpoint("spark"))


@pytest.fixture(scope="session")
def prism() -> Engine:
    found = engine("prism")
    try:
        found.check()
    except TesseraError as error:
        _missing(str(error))
    return found


@pytest.fixture(scope="session")
def direct() -> Engine:
    return engine("direct", None, "--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture(scope="session")
def dask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A scheduler and two workers as Dask's own commands start them."""
    port, command = free_port(), str(Path(sys.executable).with_name("dask"))
    place = tmp_path_factory.mktemp("dask")
    address = f"tcp://127.0.0.1:{port}"
    worker = ["worker", address, "--nthreads", "1", "--no-dashboard", "--local-directory", str(place)]
    started = [
        subprocess.Popen([command, *arguments], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
        for arguments in (["scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], worker, worker)
    ]
    from distributed import Client

    try:
        with Client(address, timeout="120s") as client:
            client.wait_for_workers(2, timeout=120)
        yield engine("dask", f"127.0.0.1:{port}")
    finally:
        # The scheduler ends last, since a worker that ends says so to the scheduler.
        for process in reversed(started):
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(ITEMS, tmp_path_factory.mktemp("texts"), rows=len(TEXTS) // SHARDS)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "encoder"
    write_directory(directory, lsa.fit(TEXTS, dim=6, seed=0).save)
    return directory


@pytest.fixture(scope="session")
def vectors(shards: list[Path], encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one worker."""
    out = tmp_path_factory.mktemp("vectors")
    encode_catalogue(shards, encoder, out)
    return out


@pytest.fixture(scope="session")
def codebook(vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = read_shards(vectors)["vector"].to_numpy()
    fitted = codebooks.fit("residual-kmeans", found, levels=2, codes=8, seed=0, options={})
    directory = tmp_path_factory.mktemp("models") / "codebook"
    write_directory(directory, fitted.save)
    return directory


@pytest.fixture(scope="session")
def codes(vectors: Path, codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one worker."""
    out = tmp_path_factory.mktemp("codes")
    assign_catalogue(sorted(vectors.iterdir()), codebook, out)
    return out
