"""SAELens' training step, for `train_peers.py`: SAETrainer.step on rows that are given.

Modes: float32; bfloat16 (its own `autocast`); sparse (its own `use_sparse_activations`, which on a
CPU runs only without `rescale_acts_by_decoder_norm`).
Everything else is as its configurations have it.
"""

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from step_server import Spec, StepServer, Watched

STEPS = 100_000


def build(spec: Spec, batch_size: int, d_model: int) -> SAETrainer:
    """Its SAE and its trainer."""
    common = {"d_in": d_model, "d_sae": spec.d_sae, "k": spec.k}
    if spec.architecture == "batch_topk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**common))
    else:
        is_sparse = spec.mode == "sparse"
        sae = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                **common,
                use_sparse_activations=is_sparse,
                rescale_acts_by_decoder_norm=not is_sparse,
            )
        )
    config = SAETrainerConfig(
        total_training_samples=STEPS * batch_size,
        train_batch_size_samples=batch_size,
        lr=spec.lr,
        lr_end=spec.lr,
        autocast=spec.mode == "bfloat16",
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, data_provider=iter(()))


def main() -> None:
    server = StepServer("sae-lens")
    trainer = build(server.spec, server.rows.shape[1], server.d_model)

    def set_dead(ids: torch.Tensor, dead: bool) -> None:
        passes = trainer.cfg.dead_feature_window + 1 if dead else 0
        trainer.n_forward_passes_since_fired[ids] = passes

    sae = trainer.sae
    weights = {
        "W_enc": (sae.W_enc, True),
        "W_dec": (sae.W_dec, False),
        "b_enc": (sae.b_enc, False),
        "b_dec": (sae.b_dec, False),
    }
    server.watch(Watched(weights, set_dead))
    for x in server.batches():
        trainer.step(x)
        trainer.n_training_steps += 1


if __name__ == "__main__":
    main()
