"""All that a step of fine-tuning reads and changes, and the step itself: model -> SAE's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from sae.autoencoder import SAE
from sae.calibration import BATCH_ROWS, calibrate_threshold_
from sae.checkpoints import Checkpoint
from sae.codes import Codes
from sae.config import LearningConfig
from sae.errors import NonFiniteError
from sae.kernels import kernels_of
from sae.optimizer import Adam
from sae.sources import SplicedModel, TokenBlock
from sae.sparse_autograd import reconstructed
from sae.sparsity import PenaltyConfig

MATRICES, BIASES = ("W_enc", "W_dec"), ("b_enc", "b_dec")


class FinetuneConfig(LearningConfig):
    """How an SAE is fine-tuned through its model. None means: resolved at the start."""

    objective: Literal["kl", "ce"] = Field(
        default="kl",
        description="What the model should keep: its own predictions (kl), or that the text is "
        "likely (ce, end to end).",
    )
    n_tokens: int = Field(
        default=1_000_000,
        gt=0,
        description="Tokens whose prediction is compared; Karvonen 2025 takes 25 million.",
    )
    batch_blocks: int = Field(default=8, gt=0, description="Token blocks a step.")
    mse_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the reconstruction's error, beside an objective of the same size.",
    )
    lr: float | None = Field(
        default=None, gt=0, description="Peak learning rate. None: that of training."
    )
    warmup_fraction: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Part of the tokens over which lr rises; it then falls to zero.",
    )
    init_rows: int = Field(
        default=16_384, gt=0, description="Rows that units, variance and L0 are measured on."
    )
    checkpoint_every_steps: int = Field(default=100, gt=0, description="Steps between checkpoints.")


@dataclasses.dataclass(frozen=True)
class FinetuneMetrics:
    """What one logged step of fine-tuning looked like, on its own tokens.

    step: steps done. n_tokens: tokens whose prediction was compared so far. loss: what was
    minimised. kl: KL(clean || spliced), nats a token. ce_clean, ce_spliced: cross-entropies, nats a
    token. mse: |x - x_hat|^2 a row over the data's variance. l0: mean active features a row.
    lr: learning rate of this step. grad_norm: L2 norm before clipping. n_skipped: batches skipped
    so far. tokens_per_s: since the line before. elapsed_s: seconds, over all resumptions.
    """

    step: int
    n_tokens: int
    loss: float
    kl: float
    ce_clean: float
    ce_spliced: float
    mse: float
    l0: float
    lr: float
    grad_norm: float
    n_skipped: int
    tokens_per_s: float
    elapsed_s: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


class Scales(NamedTuple):
    """What a sample of rows says. unit: length of a raw activation that training calls 1.
    variance: mean squared deviation of raw rows from their mean. l0: of the SAE at the start."""

    unit: float
    variance: float
    l0: float


@dataclasses.dataclass
class Position:
    """Where fine-tuning stands. n_blocks: token blocks read."""

    step: int = 0
    n_tokens: int = 0
    n_blocks: int = 0
    n_skipped: int = 0
    n_skipped_in_a_row: int = 0
    elapsed_s: float = 0.0


class FinetuningState:
    """An SAE that is being fine-tuned, in raw units, and its optimizer.

        x_hat = SAE(x) at rows that are in the train split and in the SAE's domain; x elsewhere
        loss  = (mse / kl) objective + mse_weight mse

    mse / kl counts as constant: both parts have the same size at every step, so that settings
    carry over from training. BatchTopK's threshold is that of the batch. Where L0 came from a
    penalty, only as many of the largest acts of a batch are kept as there were before: L0 can't
    rise, and no penalty pulls at what is kept.
    Source: Karvonen 2025, arXiv 2503.17272; how L0 is held is our own.
    """

    def __init__(self, sae: SAE, config: FinetuneConfig, scales: Scales) -> None:
        """sae: is changed. config: resolved."""
        assert config.lr is not None
        self.sae, self.config, self.scales, self.lr = sae, config, scales, config.lr
        self.position = Position()
        self.is_between_steps = True
        sae.kernels = kernels_of(config.kernels, config.nominate_in, sae.b_dec.device)
        for weight in sae.weights:
            weight.requires_grad_()
        adam: dict[str, Any] = {"beta1": config.beta1, "beta2": config.beta2}
        self._adams = {
            names: Adam({name: self._weight(name) for name in names}, sae.kernels, **adam)
            for names in (MATRICES, BIASES)
        }

    @property
    def is_done(self) -> bool:
        """Whether all tokens are used."""
        return self.position.n_tokens >= self.config.n_tokens

    def advance(
        self, lm: SplicedModel, hookpoint: str, blocks: Sequence[TokenBlock]
    ) -> dict[str, float] | None:
        """One step on token blocks of equal length. Returns: metrics by name; None if it was
        skipped for NaN, Inf or rows that all stay as they are.

        Raises: NonFiniteError after max_skipped_batches in a row.
        """
        lr, tokens = self._learning_rate(), _Tokens.of(blocks)
        with torch.no_grad():
            clean = tokens.log_probabilities(lm.logits(tokens.token_ids))
        splice = _Splice(self.sae, tokens.in_split, self.scales)
        with lm.edit({hookpoint: splice}), torch.enable_grad():
            spliced = tokens.log_probabilities(lm.logits(tokens.token_ids, grad=True))
            losses = self._losses(tokens, clean, spliced, splice)
            if losses is not None:
                losses["loss"].backward()
        gradients, grad_norm = self._gradients()
        if losses is None or not (losses["loss"] + grad_norm).isfinite():
            self._skip_(len(blocks))
            return None
        self._apply_(gradients, lr, float(grad_norm), tokens)
        found = {name: float(each.detach()) for name, each in losses.items()}
        return found | {"l0": splice.l0, "lr": lr, "grad_norm": float(grad_norm)}

    def to_checkpoint(self) -> Checkpoint:
        """Everything that the rest depends on."""
        tensors = {f"sae.{name}": each for name, each in self.sae.state_dict().items()}
        for names, adam in self._adams.items():
            tensors |= {f"adam.{names[0]}.{name}": each for name, each in adam.tensors().items()}
        n_steps = next(iter(self._adams.values())).n_steps
        values = {"counters": dataclasses.asdict(self.position), "n_optimizer_steps": n_steps}
        return Checkpoint(tensors, values)

    def load_(self, checkpoint: Checkpoint) -> None:
        """Take up the state that to_checkpoint gave."""
        tensors, values = checkpoint
        self.position = Position(**values["counters"])
        self.sae.load_state_dict({name: tensors[f"sae.{name}"] for name in self.sae.state_dict()})
        for names, adam in self._adams.items():
            state = {name: tensors[f"adam.{names[0]}.{name}"] for name in adam.tensors()}
            adam.load_(state, values["n_optimizer_steps"])

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self.sae.weights, name)
        return weight.detach()

    def _losses(
        self, tokens: _Tokens, clean: Tensor, spliced: Tensor, splice: _Splice
    ) -> dict[str, Tensor] | None:
        if splice.n_rows == 0 or tokens.n == 0:
            return None
        kl = functional.kl_div(spliced, clean, reduction="sum", log_target=True) / tokens.n
        ce_spliced = tokens.cross_entropy(spliced)
        mse = splice.squared_error / (splice.n_rows * self.scales.variance)
        balance = (mse / kl.clamp(min=1e-9)).detach()
        objective = kl if self.config.objective == "kl" else ce_spliced
        loss = balance * objective + self.config.mse_weight * mse
        ce_clean = tokens.cross_entropy(clean)
        return {
            "loss": loss,
            "kl": kl,
            "ce_clean": ce_clean,
            "ce_spliced": ce_spliced,
            "mse": mse,
        }

    @torch.no_grad()
    def _gradients(self) -> tuple[dict[str, Tensor], Tensor]:
        """By weight, in line with unit decoder rows; and their norm, in training's units."""
        gradients = {
            name: torch.zeros_like(each) if each.grad is None else each.grad
            for name, each in self.sae.weights._asdict().items()
        }
        for weight in self.sae.weights:
            weight.grad = None
        self.sae.kernels.remove_along_(gradients["W_dec"], self._weight("W_dec"))
        units = {name: self.scales.unit if name in BIASES else 1.0 for name in gradients}
        norms = [gradients[name].norm() * units[name] for name in gradients]
        return gradients, torch.stack(norms).norm()

    @torch.no_grad()
    def _apply_(
        self, gradients: dict[str, Tensor], lr: float, grad_norm: float, tokens: _Tokens
    ) -> None:
        """All that changes in a step: interrupted in here, the state is of no step."""
        self.is_between_steps = False
        limit, position = self.config.max_grad_norm, self.position
        grad_scale = limit / grad_norm if limit is not None and grad_norm > limit else 1.0
        for names, adam in self._adams.items():
            # a raw bias is as many times larger than one in training's units
            its_lr = lr * self.scales.unit if names is BIASES else lr
            adam.step_({name: gradients[name] for name in names}, its_lr, grad_scale)
        position.n_tokens += tokens.n
        position.n_blocks += len(tokens.token_ids)
        position.n_skipped_in_a_row = 0
        position.step += 1
        self.is_between_steps = True

    def _skip_(self, n_blocks: int) -> None:
        position = self.position
        position.n_blocks += n_blocks
        position.step += 1
        position.n_skipped += 1
        position.n_skipped_in_a_row += 1
        if position.n_skipped_in_a_row >= self.config.max_skipped_batches:
            raise NonFiniteError(
                f"{position.n_skipped_in_a_row} batches in a row, up to step {position.step}, gave "
                "NaN or Inf, or held no row that the SAE is for; look at the model's precision, or "
                "lower lr"
            )

    def _learning_rate(self) -> float:
        """Linear warm-up, then linear decay to zero at n_tokens."""
        done, warmup = self.position.n_tokens / self.config.n_tokens, self.config.warmup_fraction
        if done < warmup:
            return self.lr * max(done / warmup, 0.1)
        return self.lr * (1 - done) / (1 - warmup)


