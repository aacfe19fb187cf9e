"""Runs Feast under the schedule of `stream`'s race, in the peer's environment without Tessera.

    python feast_race.py DIRECTORY redis://host:port/db

Two writers put the same keys at the same moment, one a second of event time behind the other; the last line printed is
{"stale", "of"}: how many keys ended on the older value, of how many.
"""

import datetime
import json
import logging
import multiprocessing
import sys
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

KEYS, ROUNDS = 200, 100
_START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


def apply(directory: Path, address: str) -> None:
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float32, Int64

    where = urlparse(address)
    db = where.path.strip("/") or "0"
    (directory / "feature_store.yaml").write_text(
        f"""project: tesserabench
registry: registry.db
provider: local
online_store:
  type: redis
  connection_string: "{where.hostname}:{where.port},db={db}"
offline_store:
  type: file
entity_key_serialization_version: 3
"""
    )
    frame = pd.DataFrame({"item_id": range(KEYS), "value": 0.0, "event_timestamp": _START})
    frame.to_parquet(directory / "values.parquet")
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="values",
        entities=[item],
        ttl=datetime.timedelta(days=3650),
        schema=[Field(name="item_id", dtype=Int64), Field(name="value", dtype=Float32)],
        source=FileSource(path=str(directory / "values.parquet"), timestamp_field="event_timestamp"),
        online=True,
    )
    FeatureStore(repo_path=str(directory)).apply([item, view])


def write(which: int, directory: str, barrier: Any, stale: Any) -> None:
    import pandas as pd
    from feast import FeatureStore

    store = FeatureStore(repo_path=directory)
    store.get_feature_view("values")
    for number in range(ROUNDS):
        at = 2 * number + 1 + which
        moment = _START + datetime.timedelta(seconds=at)
        frame = pd.DataFrame({"item_id": range(KEYS), "value": float(at), "event_timestamp": moment})
        barrier.wait()
        store.write_to_online_store("values", frame)
        barrier.wait()
        if which == 1:
            entities = [{"item_id": key} for key in range(KEYS)]
            stored = store.get_online_features(features=["values:value"], entity_rows=entities).to_dict()["value"]
            stale.value += sum(value != float(at) for value in stored)
        barrier.wait()


def main() -> None:
    directory, address = Path(sys.argv[1]).absolute(), sys.argv[2]
    apply(directory, address)
    barrier, stale = multiprocessing.Barrier(2), multiprocessing.Value("l", 0)
    both = [multiprocessing.Process(target=write, args=(n, str(directory), barrier, stale)) for n in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    sys.stdout.write(json.dumps({"stale": stale.value, "of": KEYS * ROUNDS}) + "\n")


if __name__ == "__main__":
    main()
