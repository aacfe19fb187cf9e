"""Sources of users' candidates on the console's page of features and table."""

from collections.abc import Mapping
from typing import Any

from features.content.chain import BASE
from serving.ranking.tower_index import TOWERS
from serving.retrieval.fusion import BOTH
from serving.retrieval.search_plan import POPULAR
from serving.retrieval.text_search import CONTENT


def candidate_sources(index_bytes: Mapping[str, int], found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Returns the sources of users' candidates as rows of a table: bytes of the index, and items found.

    Args:
        index_bytes: Bytes of each index, by name.
        found: Number of items that retrieval found for users, by source.
    """
    held = {TOWERS: index_bytes.get(TOWERS), CONTENT: index_bytes.get(BASE)}
    whole = sum(found.values())
    return [
        {
            "name": name,
            "bytes": held.get(name),
            "found": int(found.get(name, 0)),
            "share": found.get(name, 0) / whole if whole else None,
        }
        for name in (TOWERS, CONTENT, BOTH, POPULAR)
        if name in (CONTENT, POPULAR) or TOWERS in index_bytes
    ]
