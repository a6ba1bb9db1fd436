"""Our synthetic scores beside SAELens' own, of the same SAE on the same rows.

    PYTHONPATH=. .venv-peers/sae-lens/bin/python benchmarks/peers/sae_lens_scores.py [--n-steps 300]

SAELens takes the absolute cosine, where ours is signed, and matches by the Hungarian algorithm,
where ours is greedy.
"""

import argparse
import json
import tempfile

import torch
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    feature_uniqueness,
    mean_correlation_coefficient,
)

from sae import BatchTopKConfig, TrainConfig, train
from sae.synthetic import SyntheticConfig, SyntheticSource, SyntheticTruth, score
from sae.synthetic.source import BLOCK_ROWS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-features", type=int, default=512)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--d-sae", type=int, default=512)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--n-steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = SyntheticConfig(
        n_features=args.n_features,
        d_model=args.d_model,
        n_parents=args.n_features // 16,
        l0=8,
        n_heldout_rows=4 * BLOCK_ROWS,
    )
    source = SyntheticSource(SyntheticTruth(world))
    how = TrainConfig(
        n_steps=args.n_steps,
        batch_size=1024,
        lr=2e-3,
        init_rows=4096,
        calibration_rows=8192,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = BatchTopKConfig(d_sae=args.d_sae, k=args.k)
        sae = train(source, "synthetic", config, how, out=folder).sae
    ours, directions = score(sae, source), source.truth.directions
    theirs = ClassificationMetricsCalculator(sae.W_dec, directions)
    for number in range(4):
        block = source.block("heldout", number)
        theirs.add_batch(sae.encode(block.x), block.codes.to_dense(args.n_features))
    rows = {
        "uniqueness": (ours.uniqueness, feature_uniqueness(sae.W_dec, directions)),
        "f1_of_features": (ours.f1_of_features, theirs.compute().f1_score),
        "matched_cosine": (
            ours.matched_cosine,
            mean_correlation_coefficient(sae.W_dec, directions),
        ),
    }
    for name, (our_value, their_value) in rows.items():
        print(json.dumps({"score": name, "ours": our_value, "sae_lens": their_value}))


if __name__ == "__main__":
    main()
