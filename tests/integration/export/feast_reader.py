"""Reads an export through Feast, in Feast's own environment without Tessera.

    python feast_reader.py EXPORT SQLITE_REPOSITORY REDIS_REPOSITORY

The first repository is applied and materialised already. The second is applied and materialised here and removed at the
end, if it is given. The last line printed is JSON: `online` by store, and `joined`, the rows of a point-in-time join.
"""

import json
import logging
import os
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

ONLINE = (
    ("item_id", ["i0", "i38", "i39", "nobody"], ("items:content_vector", "items:semantic_codes", "items:semantic_id")),
    ("user_id", ["u0", "u1", "u2", "nobody"], ("users:age", "histories:history")),
)


def main() -> None:
    import pandas as pd
    from feast import FeatureStore
    from feast.repo_config import load_repo_config
    from feast.repo_operations import apply_total

    export, *repositories = (Path(argument).resolve() for argument in sys.argv[1:])
    online = {}
    for number, repository in enumerate(repositories):
        os.chdir(repository)
        if number:
            sys.path.insert(0, "")
            apply_total(load_repo_config(repository, repository / "feature_store.yaml"), repository, True)
        store = FeatureStore(str(repository))
        if number:
            store.materialize(datetime(1970, 1, 1, tzinfo=UTC), datetime.now(UTC))
        found: dict[str, Any] = {}
        for key, ids, features in ONLINE:
            names = [f"coloured_{feature}" for feature in features]
            found |= store.get_online_features(features=names, entity_rows=[{key: one} for one in ids]).to_dict()
        online["redis" if number else "sqlite"] = found
        if number:
            store.teardown()
    store = FeatureStore(str(repositories[0]))
    examples = pd.read_parquet(export / "examples")
    spine = examples[["event", "user_id", "item_id", "event_timestamp", "label"]]
    views = {view.name: view for view in store.list_feature_views()}
    wanted = [f"coloured_examples:{field.name}" for field in views["coloured_examples"].features]
    wanted += ["coloured_items:colour", "coloured_items:semantic_codes", "coloured_users:age"]
    rows = store.get_historical_features(spine, features=wanted).to_df().sort_values("event")
    joined = {name: [plain(value) for value in rows[name]] for name in rows.columns if name != "event_timestamp"}
    sys.stdout.write("\n" + json.dumps({"online": online, "joined": joined}) + "\n")


def plain(value: Any) -> Any:
    """Returns a value of pandas as JSON takes it."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return None if value is None or value != value else value


if __name__ == "__main__":
    main()
