"""All that a training step reads and changes, and the step itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sae.architectures import architecture_of
from sae.architectures.base import Moment
from sae.autoencoder import SAE, Origin
from sae.checkpoints import Checkpoint
from sae.config import SAEConfig, TrainConfig
from sae.constraints import (
    ORTHOGONALITY_EVERY,
    add_orthogonality_,
    align_,
    align_gradients_,
)
from sae.errors import DivergedError, NonFiniteError, TrainingError
from sae.gradients import AuxK, Weights
from sae.initialisation import InputStatistics, initial_sae
from sae.kernels import kernels_of
from sae.normalisation import Normalisation
from sae.optimizer import Adam
from sae.reading import Batch
from sae.schedule import learning_rate, progress
from sae.sparsity import Control, PenaltyConfig
from sae.step import Step, step_of
from sae.team import Team

# A loss this many times the first one's will not come back.
DIVERGED = 1000.0


@dataclasses.dataclass
class Counters:
    """Where a run stands.

    step: batches read, skipped ones included: the position in the data. n_tokens: rows trained
    on. n_skipped, n_skipped_in_a_row: batches with NaN or Inf. elapsed_s: seconds trained.
    l0_integral, l0_excess: of the sparsity penalty's control. first_loss: of the first step.
    """

    step: int = 0
    n_tokens: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0
    elapsed_s: float = 0.0
    l0_integral: float = 0.0
    l0_excess: float = 0.0
    first_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step that wasn't skipped did: its losses, L0, lr, the gradient's norm before clipping,
    the coefficient of the sparsity penalty, and its targets [batch, d_out] on this process."""

    step: Step
    l0: float
    lr: float
    grad_norm: float
    coefficient: float
    y: Tensor


