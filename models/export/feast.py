"""Feast repository of an export: feature views over its parquet files, and a configuration where there is none.

`feast apply` registers the views, `feast materialize` fills the online store. Feast runs in an environment of its own,
since its requirements conflict with Tessera's; this module writes text and imports none of it.

The view of the examples is offline alone: its rows are as of the event's time, so a point-in-time join of Feast at the
event's time gives the training row. Label and split stay outside the view: they belong to the entity rows of a join.
"""

import json
import os
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlparse

from features.dataset.label import TASK
from features.durable import make_directory, write_file
from features.errors import TesseraError
from models.export.schema import EVENT_TIMESTAMP, ExportColumn, ExportSchema, ExportTable

CONFIGURATION: Final = "feature_store.yaml"
SINCE: Final = "1970-01-01T00:00:00"
"""Start of a materialisation that reaches the rows of items and users."""
_TYPES: Final = {
    "string": "String",
    "bool": "Bool",
    "int32": "Int32",
    "int64": "Int64",
    "float32": "Float32",
    "float64": "Float64",
    "binary": "Bytes",
    "timestamp": "UnixTimestamp",
}
_ABOUT: Final = {
    "examples": "Training examples as of each event's time. Join at the event's own time.",
    "items": "Features, content vectors and Semantic IDs of items.",
    "users": "Features of users.",
    "histories": "Newest histories, for the online store. A join in the past takes the history of the examples.",
}
# Columns of a training example that are no feature: the event's number, the target, and the part of the data.
_NO_FEATURES: Final = {"examples": ("event", "label", "split")}
_PASSWORD: Final = "${FEAST_REDIS_PASSWORD}"


def write_repository(schema: ExportSchema, export: Path, repository: Path, *, redis: str | None = None) -> list[Path]:
    """Writes the feature views of an export into a Feast repository, and its configuration if there is none.

    Args:
        schema: Schema of the export.
        export: Directory of the export; the views read its files by a path relative to the repository.
        repository: Directory of the repository, new or existing. Its other files stay.
        redis: Address of the online store, `redis://host:port/db`. None: SQLite beside the configuration. Ignored if
            the repository has a configuration.

    Returns:
        The files written.

    Raises:
        TesseraError: The events have no clock, or the address is none that Feast knows.
    """
    if any(table.timestamp is None for table in schema.tables.values()):
        raise TesseraError(
            f"{export}: Feast needs an event timestamp, and the events of {schema.name} have no clock; give [events] a "
            "time and run again, or read the parquet files as they are"
        )
    name = _identifier(schema.name)
    views = repository / f"{name}_views.py"
    written = {views: _views(schema, name, os.path.relpath(export.resolve(), repository.resolve()))}
    if not (repository / CONFIGURATION).exists():
        written[repository / CONFIGURATION] = _configuration(name, redis)
    make_directory(repository)
    for path, text in written.items():
        write_file(path, text.encode())
    return list(written)


def materialize(command: str, repository: Path) -> None:
    """Applies a repository by Feast's own command, then fills its online store from the export.

    Args:
        command: Feast's command, such as `feast` or `/opt/feast/bin/feast`.
        repository: Directory of the repository.

    Raises:
        TesseraError: The command is missing or fails; holds the last line that it printed.
    """
    until = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    _run([command, "--chdir", str(repository), "apply"])
    _run([command, "--chdir", str(repository), "materialize", SINCE, until])


def _run(command: Sequence[str]) -> None:
    shown = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TesseraError(
            f"{shown}: {error.strerror}; install Feast into an environment of its own and name its command"
        ) from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise TesseraError(f"{shown}: exit status {done.returncode}: {lines[-1]}; run the command to see all of it")


def _views(schema: ExportSchema, name: str, place: str) -> str:
    keys = dict.fromkeys(key for table in schema.tables.values() for key in table.keys)
    features = [column for table, found in schema.tables.items() for column in _features(table, found)]
    used = {_TYPES[column.dtype] for column in features} | ({"Array"} if any(one.shape for one in features) else set())
    parts = [
        f'"""Feature views of the export {schema.id}. `tessera export` wrote this file and replaces it."""',
        "from datetime import timedelta\nfrom pathlib import Path\n\n"
        "from feast import Entity, FeatureView, Field, FileSource, ValueType\n"
        f"from feast.types import {', '.join(sorted(used))}",
        f"EXPORT = (Path(__file__).resolve().parent / {_text(place)}).resolve()",
        *(
            f'{_entity(key)} = Entity(name="{name}_{_entity(key)}", join_keys=["{key}"], value_type=ValueType.STRING)'
            for key in keys
        ),
        *(_view(f"{name}_{table}", table, found, schema) for table, found in schema.tables.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _view(view: str, name: str, table: ExportTable, schema: ExportSchema) -> str:
    fields = "\n".join(f"        {_field(column)}," for column in _features(name, table))
    tags = {"tessera_export": schema.id} | {f"tessera_{kind}": found for kind, found in schema.source.items()}
    return f"""{view} = FeatureView(
    name="{view}",
    entities=[{", ".join(_entity(key) for key in table.keys)}],
    ttl=timedelta(0),
    schema=[
{fields}
    ],
    source=FileSource(
        name="{view}_files", path=str(EXPORT / "{name}"), timestamp_field="{EVENT_TIMESTAMP}"
    ),
    online={name != "examples"},
    description={_text(_ABOUT[name])},
    tags={json.dumps(tags)},
)"""


def _features(name: str, table: ExportTable) -> list[ExportColumn]:
    """Returns the columns of a view: the keys and the features. A label of a task is none."""
    hidden = (EVENT_TIMESTAMP, *_NO_FEATURES.get(name, ()))
    return [column for column in table.columns if column.name not in hidden and not column.name.startswith(TASK)]


def _field(column: ExportColumn) -> str:
    dtype = _TYPES[column.dtype]
    for _ in column.shape:
        dtype = f"Array({dtype})"
    return f"Field(name={_text(column.name)}, dtype={dtype}, description={_text(column.meaning)})"


def _text(value: str) -> str:
    """Returns a Python literal of a text."""
    return json.dumps(value, ensure_ascii=False)


def _entity(key: str) -> str:
    return key.removesuffix("_id")


def _identifier(name: str) -> str:
    """Returns a name as Feast takes it for projects and views."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII).lower()
    return plain if plain[:1].isalpha() else f"d_{plain}"


def _configuration(project: str, redis: str | None) -> str:
    store = "type: sqlite\n  path: online.db" if redis is None else _redis_store(redis)
    return f"""project: {project}
registry: registry.db
provider: local
online_store:
  {store}
offline_store:
  type: file
entity_key_serialization_version: 3
"""


def _redis_store(address: str) -> str:
    parts = urlparse(address)
    scheme, _, cluster = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss") or not parts.hostname:
        raise TesseraError(
            f"Feast knows Redis at redis://, rediss:// and their +cluster addresses, not at {parts.scheme}://; "
            "set TESSERA_REDIS to one of these, or choose SQLite"
        )
    options = [f"{parts.hostname}:{parts.port or 6379}", f"db={parts.path.strip('/') or '0'}"]
    options += ["ssl=true"] if scheme == "rediss" else []
    options += [f"password={_PASSWORD}"] if parts.password else []
    kind = "\n  redis_type: redis_cluster" if cluster else ""
    return f'type: redis{kind}\n  connection_string: "{",".join(options)}"'
