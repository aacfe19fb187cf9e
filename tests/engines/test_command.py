"""The command line runs a job on an engine by one option and an endpoint, and names a worker that cannot start."""

import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from features.errors import TesseraError
from features.jobs.engine import Engine
from tests.engines.catalogue import STARTS_S, contents
from tests.engines.test_engines import wait_for_slots
from tests.servers import free_port

TESSERA = str(Path(sys.executable).with_name("tessera"))
# Three shards of each job.
PRODUCTS, CLICKS = 2_500, 500
DESCRIPTOR = """
name = "shop"

[events]
path = "clicks.parquet"
user = "customer"
item = "sku"
time = "at"
label = { column = "clicked" }

[split]
by = "time"

[items]
path = "products.parquet"
id = "sku"
text = ["title"]

[run]
quantizer = "residual-kmeans"
encoder_dim = 8
codes = 16
levels = 2
"""
_STARTS_S = 20


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a descriptor and its tables."""
    directory = tmp_path_factory.mktemp("shop")
    words = ("tea", "cup", "kettle", "mill", "honey", "mint", "smoke", "leaf", "clay", "steel", "glass")
    titles = [" ".join(words[number * step % 11] for step in (1, 4, 9)) for number in range(PRODUCTS)]
    skus = [f"sku-{number}" for number in range(PRODUCTS)]
    pl.DataFrame({"sku": skus, "title": titles}).write_parquet(directory / "products.parquet")
    clicks = {
        "customer": [f"c{number % 37}" for number in range(CLICKS)],
        "sku": [skus[number * 7 % PRODUCTS] for number in range(CLICKS)],
        "at": range(CLICKS),
        "clicked": [number % 3 % 2 for number in range(CLICKS)],
    }
    pl.DataFrame(clicks).write_parquet(directory / "clicks.parquet")
    (directory / "shop.toml").write_text(DESCRIPTOR)
    return directory


def features(shop: Path, out: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `tessera features` in the shop's directory."""
    return subprocess.run(
        [TESSERA, "features", "shop.toml", "--out", out, *options],
        cwd=shop,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def tables(out: Path) -> dict[str, bytes]:
    """Returns the bytes of all parquet files of a run."""
    return {name: found for name, found in contents(out).items() if name.endswith(".parquet")}


@pytest.fixture(scope="module")
def expected(shop: Path) -> dict[str, bytes]:
    """Tables of a run in one process."""
    done = features(shop, "one")
    assert done.returncode == 0, done.stderr
    found = tables(shop / "one")
    assert {name for name in found if name.startswith("assign/codes/")} == {
        f"assign/codes/part-{number:05d}.parquet" for number in range(3)
    }
    return found


@pytest.mark.parametrize("name", ["dask", "flink", "spark", "prism"])
def test_one_option_and_an_endpoint_run_the_job_on_an_engine(
    name: str, shop: Path, expected: dict[str, bytes], request: pytest.FixtureRequest
) -> None:
    engine: Engine = request.getfixturevalue(name)
    endpoint = () if engine.endpoint is None else ("--endpoint", engine.endpoint)
    done = features(shop, name, "--runner", name, *endpoint, TESSERA_WORKER_START_S=f"{STARTS_S:.0f}")
    assert done.returncode == 0, done.stderr
    assert tables(shop / name) == expected


def test_a_worker_that_cannot_start_is_an_error_and_no_hang(flink: Engine, shop: Path, tmp_path: Path) -> None:
    """The pool starts a `python` that ends at once. Flink waits for ever for such a worker."""
    before = flink.check()
    (tmp_path / "python").symlink_to("/bin/false")
    port = free_port()
    pool = subprocess.Popen(
        [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stderr=subprocess.DEVNULL,
    )
    try:
        broken = Engine("flink", flink.endpoint, (), flink.launcher, f"127.0.0.1:{port}")
        give_up = time.monotonic() + STARTS_S
        while True:
            try:
                broken.check()
                break
            except TesseraError:
                assert time.monotonic() < give_up, "the pool does not start"
                time.sleep(0.2)
        done = features(
            shop, "broken", "--runner", "flink", "--endpoint", str(flink.endpoint),
            TESSERA_WORKER_POOL=broken.pool, TESSERA_WORKER_START_S=str(_STARTS_S),
        )  # fmt: skip
    finally:
        pool.terminate()
        pool.wait(20)
    assert done.returncode == 2, done.stderr
    assert f"error: runner flink: no worker began within {_STARTS_S} seconds" in done.stderr
    assert "Traceback" not in done.stderr
    # The job is gone from the cluster, so that the next job has its slots.
    wait_for_slots(flink, before)
