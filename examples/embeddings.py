"""Use a bundle's embeddings and scores in a program of your own, without a server.

tessera demo --small  # makes a bundle under out/demo
python examples/embeddings.py out/demo/run/publish/bundle
"""

import sys

import numpy as np

import tessera


def main(directory: str) -> np.ndarray:
    """Embeds the catalogue, finds the items most like the first, and ranks them for a user; returns the scores."""
    bundle = tessera.load_bundle(directory)
    items = bundle.items["item_id"].to_list()

    # By table: learnt by the ranker for an id. A categorical column is a feature too, `tags` of [items] is `item.tags`.
    vectors = bundle.embed("item_id", items)
    print(f"{len(items)} items, a vector of {vectors.shape[1]} numbers each")

    # By content: known before anybody has seen the item.
    described = bundle.items.drop_nulls("content_vector")
    content, names = described["content_vector"].to_numpy(), described["item_id"].to_list()
    near = [names[row] for row in np.argsort(-(content @ content[0]))[1:6]]
    print(f"content like that of {names[0]}: {', '.join(near)}")

    user = bundle.history["user_id"][0]
    scores = bundle.rank(user, near)
    for item, score in sorted(zip(near, scores, strict=True), key=lambda pair: -pair[1]):
        print(f"  {item}  {score:.3f}")
    return scores


if __name__ == "__main__":
    main(sys.argv[1])
