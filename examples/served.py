"""Say which features to look at first, from a report of what was served: wrong values before drifted distributions.

tessera serve --skew-sample 0.01
tessera skew --json > served.json
python examples/served.py served.json
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def main(report: str) -> list[str]:
    """Prints a line for each feature that a report finds at fault; returns the lines."""
    found: dict[str, Any] = json.loads(Path(report).read_text(encoding="utf-8"))
    wrong: Counter[str] = Counter()
    for one in found["differences"]:
        wrong[one["feature"]] += one["count"]
    lines = [f"{feature}: {count:,} served values differ from the log" for feature, count in wrong.most_common()]
    for one in (found["drift"] or {}).get("measures", []):
        if one["alarm"]:
            interval = "" if one["psi_low"] is None else f" ({one['psi_low']:.2f} to {one['psi_high']:.2f})"
            change = f"{one['cell']} from {one['trained']:.1%} to {one['served']:.1%}"
            lines.append(f"{one['feature']} {one['measure']}: PSI {one['psi']:.2f}{interval}, {change}")
    print("\n".join(lines) or f"{found['requests']:,} requests, nothing to look at")
    return lines


if __name__ == "__main__":
    main(sys.argv[1])
