"""Moves an embedded registry.

MLflow keeps absolute addresses of artifacts, so the registry of a copied or renamed home has the old addresses.
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
        database: SQLite file of MLflow. A missing file has no addresses.
        artifacts: Directory of the artifacts now, with a directory for each model.
    """
    if not database.is_file():
        return []
    with _connected(database) as connection:
        rows = connection.execute("SELECT name, artifact_location FROM experiments WHERE experiment_id != 0")
        return [root for name, address in rows.fetchall() if (root := _other_root(address, name, artifacts))]


def check_place(database: Path, artifacts: Path) -> None:
    """Raises BundleError, with the remedy, if a registry was moved."""
    if addresses := moved_from(database, artifacts):
        raise BundleError(
            f"{database}: was made in {addresses[0]}, and its artifacts are expected there; "
            "run `tessera migrate` after a home was moved or copied"
        )


def relocate(database: Path, artifacts: Path) -> int:
    """Rewrites every address outside `artifacts` to an address below `artifacts`.

    Args:
        database: SQLite file of MLflow.
        artifacts: Directory of the artifacts now.

    Returns:
        Number of rewritten addresses.
    """
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


def _other_root(address: str, name: str, artifacts: Path) -> str | None:
    """Returns the address of the directory above a model's artifacts, or None if it is `artifacts`."""
    root = address.removesuffix(f"/{name}")
    if root in (address, artifacts.absolute().as_uri()):
        return None
    recorded = Path(root.removeprefix("file://"))
    # If both are names of the same directory, by a link or a mount, the registry was not moved.
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
