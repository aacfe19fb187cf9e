"""Judge new items off-line: what chance has shown, by the propensities of the impressions, beside the ranker's choices.

tessera topics export impressions impressions.jsonl
tessera topics export outcomes outcomes.jsonl
python examples/explored_items.py impressions.jsonl outcomes.jsonl
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: str) -> Iterator[dict[str, Any]]:
    """Yields the messages of an exported topic."""
    with Path(path).open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


def main(impressions: str, outcomes: str) -> dict[str, tuple[float, float]]:
    """Prints and returns, for each policy, the click rate of new items that chance drew, and of all other items."""
    clicked = {(one["impression"], one["item"]) for one in read(outcomes) if one.get("what", "click") == "click"}
    sums: dict[str, list[float]] = {}
    for shown in read(impressions):
        chances = shown.get("propensities", [])
        if shown.get("kind") != "shown" or not chances:
            continue
        drawn_clicks, drawn, other_clicks, others = sums.setdefault(shown["policy"], [0.0, 0.0, 0.0, 0.0])
        for item, chance in zip(shown["items"], chances, strict=True):
            click = (shown["id"], item) in clicked
            if chance < 1:
                # An item that few draws show stands for many that they do not.
                drawn_clicks, drawn = drawn_clicks + click / chance, drawn + 1 / chance
            else:
                other_clicks, others = other_clicks + click, others + 1
        sums[shown["policy"]] = [drawn_clicks, drawn, other_clicks, others]
    rates = {}
    for policy, (drawn_clicks, drawn, other_clicks, others) in sums.items():
        rates[policy] = drawn_clicks / max(drawn, 1), other_clicks / max(others, 1)
        new, chosen = rates[policy]
        print(f"{policy}: new items would be clicked in {new:.1%} of the places, others were in {chosen:.1%}")
    return rates


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
