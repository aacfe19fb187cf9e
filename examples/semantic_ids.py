"""Give new items Semantic IDs by a published codebook, and find what shares their codes.

tessera demo --small  # makes a bundle under out/demo
python examples/semantic_ids.py out/demo/run/publish/bundle "a red bicycle" "a blue kettle"
"""

import sys

import numpy as np

import tessera


def main(directory: str, *texts: str) -> np.ndarray:
    """Codes the texts; prints the catalogue's items that share each code's longest prefix. Returns the codes."""
    bundle = tessera.load_bundle(directory)
    codes = bundle.semantic_ids(list(texts))
    known = bundle.items.drop_nulls("semantic_codes")
    catalogue = np.array(known["semantic_codes"].to_list())
    for text, own in zip(texts, codes, strict=True):
        shared = (catalogue == own).cumprod(axis=1).sum(axis=1)
        depth = int(shared.max())
        near = known["item_id"].to_numpy()[shared == depth]
        name = ".".join(map(str, own))
        print(f"{text!r} is {name}; {len(near)} items share {depth} of {len(own)} codes, such as {near[0]}")
    return codes


if __name__ == "__main__":
    main(sys.argv[1], *sys.argv[2:])
