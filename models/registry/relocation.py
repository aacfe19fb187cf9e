"""Moves an embedded registry.

MLflow keeps absolute addresses of artifacts, so the registry of a copied or renamed home points at the old place.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from features.errors import BundleError

# Table and column of MLflow's schema that hold the address of an artifact or of a directory of artifacts.
_ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def moved_from(database: Path, artifacts: Path) -> list[str]:
    """Returns the addresses, outside `artifacts`, under which a registry's artifacts were written; empty if none.

    Args:
        database: MLflow's SQLite file; a missing file has no addresses.
        artifacts: directory in which the registry's owner expects the artifacts, one directory a model.
    """
    if not database.is_file():
        return []
    with _connected(database) as connection:
        found = connection.execute("SELECT name, artifact_location FROM experiments WHERE experiment_id != 0")
        return [root for name, place in found.fetchall() if (root := _other_root(place, name, artifacts))]


def check_place(database: Path, artifacts: Path) -> None:
    """Raises BundleError where a registry was moved, and names the remedy."""
    if places := moved_from(database, artifacts):
        raise BundleError(
            f"{database}: was made in {places[0]}, and its artifacts are expected there; "
            "run `tessera migrate` after a home was moved or copied"
        )


def relocate(database: Path, artifacts: Path) -> int:
    """Rewrites every address outside `artifacts` to its place below; returns how many were rewritten."""
    changed = 0
    for root in dict.fromkeys(moved_from(database, artifacts)):
        with _connected(database) as connection:
            for table, column in _ADDRESSES:
                changed += connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ? || '/'",
                    (artifacts.absolute().as_uri(), len(root) + 1, root, len(root) + 1, root),
                ).rowcount
            connection.commit()
    return changed


def _other_root(place: str, name: str, artifacts: Path) -> str | None:
    """The address above a model's artifacts where it is another one than `artifacts`."""
    root = place.removesuffix(f"/{name}")
    if root in (place, artifacts.absolute().as_uri()):
        return None
    recorded = Path(root.removeprefix("file://"))
    # Two names of one directory, by a link or a mount, are no move.
    if recorded.exists() and artifacts.exists() and recorded.samefile(artifacts):
        return None
    return root


@contextlib.contextmanager
def _connected(database: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(database, timeout=30)
    try:
        yield connection
    except sqlite3.Error as error:
        raise BundleError(f"registry {database}: {error}; see that no other command uses it") from error
    finally:
        connection.close()
