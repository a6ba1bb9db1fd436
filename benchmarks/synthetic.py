"""How much of a known truth each architecture finds: recovery, F1, absorption, FVU.

    python benchmarks/synthetic.py [--architectures topk batch_topk] [--n-steps 1000] [--json]

Each trains on the same rows of `sae.synthetic` (16,384 true features, correlated and in families)
and is scored on held-out ones; the untrained SAE stands beside them. `--seeds 3` repeats it all.
"""

import sys
import tempfile
import time
from typing import Any

import torch
from machine import arguments, show

from sae import SAE, SAEConfig, TrainConfig, train
from sae.architectures import ARCHITECTURES, config_of
from sae.errors import ConfigError
from sae.evaluating.fitted import untrained_twin
from sae.reading import sample_rows
from sae.synthetic import SyntheticConfig, SyntheticSource, SyntheticTruth, score
from sae.wiring import wiring_of

SHOWN = (
    "l0",
    "fvu",
    "fvu_truth",
    "n_dead",
    "recovery",
    "recovery_by_firing",
    "recovered",
    "uniqueness",
    "f1",
    "absorbed",
    "parent_missed_alone",
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--n-features", type=int, default=16_384)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=24, help="L0, whatever the architecture")
    parser.add_argument("--n-steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--n-heldout-rows", type=int, default=32_768)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    world = SyntheticConfig(
        n_features=args.n_features,
        d_model=args.d_model,
        n_parents=args.n_features // 16,
        n_heldout_rows=args.n_heldout_rows,
    )
    source = SyntheticSource(SyntheticTruth(world))
    rows = []
    for name in args.architectures:
        config = config_for(name, args.d_sae, args.k)
        if config is None:
            print(f"{name} needs more settings than d_sae and k: left out")
            continue
        for seed in range(args.seeds):
            rows.append(trained_row(name, config, source, seed, args))
            print(rows[-1], file=sys.stderr, flush=True)  # a run takes long: show what there is
    rows.append(untrained_row(config_of("topk", {"d_sae": args.d_sae, "k": args.k}), source))
    title = f"synthetic: {args.n_features:,} features, d_model {args.d_model}, {args.n_steps} steps"
    show(title, rows, args.json)


def config_for(name: str, d_sae: int, k: int) -> SAEConfig | None:
    """The config of an architecture at an L0 of k; None if it needs more than that."""
    for settings in ({"d_sae": d_sae, "k": k}, {"d_sae": d_sae, "target_l0": k}):
        try:
            return config_of(name, settings)
        except ConfigError:
            continue
    return None


def trained_row(
    name: str, config: SAEConfig, source: SyntheticSource, seed: int, args: Any
) -> dict[str, Any]:
    """Train, and score on held-out rows."""
    how = TrainConfig(
        n_steps=args.n_steps,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=seed,
        device=args.device,
        dead_after_tokens=args.n_steps * args.batch_size // 10,
        checkpoint_every_steps=args.n_steps,
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sae = train(source, "synthetic", config, how, out=folder).sae
    return {"what": name, "seed": seed, **scored(sae, source), "s": time.perf_counter() - started}


def untrained_row(config: SAEConfig, source: SyntheticSource) -> dict[str, Any]:
    """What random directions score."""
    rows = sample_rows(source, wiring_of("synthetic"), 16_384, seed=0)
    l0 = config.expected_l0 or 1.0
    untrained = untrained_twin(SAE(config, source.d_model("synthetic")), rows, l0, seed=0)
    return {"what": "untrained topk", "seed": 0, **scored(untrained, source), "s": 0.0}


def scored(sae: SAE, source: SyntheticSource) -> dict[str, Any]:
    """The figures that are shown."""
    found = score(sae, source)
    return {name: getattr(found, name) for name in SHOWN}


if __name__ == "__main__":
    main()
