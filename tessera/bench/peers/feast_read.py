"""Measures Feast's online reads, in the peer's environment without Tessera.

    python feast_read.py DIRECTORY redis://host:port/db

10,000 entities with an embedding of 64 numbers each in Redis; 500 random ones are read to a float32 array. The last
line printed is {"p50_ms", "p99_ms"}.
"""

import datetime
import json
import logging
import sys
import time
import warnings
from pathlib import Path
from urllib.parse import urlparse

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

ENTITIES, DIM, ASKED, ROUNDS, WARM = 10_000, 64, 500, 100, 10


def main(directory: Path, address: str) -> None:
    import numpy as np
    import pandas as pd
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Array, Float32, Int64

    where = urlparse(address)
    db = where.path.strip("/") or "0"
    (directory / "feature_store.yaml").write_text(
        f"""project: tesserareads
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
    now = datetime.datetime.now(datetime.UTC)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((ENTITIES, DIM)).astype("float32")
    frame = pd.DataFrame({"item_id": range(ENTITIES), "embedding": list(vectors), "event_timestamp": now})
    frame.to_parquet(directory / "embeddings.parquet")
    item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
    view = FeatureView(
        name="embeddings",
        entities=[item],
        ttl=datetime.timedelta(days=30),
        schema=[Field(name="item_id", dtype=Int64), Field(name="embedding", dtype=Array(Float32))],
        source=FileSource(path=str(directory / "embeddings.parquet"), timestamp_field="event_timestamp"),
        online=True,
    )
    store = FeatureStore(repo_path=str(directory))
    store.apply([item, view])
    store.write_to_online_store("embeddings", frame)
    times = []
    for number in range(WARM + ROUNDS):
        asked = [{"item_id": int(key)} for key in rng.integers(0, ENTITIES, ASKED)]
        began = time.perf_counter()
        answer = store.get_online_features(features=["embeddings:embedding"], entity_rows=asked).to_dict()
        array = np.asarray(answer["embedding"], dtype="float32")
        if number >= WARM:
            times.append(1_000 * (time.perf_counter() - began))
        assert array.shape == (ASKED, DIM)
    store.teardown()
    p50, p99 = np.percentile(times, [50, 99])
    print(json.dumps({"p50_ms": float(p50), "p99_ms": float(p99)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