class _Tokens(NamedTuple):
    """A batch of token blocks: token_ids and in_split [batch, seq], n: predictions that count."""

    token_ids: Tensor
    in_split: Tensor
    n: int

    @classmethod
    def of(cls, blocks: Sequence[TokenBlock]) -> _Tokens:
        in_split = torch.stack([block.in_split for block in blocks])
        token_ids = torch.stack([block.token_ids for block in blocks])
        return cls(token_ids, in_split, int(in_split[:, 1:].sum()))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Of the predictions whose next token is in the split: [n, vocab] float32."""
        is_counted = self.in_split[:, 1:].to(logits.device)
        return logits[:, :-1][is_counted].float().log_softmax(-1)

    def cross_entropy(self, log_probabilities: Tensor) -> Tensor:
        """Nats a token."""
        targets = self.token_ids[:, 1:][self.in_split[:, 1:]].to(log_probabilities.device)
        return functional.nll_loss(log_probabilities, targets)


class _Splice:
    """An edit that puts the SAE's reconstruction in the place of rows, and keeps what it cost.

    Rows of massive norm, and those of tokens outside of the split, stay as they are.
    """

    def __init__(self, sae: SAE, in_split: Tensor, scales: Scales) -> None:
        self._sae, self._in_split, self._scales = sae, in_split, scales
        self.n_rows, self.l0 = 0, 0.0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        is_used = self._in_split.flatten().to(rows.device) & self._sae.in_domain(rows)
        used = rows[is_used].to(self._sae.b_dec.device)
        self.n_rows = len(used)
        if not len(used):
            return x
        calibrate_threshold_(self._sae, used)  # BatchTopK's features are those of the batch
        codes = self._sae.encode_sparse(used)
        if isinstance(self._sae.config, PenaltyConfig):
            codes = codes.where(codes.acts > _cut(codes, self._scales.l0))
        x_hat = reconstructed(self._sae, used, codes)
        self.squared_error = (used - x_hat).square().sum()
        self.l0 = codes.nnz / self.n_rows
        replaced = rows.clone()
        replaced[is_used] = x_hat.to(rows.device)
        return replaced.to(x.dtype).view(x.shape)


@torch.no_grad()
def hold_l0_(sae: SAE, rows: Tensor, l0: float) -> None:
    """Raise thresholds, where L0 came from a penalty, until rows have no more than l0, in place.

    rows: [n_rows, d_model]. The least act is the mean of what parts of the rows ask for.
    """
    if not isinstance(sae.config, PenaltyConfig):
        return
    parts = rows.tensor_split(-(-len(rows) // BATCH_ROWS))
    cuts = [_cut(sae.encode_sparse(part.to(sae.b_dec.device)), l0) for part in parts]
    sae.threshold.clamp_(min=torch.stack(cuts).mean())


def _cut(codes: Codes, l0: float) -> Tensor:
    """What acts must be above for L0 to be no more than l0: scalar, 0 if it isn't."""
    n_over = codes.nnz - round(l0 * codes.n_rows)
    return codes.acts.kthvalue(n_over).values if n_over > 0 else codes.acts.new_zeros(())
