"""Every architecture on the same activations at equal L0, over several seeds: what to choose.

    python benchmarks/architectures.py --acts demo/acts [--model demo] [--seeds 0 1 2] [--steps 450]

Each is trained, then evaluated on held-out documents; interrupted, the same call goes on. Figures
are means over seeds, with the range; stability is how well features of one seed are found again in
the others. With --model also: how much of the cross-entropy is recovered with x_hat in the place of
x (all SAEs on the same tokens), accuracy of probes on one feature, and feature absorption.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import arguments, show

from activation_cache import ActivationCache, LanguageModel
from pipelines.probe_labels import labels_of_model
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
from sae.evaluating.cross_entropy import measure_losses, recovered, sae_and_ablations
from sae.evaluating.splicing import Replacement
from sae.reading import sample_rows
from sae.training import RunSpec, train_many
from sae.wiring import wiring_of

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


class Results(NamedTuple):
    """Of one variant, seed by seed. recovered: of the cross-entropy, if there is a model."""

    saes: list[SAE]
    reports: list[Report]
    seconds: list[float]
    recovered: list[float]

    def row(self, name: str) -> dict[str, Any]:
        """One line of the table."""
        pairs = [(a, b) for i, a in enumerate(self.saes) for b in self.saes[:i]]
        reports = self.reports
        probings = [each.probing.features["1"].accuracy for each in reports if each.probing]
        absorptions = [each.absorption.fraction for each in reports if each.absorption]
        return {
            "what": name,
            "L0": _spread([each.l0 for each in reports], 1),
            "FVU": _spread([each.fvu for each in reports], 4),
            "recovered": _spread(self.recovered, 4),
            "dead": _spread([float(each.n_dead) for each in reports], 0),
            "dense": _spread([float(each.n_dense) for each in reports], 0),
            "stability": _spread([matched(a, b) for a, b in pairs], 3),
            "probes": _spread(probings, 3),
            "absorption": _spread(absorptions, 3),
            "s": _spread(self.seconds, 0),
        }


def all_recovered(
    lm: LanguageModel,
    acts: ActivationCache,
    hookpoint: str,
    results: dict[str, Results],
    config: EvalConfig,
) -> None:
    """Fill in how much of the cross-entropy each SAE recovers: one pass of the model for each."""
    mean = sample_rows(acts, wiring_of(hookpoint), config.baseline_rows, seed=config.seed).x.mean(0)
    replacements: dict[str, Replacement] = {}
    for name, each in results.items():
        for i, sae in enumerate(each.saes):
            spliced = sae_and_ablations(sae, mean)
            replacements |= {f"{name} {i}": spliced.pop("spliced"), **spliced}
    max_norm = acts.max_norm(hookpoint)
    losses = measure_losses(lm, acts, wiring_of(hookpoint), replacements, max_norm, config)
    for name, each in results.items():
        found = [recovered(losses, f"{name} {i}") for i in range(len(each.saes))]
        each.recovered.extend(value for value in found if value is not None)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    middle = statistics.mean(values)
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--acts", required=True)
    parser.add_argument("--model", help="what the activations are of")
    parser.add_argument("--lm-tokens", type=int, default=4096, help="that are predicted")
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
    config = EvalConfig(n_lm_tokens=args.lm_tokens, n_probe_rows=16_384 if args.model else 0)
    lm = LanguageModel.load(args.model, device="cpu", dtype="bfloat16") if args.model else None
    asked = args.hookpoint, config.n_probe_rows, config.split
    labelled = labels_of_model(lm, acts, *asked) if lm else None
    results: dict[str, Results] = defaultdict(lambda: Results([], [], [], []))
    for spec in specs(args.hookpoint, chosen, settings, args.seeds, args.out):
        run = train_many(acts, [spec])[0]
        each = results[run.path.name.rpartition(", seed")[0]]
        each.saes.append(run.sae)
        each.reports.append(evaluate(run.sae, acts, config=config, labelled=labelled))
        each.seconds.append(run.metrics.elapsed_s if run.metrics else 0.0)
    if lm:
        all_recovered(lm, acts, args.hookpoint, results, config)
    show("architectures", [each.row(name) for name, each in results.items()], args.json)


if __name__ == "__main__":
    main()
