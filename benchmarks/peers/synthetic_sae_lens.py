"""SAELens on a world of known features, for `synthetic_peers.py`: its generator, trainer, scorer.

    .venv-peers/sae-lens/bin/python benchmarks/peers/synthetic_sae_lens.py make|train|score SPEC

SPEC is a JSON object. `make` writes a world of its SyntheticModel into a folder; `train` runs its
SAETrainer on a world's rows in their order and scores the result; `score` gives an SAE, whoever
trained it, the figures of `sae_lens.synthetic`. An SAE travels as weights of the same four names
and shapes on both sides, with a threshold (BatchTopK) or without (TopK). Prints one JSON object as
its last line.
"""

import argparse
import importlib.metadata
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import (
    ClassificationMetricsCalculator,
    DeadLatentsCalculator,
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    HierarchyNode,
    L0Calculator,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

BLOCK = 1024
NORM_BATCHES = 16


def make(spec: dict[str, Any]) -> dict[str, Any]:
    """A world of everything that its SyntheticModel has: Zipf's law, a low-rank copula, trees of
    depth 3 whose siblings exclude each other, magnitudes that differ from feature to feature."""
    torch.manual_seed(spec["seed"])
    config = SyntheticModelConfig(
        num_features=spec["n_features"],
        hidden_dim=spec["d_model"],
        firing_probability=ZipfianFiringProbabilityConfig(
            exponent=0.5, max_prob=0.4, min_prob=5e-4
        ),
        hierarchy=HierarchyConfig(
            total_root_nodes=spec["n_features"] // 128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
        ),
        orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
        bias=2.0,
        seed=spec["seed"],
    )
    model = SyntheticModel(config)
    folder, shape = Path(spec["world"]), (spec["n_rows"], spec["d_model"])
    train = np.lib.format.open_memmap(folder / "train.npy", "w+", np.float32, shape)
    for start in range(0, len(train), BLOCK):
        train[start : start + BLOCK] = model.sample(BLOCK)[: len(train) - start].numpy()
    parts = [model.sample_with_features(BLOCK) for _ in range(spec["n_heldout_rows"] // BLOCK)]
    np.save(folder / "heldout.npy", torch.cat([x for x, _ in parts]).numpy())
    features = torch.cat([acts for _, acts in parts])
    rows, feature_ids = features.nonzero(as_tuple=True)
    ends = torch.bincount(rows, minlength=len(features)).cumsum(0)
    parents = np.full(spec["n_features"], -1)
    for child, parent in family(model.hierarchy.roots):
        parents[child] = parent
    np.savez(
        folder / "truth.npz",
        directions=model.feature_dict.feature_vectors.detach().numpy(),
        bias=model.feature_dict.bias.detach().numpy(),
        parents=parents,
        acts=features[rows, feature_ids].numpy(),
        feature_ids=feature_ids.numpy(),
        offsets=np.concatenate([[0], ends.numpy()]),
    )
    return {}


def family(nodes: list[HierarchyNode]) -> Iterator[tuple[int, int]]:
    """(child, parent) of all trees."""
    for node in nodes:
        yield from ((child.feature_index, node.feature_index) for child in node.children)
        yield from family(node.children)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Its trainer on the rows in their order; what is saved is its inference SAE."""
    torch.manual_seed(spec["start_seed"])
    rows = np.load(Path(spec["world"]) / "train.npy", mmap_mode="r")
    common = {"d_in": rows.shape[1], "d_sae": spec["d_sae"], "k": spec["k"]}
    batches = [slice(i, i + spec["batch_size"]) for i in range(0, len(rows), spec["batch_size"])]
    sample: list[slice] = []
    if spec["is_normalised"]:  # its estimate reads batches: give them again
        common["normalize_activations"] = "expected_average_only_in"
        sample = batches[:NORM_BATCHES]
    if spec["architecture"] == "batch_topk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**common))
    n_steps = len(batches)
    config = SAETrainerConfig(
        total_training_samples=len(rows),
        train_batch_size_samples=spec["batch_size"],
        lr=spec["lr"],
        lr_end=spec["lr"],
        lr_warm_up_steps=n_steps // 20,
        lr_decay_steps=n_steps // 5,
        dead_feature_window=n_steps // 10,
        n_batches_for_norm_estimate=NORM_BATCHES,
        logger=LoggingConfig(log_to_wandb=False),
    )
    stream = (torch.from_numpy(rows[place].copy()) for place in itertools.chain(sample, batches))
    started = time.perf_counter()
    SAETrainer(config, sae, data_provider=stream).fit()
    seconds = time.perf_counter() - started
    state = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state)
    save_file({name: each.contiguous() for name, each in state.items()}, spec["sae"])
    version = importlib.metadata.version("sae-lens")
    return {"s": seconds, "version": version, "scores": score(spec)}


@torch.no_grad()
def score(spec: dict[str, Any]) -> dict[str, Any]:
    """What its eval_sae_on_synthetic_data computes, on the held-out rows that are given."""
    folder, sae = Path(spec["world"]), loaded(spec)
    truth = {name: torch.from_numpy(each) for name, each in np.load(folder / "truth.npz").items()}
    x = torch.from_numpy(np.load(folder / "heldout.npy"))
    features = torch.zeros(len(x), len(truth["directions"]))
    rows = torch.arange(len(x)).repeat_interleave(truth["offsets"].diff())
    features[rows, truth["feature_ids"]] = truth["acts"]
    l0, explained = L0Calculator(), ExplainedVarianceCalculator()
    dead = DeadLatentsCalculator(len(sae.W_dec))
    classes = ClassificationMetricsCalculator(sae.W_dec, truth["directions"])
    for start in range(0, len(x), BLOCK):
        part = x[start : start + BLOCK]
        acts = sae.encode(part)
        l0.add_batch(acts)
        dead.add_batch(acts)
        explained.add_batch(sae.decode(acts), part)
        classes.add_batch(acts, features[start : start + BLOCK])
    found = classes.compute()
    return {
        "mcc": mean_correlation_coefficient(sae.W_dec, truth["directions"]),
        "uniqueness": feature_uniqueness(sae.W_dec, truth["directions"]),
        "f1": found.f1_score,
        "precision": found.precision,
        "recall": found.recall,
        "explained_variance": float(explained.compute()),
        "l0": l0.compute(),
        "dead": dead.compute(),
    }


def loaded(spec: dict[str, Any]) -> JumpReLUSAE | TopKSAE:
    """An SAE as its inference classes have it."""
    weights = load_file(spec["sae"])
    d_in, d_sae = weights["W_enc"].shape
    if "threshold" in weights:
        sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
    else:
        sae = TopKSAE(
            TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=spec["k"], rescale_acts_by_decoder_norm=False)
        )
    sae.load_state_dict(weights)
    return sae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = {"make": make, "train": train, "score": score}
    parser.add_argument("command", choices=commands)
    parser.add_argument("spec", type=json.loads)
    args = parser.parse_args()
    torch.set_num_threads(args.spec["threads"])
    print(json.dumps(commands[args.command](args.spec)))


if __name__ == "__main__":
    main()
