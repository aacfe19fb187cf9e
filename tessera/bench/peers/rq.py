"""Runs vector-quantize-pytorch's ResidualVQ on `semantic-ids`' vectors, in the peer's environment without Tessera.

    python rq.py VECTORS RESULT --levels Q --codes K --steps N --seed S

Both files are safetensors: `fitted` (n, D) and `all` (N, D) in, `codes`, `decoded`, `seconds` and `rate` out.
Its moving-average codebooks after a k-means start, as its README trains them.
"""

import argparse
import time

import torch
from safetensors.torch import load_file, save_file
from vector_quantize_pytorch import ResidualVQ

_BATCH, _BLOCK, _THREADS = 1_024, 4_096, 2


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("vectors", "result"):
        parser.add_argument(name)
    for name in ("levels", "codes", "steps", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(_THREADS)
    torch.manual_seed(arguments.seed)
    tensors = load_file(arguments.vectors)
    fitted, vectors = tensors["fitted"], tensors["all"]
    start = time.perf_counter()
    model = ResidualVQ(
        dim=fitted.shape[1],
        num_quantizers=arguments.levels,
        codebook_size=arguments.codes,
        decay=0.8,
        commitment_weight=0.25,
        kmeans_init=True,
        kmeans_iters=10,
        threshold_ema_dead_code=2,
    ).train()
    for _ in range(arguments.steps):
        model(fitted[torch.randint(0, len(fitted), (_BATCH,))][None])
    seconds = time.perf_counter() - start
    model.eval()
    codes, decoded = [], []
    with torch.no_grad():
        start = time.perf_counter()
        for block in vectors.split(_BLOCK):
            quantized, index, _ = model(block[None])
            codes.append(index[0])
            decoded.append(quantized[0])
        rate = len(vectors) / (time.perf_counter() - start)
    results = {
        "codes": torch.cat(codes).to(torch.int32),
        "decoded": torch.cat(decoded),
        "seconds": torch.tensor([seconds], dtype=torch.float64),
        "rate": torch.tensor([rate], dtype=torch.float64),
    }
    save_file({name: tensor.contiguous() for name, tensor in results.items()}, arguments.result)


if __name__ == "__main__":
    main()
