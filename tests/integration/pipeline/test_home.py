"""TESSERA_HOME: any path works, and a home without a model is named and not made."""

import contextlib
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.bundle.bundle import Bundle, write_bundle
from tessera.settings import Settings
from tests.build import coloured_parts
from tests.runbook import Operator

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    parts = coloured_parts(tmp_path_factory.mktemp("parts"), name="shop", epochs=0, events=100)
    return write_bundle(parts, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def test_a_home_of_any_name_holds_its_own_registry_log_and_store(place: Path, bundle: Bundle) -> None:
    # A short path: the store listens on a Unix socket below it.
    settings = Settings(home=place / "really?yes 50%25 #1 qu'ote")
    registry = settings.open_registry()
    release = registry.publish(bundle, params={}, metrics={})
    assert registry.open(release, settings.home / "bundles").id == bundle.id
    settings.open_log().close()
    settings.open_store().close()
    with contextlib.closing(sqlite3.connect(settings.home / "mlflow.db")) as database:
        assert database.execute("select name from registered_models where name = 'shop'").fetchall()
    # MLflow may make an empty directory of the address beside the home, but keeps nothing there.
    files = {path.relative_to(place).parts[0] for path in place.rglob("*") if path.is_file()}
    assert files == {settings.home.name}


@pytest.mark.parametrize("command", ["serve", "stream", "status", "rollout list", "rollout promote 1", "verify"])
def test_no_model_names_the_home_and_makes_nothing(tmp_path: Path, command: str) -> None:
    home = tmp_path / "elsewhere"
    operator = Operator({"TESSERA_HOME": str(home), "MLFLOW_TRACKING_URI": ""}, tmp_path)
    said = operator.run(f"tessera {command}", status=2)
    assert f"no model in TESSERA_HOME {home} " in said
    assert "TESSERA_HOME=DIRECTORY names the home of another" in said
    assert list(tmp_path.iterdir()) == []
