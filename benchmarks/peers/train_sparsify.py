"""sparsify's training step, for `train_peers.py`: its Trainer's own loop, `fit`.

It has no step that could be called alone, so `fit` runs with a model that gives rows in place of
a language model's activations; a step is what lies between two calls of that model.

Modes: float32; bfloat16, forced: its SparseCoder.forward runs under autocast on CUDA only; here
that is done on the CPU. Adam in place of its default, signum, so that all train alike; AuxK with
the coefficient of the others that scale it so, 1/32 (off by default). It has no BatchTopK.
"""

import contextlib
from collections.abc import Iterator

import torch
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from step_server import StepServer, Watched
from torch import Tensor, nn

HOOKPOINT = "rows"
AUXK_ALPHA = 1 / 32


class RowsModel(nn.Module):
    """What the trainer asks of a language model: at its one hookpoint it has the rows."""

    def __init__(self, batches: Iterator[Tensor], d_model: int) -> None:
        super().__init__()
        self.rows = nn.Identity()
        self._batches, self._d_model = batches, d_model
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> "RowsModel":
        """Where hookpoints are looked up."""
        return self

    @property
    def device(self) -> torch.device:
        """Where the SAEs go."""
        return torch.device("cpu")

    def forward(self, input_ids: Tensor) -> Tensor:
        """The next rows; of one token, which is how the trainer asks for the width, zeros."""
        if input_ids.numel() == 1:
            return self.rows(torch.zeros(1, 1, self._d_model))
        return self.rows(next(self._batches)[None])


class Blanks:
    """A dataset of sequences that are never looked at."""

    def __init__(self, n_rows: int) -> None:
        self._tokens = torch.zeros(n_rows, dtype=torch.long)

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens}


def main() -> None:
    server = StepServer("eai-sparsify")
    spec = server.spec
    if spec.mode == "bfloat16":
        SparseCoder.forward = torch.autocast("cpu", torch.bfloat16)(SparseCoder.forward)
    config = TrainConfig(
        SparseCoderConfig(num_latents=spec.d_sae, k=spec.k),
        batch_size=1,
        optimizer="adam",
        lr=spec.lr,
        lr_warmup_steps=0,
        auxk_alpha=AUXK_ALPHA,
        hookpoints=[HOOKPOINT],
        save_every=10**9,
        log_to_wandb=False,
    )
    model = RowsModel(server.batches(), server.d_model)
    trainer = Trainer(config, Blanks(server.rows.shape[1]), model)
    sae = trainer.saes[HOOKPOINT]

    def set_dead(ids: Tensor, dead: bool) -> None:
        n_tokens = config.dead_feature_threshold + 1 if dead else 0
        trainer.num_tokens_since_fired[HOOKPOINT][ids] = n_tokens
        sae.set_decoder_norm_to_unit_norm()  # as its step begins: what is saved is what it uses

    weights = {
        "W_enc": (sae.encoder.weight, False),
        "W_dec": (sae.W_dec, False),
        "b_enc": (sae.encoder.bias, False),
        "b_dec": (sae.b_dec, False),
    }
    server.watch(Watched(weights, set_dead))
    with contextlib.suppress(StopIteration):
        trainer.fit()


if __name__ == "__main__":
    main()
