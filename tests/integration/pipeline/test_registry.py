"""The registry on MLflow: versions, the champion, and bundles that come back as they were."""

import multiprocessing
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from features.errors import BundleError
from models.bundle.bundle import Bundle, write_bundle
from models.registry.registry import Registry
from models.registry.release import CHAMPION, Release
from serving.rollout import lifecycle as rollouts
from serving.rollout.experiment import RampStep
from tests.build import coloured_parts

# MLflow asks SQLAlchemy for a loader strategy that the next SQLAlchemy drops.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Bundle]:
    """Makes the bundle of a model, by name and number of events; the same call gives an equal bundle."""

    def one(name: str, events: int) -> Bundle:
        parts = coloured_parts(tmp_path_factory.mktemp("parts"), name=name, epochs=0, events=events)
        return write_bundle(parts, tmp_path_factory.mktemp("bundles") / "bundle")

    return one


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    directory = tmp_path_factory.mktemp("registry")
    return Registry(f"sqlite:///{directory / 'mlflow.db'}", artifacts=directory / "artifacts")


def test_an_empty_registry_says_that_there_is_no_model_yet(registry: Registry) -> None:
    with pytest.raises(BundleError, match="expected one of none yet"):
        registry.resolve(None)


def test_versions_of_a_model(
    registry: Registry, make: Callable[[str, int], Bundle], tmp_path: Path, subtests: pytest.Subtests
) -> None:
    first, second = make("shop", 100), make("shop", 120)
    one = registry.publish(first, params={"seed": 0}, metrics={"all.auc": 0.75})
    with subtests.test("the first version of a model becomes its champion"):
        assert (one.model, one.version, one.bundle, one.aliases) == ("shop", "1", first.id, (CHAMPION,))
        assert registry.resolve("shop") == registry.resolve(None) == one
    two = registry.publish(second, params={"seed": 1}, metrics={"all.auc": 0.99})
    with subtests.test("a later version does not become champion by itself"):
        assert (two.version, two.bundle, two.aliases) == ("2", second.id, ())
        assert registry.resolve("shop") == one
    with subtests.test("publishing a bundle again gives the version it has"):
        assert registry.publish(make("shop", 120), params={}, metrics={}) == two
        assert registry.publish(first, params={}, metrics={}) == one
    with subtests.test("a release opens as the bundle that was published"):
        assert registry.open(one, tmp_path / "cache").id == first.id
        found = registry.open(two, tmp_path / "cache")
        assert found.id == second.id
        assert found.rows().tobytes() == second.rows().tobytes()
    with subtests.test("what was opened is in the cache and is opened from there"):
        assert {path.name for path in (tmp_path / "cache").glob("[!.]*")} == {first.id, second.id}
        assert registry.open(two, tmp_path / "cache").directory == tmp_path / "cache" / second.id
    with subtests.test("codebooks have versions of their own, one for each that a bundle came with"):
        assert first.manifest.codebook is not None
        # Both bundles are made of one catalogue, so both need one codebook.
        assert registry.codebooks("shop") == {"1": first.manifest.codebook}
        assert second.manifest.codebook == first.manifest.codebook
        assert registry.models() == ["shop"]
    other = registry.publish(make("news", 100), params={}, metrics={})
    with subtests.test("models of two datasets have versions and champions of their own"):
        assert (other.model, other.version, other.aliases) == ("news", "1", (CHAMPION,))
        assert registry.resolve("shop") == one
        assert registry.resolve("news") == other
    with subtests.test("a model that is not there, or not named, is refused with the names there are"):
        with pytest.raises(BundleError, match=r"model 'shoes': expected one of \['news', 'shop'\]"):
            registry.resolve("shoes")
        with pytest.raises(BundleError, match=r"model None: expected one of \['news', 'shop'\]"):
            registry.resolve(None)
    with subtests.test("an alias that is not there is refused with those there are"):
        with pytest.raises(BundleError, match=r"'shop' has no challenger; its aliases are \['champion'\]"):
            registry.resolve("shop", "challenger")


def test_another_client_of_the_same_database_sees_what_was_published(
    make: Callable[[str, int], Bundle], tmp_path: Path
) -> None:
    uri, artifacts = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts"
    bundle = make("shop", 100)
    published = Registry(uri, artifacts=artifacts).publish(bundle, params={}, metrics={})
    later = Registry(uri, artifacts=artifacts)
    assert later.resolve(None) == published
    assert later.open(published, tmp_path / "cache").id == bundle.id


def test_more_models_versions_and_runs_than_one_page_are_all_seen(
    registry: Registry, make: Callable[[str, int], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.registry.mlflow_client._PAGE", 1)
    for number in range(3):
        registry.publish(make("pages", 100 + number), params={}, metrics={"auc": 0.5})
        registry._tracking.create_model(f"page-{number}")
    assert {"pages", "page-0", "page-1", "page-2"} <= set(registry.models())
    assert [(one.version, one.metrics["auc"]) for one in registry.versions("pages")] == [(n, 0.5) for n in "321"]


def _open(address: str, release: Release, home: Path, barrier: Any, told: Any) -> None:
    opened = Registry(address, artifacts=home / "artifacts")
    barrier.wait()
    try:
        told.put(opened.open(release, home / "bundles").id)
    except BaseException as error:
        told.put(f"{type(error).__name__}: {error}")


def test_two_servers_that_start_together_both_open_the_bundle(
    registry: Registry, make: Callable[[str, int], Bundle], tmp_path: Path
) -> None:
    bundle = make("together", 100)
    release = registry.publish(bundle, params={}, metrics={})
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        shutil.rmtree(tmp_path / "bundles", ignore_errors=True)
        barrier, told = context.Barrier(2), context.Queue()
        given = (registry._tracking.uri, release, tmp_path, barrier, told)
        servers = [context.Process(target=_open, args=given) for _ in range(2)]
        for server in servers:
            server.start()
        assert [told.get(timeout=60) for _ in servers] == [bundle.id, bundle.id]
        for server in servers:
            server.join()


def test_experiments_started_at_once_by_two_operators_both_run(
    registry: Registry, make: Callable[[str, int], Bundle]
) -> None:
    for number in range(4):
        registry.publish(make("at-once", 100 + number), params={}, metrics={})
    together = threading.Barrier(3)

    def begin(number: int) -> None:
        operator = Registry(registry._tracking.uri, artifacts=Path(registry._place) / "artifacts")
        together.wait()
        rollouts.start(operator, "at-once", str(number + 2), [RampStep(0.0, 0.2)])

    with ThreadPoolExecutor() as pool:
        list(pool.map(begin, range(3)))
    held = rollouts.running(registry, "at-once")
    assert {one.name for one in held} == {"at-once-2", "at-once-3", "at-once-4"}
    assert len({one.start for one in held}) == 3
