"""Rank, retrieve and embed by a server; the client needs httpx and msgspec alone.

tessera demo --small  # makes a bundle under out/demo
tessera serve --bundle out/demo/run/publish/bundle &
python examples/client.py http://127.0.0.1:8000
"""

import asyncio
import sys

from tessera import ApiError, AsyncClient, Client


def main(url: str, key: str | None = None) -> list[str]:
    """Asks a server in one call after another; returns the ids of the items that it recommends."""
    with Client(url, key=key) as client:
        print(f"bundle {client.version().bundle}")
        ranking = client.rank("a new user", k=5)
        for found in ranking.items:
            print(f"  {found.item}  {found.score:.3f}")
        items = [found.item for found in ranking.items]
        near = client.retrieve(item=items[0], k=3)
        print(f"nearest to {items[0]}: {', '.join(found.item for found in near.items)}")
        try:
            client.embeddings("no such feature", items)
        except ApiError as error:
            print(f"refused: {error.status}, {error.detail}")
    return items


async def at_once(url: str, users: list[str], key: str | None = None) -> list[str]:
    """Asks for several users at the same time; returns the best item of each."""
    async with AsyncClient(url, key=key) as client:
        rankings = await asyncio.gather(*(client.rank(user, k=1) for user in users))
    return [ranking.items[0].item for ranking in rankings]


if __name__ == "__main__":
    main(sys.argv[1])
    print(asyncio.run(at_once(sys.argv[1], ["a new user", "another one"])))
