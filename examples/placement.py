"""Learn from what was shown: clicks that the position decides in part, a path of its own for it, and a fair order.

    python examples/placement.py out/placement

An older ranker mostly puts the items with even numbers on top, and users look at the first positions most. Odd and
even items are liked alike, so a ranker that does not know the position takes the even items for the better ones.
"""

import json
import random
import sys
from pathlib import Path

import tessera

EXAMINED = (0.9, 0.5, 0.25, 0.15)
DESCRIPTOR = """
name = "placement"

[events]
from = "impressions"
path = "impressions.jsonl"
outcomes_path = "outcomes.jsonl"
window = "1m"
{placement}

[split]
by = "time"

[run.training]
batch = 64                                     # a small log: more steps, so that the path moves far enough
"""
PLACEMENT = 'placement = { position = "position" }'


def write_logs(directory: Path, count: int) -> None:
    """Writes the exported topics of a shop of 20 items, of which the items 0 to 9 are liked more."""
    draw, start = random.Random(0), 1_700_000_000_000
    shown, clicked = [], []
    for number in range(count):
        items = sorted(draw.sample(range(20), 4), key=lambda item: item % 2 + 1.5 * draw.random())
        names, at = [f"i{item}" for item in items], start + 1_000 * number
        one = {"id": f"r{number}", "user": f"u{draw.randrange(50)}", "time_ms": at, "items": names}
        shown.append(one | {"kind": "shown", "bundle": "older", "model": "placement"})
        for item, look in zip(items, EXAMINED, strict=True):
            if draw.random() < look * (0.6 if item < 10 else 0.3):
                clicked.append({"impression": one["id"], "item": f"i{item}", "time_ms": at + 5_000})
    for name, messages in (("impressions", shown), ("outcomes", clicked)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(message) + "\n" for message in messages))


def lead(bundle: tessera.Bundle) -> float:
    """Returns the mean probability of the even items less that of the odd items. The truth is 0."""
    scores = bundle.rank("u1", [f"i{item}" for item in range(20)])
    return float(scores[::2].mean() - scores[1::2].mean())


def main(out: str, *, count: int = 6_000) -> dict[str, float]:
    """Trains without and with the position path on the same logs; returns the lead of the even items of both."""
    directory, leads = Path(out).absolute(), {}
    directory.mkdir(parents=True, exist_ok=True)
    write_logs(directory, count)
    for name, placement in (("blind", ""), ("placed", PLACEMENT)):
        descriptor = directory / f"{name}.toml"
        descriptor.write_text(DESCRIPTOR.format(placement=placement))
        bundle = tessera.run(tessera.load_dataset(descriptor), directory / name, until="publish").bundle
        assert bundle is not None
        leads[name] = lead(bundle)
        print(f"{name}: the even items lead by {leads[name]:+.3f}")
    return leads


if __name__ == "__main__":
    main(sys.argv[1])
