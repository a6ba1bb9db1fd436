"""Does training find what is there? An SAE on data whose true directions are known.

    python examples/planted_truth.py

Every row is a sum of a few of 256 random directions in 64 dimensions. After training, each true
direction is compared with the nearest row of the decoder.
"""

import argparse
import tempfile

import torch
from torch import Tensor

from sae import BatchTopKConfig, TensorSource, TrainConfig, train


def planted(n_rows: int, directions: Tensor, n_active: int, seed: int) -> Tensor:
    """Rows that are sums of `n_active` directions with random positive strengths."""
    generator = torch.Generator().manual_seed(seed)
    n = len(directions)
    chosen = torch.rand(n_rows, n, generator=generator).topk(n_active).indices
    strengths = torch.rand(n_rows, n_active, generator=generator) + 0.5
    return torch.zeros(n_rows, n).scatter(1, chosen, strengths) @ directions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(256, 64), dim=1)
    source = TensorSource(planted(60_000, directions, n_active=3, seed=1))
    settings = TrainConfig(n_steps=args.steps, batch_size=1024, lr=3e-3, dead_after_tokens=50_000)
    with tempfile.TemporaryDirectory() as folder:
        sae = train(source, "x", BatchTopKConfig(d_sae=320, k=3), settings, out=folder).sae
    cosines = (directions @ sae.W_dec.T).max(dim=1).values
    found = (cosines > 0.95).float().mean()
    print(f"{found:.1%} of the true directions found (cosine above 0.95)")


if __name__ == "__main__":
    main()
