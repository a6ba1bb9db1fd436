"""Every architecture on the same activations at equal L0, over several seeds: what to choose.

    python benchmarks/architectures.py --acts demo/acts [--seeds 0 1 2] [--steps 450] [--markdown]

All are trained side by side from one read, then evaluated on held-out documents. Spread is the
range over seeds; stability is how well features of one seed are found again in the others.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from machine import arguments, show

from activation_cache import ActivationCache
from sae import SAE, EvalConfig, Report, TrainConfig, evaluate
from sae.architectures import (
    BatchTopKConfig,
    GatedConfig,
    HierarchicalTopKConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ReLUConfig,
    TopKConfig,
)
from sae.config import SAEConfig
from sae.training import RunSpec, train_many

Variant = tuple[SAEConfig, dict[str, Any]]


def variants(d_sae: int, k: int) -> dict[str, Variant]:
    """What is compared, by name: an architecture, and training options if they are not defaults."""
    batch_topk = BatchTopKConfig(d_sae=d_sae, k=k)
    return {
        "TopK": (TopKConfig(d_sae=d_sae, k=k), {}),
        "BatchTopK": (batch_topk, {}),
        "BatchTopK, aligned": (batch_topk, {"aligned": True}),
        "BatchTopK, OrtSAE penalty": (batch_topk, {"orthogonality_coefficient": 0.25}),
        "BatchTopK, frozen decoder": (batch_topk, {"freeze_decoder": True}),
        "Matryoshka": (MatryoshkaConfig(d_sae=d_sae, k=k), {}),
        "HierarchicalTopK": (HierarchicalTopKConfig(d_sae=d_sae, k=k), {}),
        "JumpReLU, l0": (JumpReLUConfig(d_sae=d_sae, target_l0=k), {}),
        "JumpReLU, tanh": (JumpReLUConfig(d_sae=d_sae, target_l0=k, recipe="tanh"), {}),
        "Gated": (GatedConfig(d_sae=d_sae, target_l0=k), {}),
        "ReLU + L1": (ReLUConfig(d_sae=d_sae, target_l0=k), {}),
    }


def specs(
    hookpoint: str, chosen: dict[str, Variant], settings: TrainConfig, seeds: list[int], out: Path
) -> Iterator[RunSpec]:
    """A run for each variant and seed, all on the same batches."""
    for name, (config, options) in chosen.items():
        for seed in seeds:
            train_config = settings.model_copy(update={**options, "seed": seed, "data_seed": 0})
            yield RunSpec(hookpoint, config, train_config, out / f"{name}, seed {seed}")


def matched(first: SAE, second: SAE) -> float:
    """Mean over features of the largest decoder cosine in another SAE."""
    return float((first.W_dec @ second.W_dec.T).amax(1).mean())


def row(name: str, saes: list[SAE], reports: list[Report], seconds: list[float]) -> dict[str, Any]:
    """One line of the table."""
    pairs = [(a, b) for i, a in enumerate(saes) for b in saes[:i]]
    return {
        "what": name,
        "L0": _spread([each.l0 for each in reports], 1),
        "FVU": _spread([each.fvu for each in reports], 4),
        "dead": _spread([float(each.n_dead) for each in reports], 0),
        "dense": _spread([float(each.n_dense) for each in reports], 0),
        "stability": _spread([matched(a, b) for a, b in pairs], 3) if pairs else "",
        "s": _spread(seconds, 0),
    }


def _spread(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    middle = statistics.mean(values)
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--acts", required=True)
    parser.add_argument("--hookpoint", default="layers.15.resid_post")
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--out", type=Path, default=Path("runs/architectures"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    acts = ActivationCache.open(args.acts)
    chosen = variants(args.d_sae, args.k)
    if args.only:
        chosen = {name: chosen[name] for name in args.only}
    settings = TrainConfig(
        n_steps=args.steps, batch_size=args.batch, lr=args.lr, dead_after_tokens=200_000
    )
    saes, reports, seconds = defaultdict(list), defaultdict(list), defaultdict(list)
    for spec in specs(args.hookpoint, chosen, settings, args.seeds, args.out):
        result = train_many(acts, [spec])[0]
        name = result.path.name.rpartition(", seed")[0]
        saes[name].append(result.sae)
        reports[name].append(evaluate(result.sae, acts, config=EvalConfig()))
        seconds[name].append(result.metrics.elapsed_s if result.metrics else 0.0)
    rows = [row(name, saes[name], reports[name], seconds[name]) for name in saes]
    show("architectures", rows, args.json)


if __name__ == "__main__":
    main()
