"""All that a training step reads and changes, and the step itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sae.architectures import architecture_of
from sae.autoencoder import SAE, Origin
from sae.checkpoints import Checkpoint
from sae.config import SAEConfig, TrainConfig
from sae.errors import NonFiniteError
from sae.gradients import AuxK, Step, Weights, loss_and_gradients
from sae.initialisation import InputStatistics, initial_sae, rescale_
from sae.schedule import learning_rate
from sae.selection import PreActs


@dataclasses.dataclass
class Counters:
    """Where a run stands.

    step: batches read, skipped ones included: the position in the data. n_tokens: rows trained
    on. n_skipped, n_skipped_in_a_row: batches with NaN or Inf. elapsed_s: seconds trained.
    """

    step: int = 0
    n_tokens: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0
    elapsed_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step that wasn't skipped did: the step's losses, its codes' size, lr, norm, rows."""

    step: Step
    l0: float
    lr: float
    grad_norm: float
    x: Tensor


class TrainingState:
    """An SAE in training: its weights live in scaled units (see sae.initialisation)."""

    def __init__(self, sae: SAE, config: TrainConfig, scale: float, variance: float) -> None:
        """sae: in scaled units. config: resolved. scale, variance: see InputStatistics."""
        self.sae, self.config, self.scale, self.variance = sae, config, scale, variance
        self.counters = Counters()
        self.tokens_since_active = torch.zeros(
            sae.d_sae, dtype=torch.int64, device=sae.b_dec.device
        )
        self.is_between_steps = True
        self._architecture = architecture_of(sae.config)
        self._optimizer = torch.optim.Adam(
            list(sae.weights), lr=1.0, betas=(config.beta1, config.beta2), fused=True
        )

    @classmethod
    def start(
        cls, sae_config: SAEConfig, config: TrainConfig, statistics: InputStatistics
    ) -> TrainingState:
        """The state before the first step."""
        sae = initial_sae(sae_config, statistics.center, config.seed)
        rescale_(sae, statistics.scale)
        scaled_variance = statistics.variance * statistics.scale**2
        return cls(sae.to(config.device), config, statistics.scale, scaled_variance)

    @property
    def is_dead(self) -> Tensor:
        """[d_sae] bool: not active for dead_after_tokens."""
        return self.tokens_since_active >= self.config.dead_after_tokens

    @torch.no_grad()
    def advance(self, x: Tensor) -> StepReport | None:
        """One step on raw activations x [batch, d_model]; None if it was skipped for NaN or Inf.

        Raises: NonFiniteError after max_skipped_batches of these in a row.
        """
        lr = learning_rate(self.config, self.counters.step)
        x = x.to(self.sae.b_dec.device) * self.scale
        if not x.sum().isfinite():
            self._skip_()
            return None
        pre_acts = PreActs(
            x - self.sae.b_dec,
            self.sae.W_enc_rows,
            self.sae.b_enc,
            nominate=self.config.nominate_in == "bfloat16",
        )
        codes, threshold = self._architecture.select_training(
            pre_acts, self.sae.config, self.sae.threshold
        )
        step = loss_and_gradients(x, codes, self.sae.weights, self.variance, self._auxk())
        grad_norm = self._prepare_(step.gradients)
        if not grad_norm.isfinite():
            self._skip_()
            return None
        self._apply_(step, threshold, lr, len(x))
        return StepReport(step, codes.nnz / len(x), lr, float(grad_norm), x)

    def finished_sae(self, origin: Origin) -> SAE:
        """A copy of the SAE in raw units, on the CPU: the scale folded into its weights."""
        sae = SAE(self.sae.config, self.sae.d_model, origin)
        sae.load_state_dict(self.sae.state_dict())
        return rescale_(sae, 1 / self.scale)

    def to_checkpoint(self) -> Checkpoint:
        """Everything that the rest of the run depends on."""
        tensors = {f"sae.{name}": each for name, each in self.sae.state_dict().items()}
        tensors["tokens_since_active"] = self.tokens_since_active
        for name, weight in zip(Weights._fields, self.sae.weights, strict=True):
            for key, value in self._optimizer.state[weight].items():
                tensors[f"adam.{name}.{key}"] = value
        values = {
            "counters": dataclasses.asdict(self.counters),
            "scale": self.scale,
            "variance": self.variance,
        }
        return Checkpoint(tensors, values)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, sae_config: SAEConfig, config: TrainConfig, d_model: int
    ) -> TrainingState:
        """The state that to_checkpoint wrote."""
        tensors, values = checkpoint
        sae = SAE(sae_config, d_model).to(config.device)
        state = cls(sae, config, values["scale"], values["variance"])
        state.counters = Counters(**values["counters"])
        sae.load_state_dict(_under("sae.", tensors))
        state.tokens_since_active.copy_(tensors["tokens_since_active"])
        for name, weight in zip(Weights._fields, sae.weights, strict=True):
            adam: dict[str, Any] = _under(f"adam.{name}.", tensors)
            if adam:
                state._optimizer.state[weight] = {
                    key: value.to(weight.device) for key, value in adam.items()
                }
        return state

    def _auxk(self) -> AuxK | None:
        if self.config.auxk_coefficient == 0:
            return None
        assert self.config.k_aux is not None
        dead_ids = self.is_dead.nonzero().squeeze(1)
        return AuxK(dead_ids, self.config.k_aux, self.config.auxk_coefficient)

    def _prepare_(self, gradients: Weights) -> Tensor:
        """Take the part along each decoder row away, and clip. Returns: the norm before that."""
        W_dec = self.sae.W_dec
        along = (gradients.W_dec * W_dec).sum(1, keepdim=True)
        gradients.W_dec.addcmul_(along, W_dec, value=-1)
        norm: Tensor = torch.stack([each.norm() for each in gradients]).norm()
        limit = self.config.max_grad_norm
        if limit is not None and norm > limit and norm.isfinite():
            for each in gradients:
                each.mul_(limit / norm)
        return norm

    def _apply_(self, step: Step, threshold: Tensor, lr: float, n_tokens: int) -> None:
        """All that changes in a step: interrupted in here, the state is of no step."""
        self.is_between_steps = False
        for weight, gradient in zip(self.sae.weights, step.gradients, strict=True):
            weight.grad = gradient
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.sae.W_dec.div_(self.sae.W_dec.norm(dim=1, keepdim=True))
        self.sae.threshold.copy_(threshold)
        self.tokens_since_active += n_tokens
        self.tokens_since_active[step.n_active > 0] = 0
        self.counters.n_tokens += n_tokens
        self.counters.n_skipped_in_a_row = 0
        self.counters.step += 1
        self.is_between_steps = True

    def _skip_(self) -> None:
        counters = self.counters
        counters.step += 1
        counters.n_skipped += 1
        counters.n_skipped_in_a_row += 1
        if counters.n_skipped_in_a_row >= self.config.max_skipped_batches:
            raise NonFiniteError(
                f"{counters.n_skipped_in_a_row} batches in a row, up to step {counters.step}, "
                "held NaN or Inf, or made the gradient so; look at the activations (float16 "
                "overflows), or lower lr"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose name begins with prefix, without it."""
    return {
        name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)
    }