class TrainingState:
    """An SAE in training: its weights live in scaled units (see sae.normalisation)."""

    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        normalisation: Normalisation,
        variance: float,
        widths: tuple[int, ...],
    ) -> None:
        """sae: in scaled units. config: resolved. widths: of the places that are reconstructed."""
        self.sae, self.config, self.variance = sae, config, variance
        self.normalisation = normalisation.to(sae.b_dec.device)
        self.counters = Counters()
        self.tokens_since_active = torch.zeros(
            sae.d_sae, dtype=torch.int64, device=sae.b_dec.device
        )
        self.is_between_steps = True
        self.team = Team()
        self._widths = widths
        self._architecture = architecture_of(sae.config)
        self.learnt = self._architecture.start(sae.weights, sae.config)
        sae.kernels = kernels_of(config.kernels, config.nominate_in, sae.b_dec.device)
        is_lean = config.optimizer == "adam_lean"
        sae.kernels.gradients_in = torch.bfloat16 if is_lean else None
        betas = {"beta1": config.beta1, "beta2": config.beta2}
        self._optimizer = Adam(self._parameters(), sae.kernels, is_lean=is_lean, **betas)

    @classmethod
    def start(
        cls,
        sae_config: SAEConfig,
        config: TrainConfig,
        statistics: InputStatistics,
        *,
        origin: Origin | None = None,
        widths: tuple[int, ...] = (),
    ) -> TrainingState:
        """The state before the first step. widths: of the places, if there are several."""
        normalisation, b_dec, variance = statistics
        d_in = len(normalisation.in_scale)
        sae = initial_sae(sae_config, b_dec, config.seed, origin, d_in=d_in).to(config.device)
        if config.aligned:
            align_(sae.weights)
        return cls(sae, config, normalisation, variance, widths or (len(b_dec),))

    @property
    def is_dead(self) -> Tensor:
        """[d_sae] bool: not active for dead_after_tokens."""
        return self.tokens_since_active >= self.config.dead_after_tokens

    @torch.no_grad()
    def advance(self, batch: Batch) -> StepReport | None:
        """One step on raw activations; None if it was skipped for NaN or Inf.

        Raises: NonFiniteError or DivergedError after max_skipped_batches of these in a row;
        DivergedError if the loss is beyond hope.
        """
        lr = learning_rate(self.config, self.counters.step)
        batch = batch.to(self.sae.b_dec.device)
        x = self.normalisation.inputs(batch.x)
        y = x if batch.y is batch.x else self.normalisation.outputs(batch.y)
        if self.team.any(not (x.sum() if y is x else x.sum() + y.sum()).isfinite()):
            self._skip_(
                NonFiniteError, "held NaN or Inf; look at the activations (float16 overflows)"
            )
            return None
        n_rows = round(self.team.sum(len(x)))
        at = self._moment(x, y, n_rows)
        step = step_of(
            self._architecture,
            self.sae.config,
            at,
            is_tied=self.sae.is_tied,
            skip_input=None if self.sae.W_skip is None else x,
            auxk=self._auxk(),
        )
        grad_norm = self._prepare_(step.gradients)
        if not grad_norm.isfinite():
            self._skip_(
                DivergedError, f"had no finite gradient: the loss is {float(step.loss):.3g}"
            )
            return None
        self._require_sane(float(step.loss))
        l0 = float(step.n_active.sum()) / n_rows
        self._apply_(step, lr, float(grad_norm), n_rows, l0)
        step = step._replace(gradients={})  # which a report would keep alive through the next step
        return StepReport(step, l0, lr, float(grad_norm), at.coefficient, y)

    def finished_sae(self, origin: Origin) -> SAE:
        """A copy of the SAE for raw activations, on the CPU: what was learnt and the scale folded
        into its weights."""
        sae = SAE(self.sae.config, self.sae.d_model, origin, d_out=self.sae.d_out)
        sae.load_state_dict(self.sae.state_dict())
        learnt = {name: each.cpu() for name, each in self.learnt.items()}
        self._architecture.fold_(sae.weights, sae.threshold, learnt, sae.config)
        return self.normalisation.to("cpu").fold_(sae)

    def to_checkpoint(self) -> Checkpoint:
        """Everything that the rest of the run depends on."""
        tensors = {f"sae.{name}": each for name, each in self.sae.state_dict().items()}
        tensors |= {f"learnt.{name}": each for name, each in self.learnt.items()}
        tensors |= {f"adam.{name}": each for name, each in self._optimizer.tensors().items()}
        tensors |= {f"scale.{k}": each.clone() for k, each in self.normalisation._asdict().items()}
        tensors["tokens_since_active"] = self.tokens_since_active
        values = {
            "counters": dataclasses.asdict(self.counters),
            "n_optimizer_steps": self._optimizer.n_steps,
            "variance": self.variance,
            "widths": list(self._widths),
        }
        return Checkpoint(tensors, values)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        sae_config: SAEConfig,
        config: TrainConfig,
        origin: Origin | None = None,
    ) -> TrainingState:
        """The state that to_checkpoint wrote."""
        tensors, values = checkpoint
        normalisation = Normalisation(**_under("scale.", tensors))
        d_in, d_out = len(normalisation.in_scale), len(normalisation.out_scale)
        sae = SAE(sae_config, d_in, origin, d_out=d_out).to(config.device)
        widths = tuple(values["widths"])
        state = cls(sae, config, normalisation, values["variance"], widths)
        state.counters = Counters(**values["counters"])
        sae.load_state_dict(_under("sae.", tensors))
        for name, each in _under("learnt.", tensors).items():
            state.learnt[name].copy_(each)
        state.tokens_since_active.copy_(tensors["tokens_since_active"])
        state._optimizer.load_(_under("adam.", tensors), values["n_optimizer_steps"])
        return state

    def _parameters(self) -> dict[str, Tensor]:
        """Everything that is learnt, by name."""
        named = {**self.sae.weights._asdict(), **self.learnt}
        return named if self.sae.W_skip is None else {**named, "W_skip": self.sae.W_skip}

    def _moment(self, x: Tensor, y: Tensor, n_rows: int) -> Moment:
        sae, done = self.sae, progress(self.config, self.counters.step)
        coefficient = 0.0
        if isinstance(sae.config, PenaltyConfig):
            control = Control(self.counters.l0_integral, self.counters.l0_excess)
            coefficient = sae.config.coefficient_at(control, done)
        target = y - sae.b_dec
        return Moment(
            x=target if sae.is_tied else x,
            target=target if sae.W_skip is None else target - x @ sae.W_skip,
            weights=sae.weights,
            learnt=self.learnt,
            threshold=sae.threshold,
            coefficient=coefficient,
            progress=done,
            scale=1 / (n_rows * self.variance),
            widths=self._widths,
            kernels=sae.kernels,
            team=self.team,
        )

    def _auxk(self) -> AuxK | None:
        if self.config.auxk_coefficient == 0:
            return None
        assert self.config.k_aux is not None
        dead_ids = self.is_dead.nonzero().squeeze(1)
        return AuxK(dead_ids, self.config.k_aux, self.config.auxk_coefficient)

    def _prepare_(self, gradients: dict[str, Tensor]) -> Tensor:
        """Bring gradients in line with the constraints. Returns: their norm, before clipping."""
        config, weights, step = self.config, self.sae.weights, self.counters.step
        if config.aligned:
            align_gradients_(Weights(*(gradients[name] for name in Weights._fields)), weights)
        if config.orthogonality_coefficient and step % ORTHOGONALITY_EVERY == 0:
            coefficient = config.orthogonality_coefficient * ORTHOGONALITY_EVERY
            seed = config.seed * 1_000_003 + step
            add_orthogonality_(gradients["W_dec"], weights.W_dec, coefficient, seed)
        if config.freeze_decoder:
            del gradients["W_dec"]
        else:
            self.sae.kernels.remove_along_(gradients["W_dec"], weights.W_dec)
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradients.values()]
        norm: Tensor = torch.stack(norms).norm()
        return norm

    def _apply_(self, step: Step, lr: float, grad_norm: float, n_rows: int, l0: float) -> None:
        """All that changes in a step: interrupted in here, the state is of no step."""
        self.is_between_steps = False
        limit = self.config.max_grad_norm
        grad_scale = limit / grad_norm if limit is not None and grad_norm > limit else 1.0
        self._optimizer.step_(step.gradients, lr, grad_scale)
        if self.config.aligned:
            align_(self.sae.weights)
        self.sae.threshold.copy_(step.threshold)
        self.tokens_since_active += n_rows
        self.tokens_since_active[step.n_active > 0] = 0
        sae_config, counters = self.sae.config, self.counters
        if isinstance(sae_config, PenaltyConfig):
            assert self.config.n_steps is not None
            done = progress(self.config, counters.step)
            control = Control(counters.l0_integral, counters.l0_excess)
            control = sae_config.next_control(control, l0, done, self.config.n_steps)
            counters.l0_integral, counters.l0_excess = control
        counters.n_tokens += n_rows
        counters.n_skipped_in_a_row = 0
        counters.step += 1
        self.is_between_steps = True

    def _require_sane(self, loss: float) -> None:
        """Raises: DivergedError if the loss has grown beyond hope."""
        counters = self.counters
        if counters.first_loss is None:
            counters.first_loss = loss
        if loss > DIVERGED * max(counters.first_loss, 1.0):
            raise DivergedError(
                f"training diverged at step {counters.step}: the loss is {loss:.3g}, after "
                f"{counters.first_loss:.3g} at the first step; {self._way_out}"
            )

    @property
    def _way_out(self) -> str:
        return (
            f"lower lr={self.config.lr:.3g}, or raise warmup_steps, and start over with "
            "resume=False"
        )

    def _skip_(self, error: type[TrainingError], what: str) -> None:
        """Count a batch as skipped. Raises: error, if too many were, of which what is said."""
        counters = self.counters
        counters.step += 1
        counters.n_skipped += 1
        counters.n_skipped_in_a_row += 1
        if counters.n_skipped_in_a_row >= self.config.max_skipped_batches:
            way_out = f"; {self._way_out}" if error is DivergedError else ""
            raise error(
                f"{counters.n_skipped_in_a_row} batches in a row, up to step {counters.step}, "
                f"{what}{way_out}"
            )


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors whose name begins with prefix, without it."""
    return {
        name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)
    }
