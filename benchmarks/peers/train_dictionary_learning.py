"""dictionary_learning's training step, for `train_peers.py`: its trainers' `update`.

Modes: float32; bfloat16, forced: its trainSAE runs `update` under autocast, with rows in bfloat16,
on CUDA only; here that is done on the CPU. Everything else is as its trainers have it.
"""

import contextlib

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from step_server import StepServer, Watched


def main() -> None:
    server = StepServer("dictionary-learning")
    spec = server.spec
    kind = BatchTopKTrainer if spec.architecture == "batch_topk" else TopKTrainer
    trainer = kind(
        steps=100_000,
        activation_dim=server.d_model,
        dict_size=spec.d_sae,
        k=spec.k,
        layer=0,
        lm_name="rows",
        lr=spec.lr,
        warmup_steps=0,
        seed=0,
        device="cpu",
    )

    def set_dead(ids: torch.Tensor, dead: bool) -> None:
        trainer.num_tokens_since_fired[ids] = trainer.dead_feature_threshold if dead else 0

    weights = {
        "W_enc": (trainer.ae.encoder.weight, False),
        "W_dec": (trainer.ae.decoder.weight, True),
        "b_enc": (trainer.ae.encoder.bias, False),
        "b_dec": (trainer.ae.b_dec, False),
    }
    server.watch(Watched(weights, set_dead))
    in_bfloat16 = spec.mode == "bfloat16"
    for step, x in enumerate(server.batches()):
        autocast = torch.autocast("cpu", torch.bfloat16)
        with autocast if in_bfloat16 else contextlib.nullcontext():
            trainer.update(step, x.bfloat16() if in_bfloat16 else x)


if __name__ == "__main__":
    main()
