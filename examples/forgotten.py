"""Prove what was removed of a user, from the audit: the id is known to who asks, and no line holds it.

tessera forget customer-42
tessera stream --once
tessera topics export forgotten forgotten.jsonl
python examples/forgotten.py forgotten.jsonl customer-42
"""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from features.value.forgotten import hashed


def main(audit: str, user: str) -> list[dict[str, Any]]:
    """Prints the lines of an audit that are about a user, oldest first; returns them."""
    lines = [json.loads(line) for line in Path(audit).read_text(encoding="utf-8").splitlines()]
    own = [line for line in lines if line["user"] == hashed(user, line["salt"])]
    for line in own:
        when = datetime.fromtimestamp(line["time_ms"] / 1_000, UTC)
        counts = ", ".join(f"{number} {name}" for name, number in line.get("removed", {}).items())
        print(f"{when:%Y-%m-%d %H:%M:%S} {line['kind']} {line.get('by', '')}{line.get('bundle', '')} {counts}".rstrip())
    return own


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
