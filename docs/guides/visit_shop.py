"""Lets the tea shop's customers visit: asks a server for rankings and sends clicks, as the shop's pages would.

Synthetic as the shop is: a customer looks from the top, clicks on something of a category they love more often than on
something else, and stops there.

    python visit_shop.py http://127.0.0.1:8000 3      # three visits of each customer
"""

import sys

import numpy as np
from make_shop import SEED, shop

from serving.client import Client

CANDIDATES, SHOWN, SENT = 60, 3, 500
LOVED, OTHER = 0.3, 0.05


def main(url: str, visits: int) -> None:
    """Each customer sees the best of some products, chosen by chance, and clicks."""
    _, category, _, loved = shop(np.random.default_rng(SEED))
    rng = np.random.default_rng(SEED + visits)
    clicks: list[dict[str, str]] = []
    asked = 0
    with Client(url) as client:
        for customer in np.repeat(np.arange(len(loved)), visits).tolist():
            rows = rng.choice(len(category), CANDIDATES, replace=False).tolist()
            answer = client.rank(f"c{customer:03}", [f"SKU-{row:03}" for row in rows], k=SHOWN)
            asked += 1
            for one in answer.items:
                likes = loved[customer, category[int(one.item[4:])]]
                if answer.impression and rng.random() < (LOVED if likes else OTHER):
                    clicks.append({"impression": answer.impression, "item": one.item})
                    break
        for begin in range(0, len(clicks), SENT):
            client.send_outcomes(clicks[begin : begin + SENT])
    print(f"{asked:,} rankings of {SHOWN}, {len(clicks):,} clicks")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
