"""Runs of every tier of kernels follow dense float32 autograd with torch's own Adam."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae import BatchTopKConfig, TopKConfig, TrainConfig
from sae.architectures import architecture_of
from sae.kernels import TIERS, PreActs
from sae.reading import Batch
from sae.run import started
from sae.run_folder import RunPlan
from sae.schedule import learning_rate, resolve
from sae.training_state import TrainingState
from sae.wiring import wiring_of

if TYPE_CHECKING:
    from tests.sae.conftest import Planted

K, D_SAE, N_STEPS = 4, 128, 150
CPU = torch.device("cpu")
TIERS_HERE = [
    (name, precision)
    for name, tier in TIERS.items()
    if tier.missing(CPU) is None
    for precision in tier.precisions(CPU)
]


class Dense:
    """The same SAE, optimizer and constraints, written with dense autograd."""

    def __init__(self, state: TrainingState) -> None:
        self.config, self.variance = state.config, state.variance
        sae = state.sae
        starts = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        self.leaves = [each.detach().clone().requires_grad_() for each in starts]
        betas = (self.config.beta1, self.config.beta2)
        self.optimizer = torch.optim.Adam(self.leaves, lr=1.0, betas=betas)

    def choose(self, pre_acts: Tensor, by_batch: bool) -> Tensor:
        """Which features are active: [batch, d_sae] bool."""
        if by_batch:
            return pre_acts >= pre_acts.flatten().topk(K * len(pre_acts)).values.min()
        return pre_acts >= pre_acts.topk(K, dim=1).values[:, -1:]

    def step(self, x: Tensor, number: int, by_batch: bool) -> tuple[float, Tensor]:
        """Loss and choice of one step on scaled rows."""
        W_enc, b_enc, W_dec, b_dec = self.leaves
        pre_acts = (x - b_dec) @ W_enc + b_enc
        is_active = self.choose(pre_acts.detach(), by_batch)
        x_hat = (pre_acts * is_active).relu() @ W_dec + b_dec
        loss = (x - x_hat).square().sum(1).mean() / self.variance
        self.optimizer.zero_grad()
        loss.backward()
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
        torch.nn.utils.clip_grad_norm_(self.leaves, self.config.max_grad_norm or 0.0)
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, number)
        self.optimizer.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        return float(loss.detach()), is_active & (pre_acts.detach() > 0)


@pytest.mark.parametrize(("tier", "precision"), TIERS_HERE)
@pytest.mark.parametrize("kind", [TopKConfig, BatchTopKConfig])
def test_losses_are_those_of_dense_autograd(
    planted: Planted, kind: type[TopKConfig], tier: str, precision: str
) -> None:
    config = kind(d_sae=D_SAE, k=K)
    asked = TrainConfig(
        n_steps=N_STEPS,
        batch_size=512,
        lr=3e-3,
        device="cpu",
        kernels=tier,  # type: ignore[arg-type]
        nominate_in=precision,  # type: ignore[arg-type]
        auxk_coefficient=0,
    )
    wiring, source = wiring_of("layer"), planted.source
    settings = resolve(asked, config, source, wiring)
    state = started(source, RunPlan.of(source, wiring, config, settings))
    dense, by_batch = Dense(state), isinstance(config, BatchTopKConfig)
    rows = source.batches("layer", 512, seed=0, epochs=None)
    for number, x in enumerate(itertools.islice(rows, N_STEPS)):
        if number in (0, N_STEPS - 1):
            found_choice = choice_of(state, x)
        expected, choice = dense.step(state.normalisation.inputs(x), number, by_batch)
        report = state.advance(Batch(x, x))
        assert report is not None
        if number == 0:
            assert torch.equal(found_choice, choice)
        assert float(report.step.loss) == pytest.approx(expected, rel=1e-3), f"step {number}"
    assert (found_choice == choice).double().mean() > 0.9999


def choice_of(state: TrainingState, x: Tensor) -> Tensor:
    """Which features the next step's forward will choose: [batch, d_sae] bool."""
    scaled = state.normalisation.inputs(x)
    at = state._moment(scaled, scaled, len(x))
    made = architecture_of(state.sae.config).forward(
        PreActs(at.x, at.weights.W_enc, at.weights.b_enc), state.sae.config, at
    )
    return made.codes.to_dense(state.sae.d_sae) > 0
