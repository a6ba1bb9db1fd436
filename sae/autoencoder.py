"""SAE: the sparse autoencoder, whatever its architecture. Works on raw activations of a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sae.architectures import architecture_of
from sae.codes import Codes
from sae.config import Config, SAEConfig
from sae.errors import SourceError
from sae.gradients import Weights
from sae.kernels import Kernels, PreActs
from sae.kernels.embedding_bags import sum_by_row
from sae.wiring import Wiring, wiring_of


class Origin(Config):
    """Where an SAE comes from, saved with it."""

    hookpoint: str | None = Field(
        default=None, description="Place in the model that it was trained at."
    )
    wiring: Wiring | None = Field(
        default=None,
        description="What it reads and reconstructs. None: hookpoint, as a plain SAE does.",
    )
    max_norm: float = Field(
        default=math.inf, gt=0, description="Rows of a larger L2 norm were never trained on."
    )
    n_tokens_trained: int = Field(
        default=0, ge=0, description="Rows seen in training, repeats included."
    )
    train_config: dict[str, Any] | None = Field(
        default=None, description="Resolved training settings."
    )
    provenance: dict[str, Any] = Field(
        default_factory=dict, description="Model, tokenizer and activations it was made from."
    )


class SAE(nn.Module):
    """A sparse autoencoder on d_model-dimensional activations with d_sae features.

        pre_acts = (x - b_dec) @ W_enc + b_enc      # [batch, d_sae]
        acts     = the architecture's choice of pre_acts, >= 0
        x_hat    = acts @ W_dec + b_dec             # [batch, d_model]

    W_enc: [d_model, d_sae]. b_enc: [d_sae]. W_dec: [d_sae, d_model]; row i is feature i's unit
    direction, so acts[i] * W_dec[i] is what feature i contributes to x_hat. b_dec: [d_model].
    threshold: scalar, what BatchTopK learns (0 elsewhere). max_act: [d_sae], each feature's
    largest act over a sample of training rows, the unit of steering. density: [d_sae], fraction
    of those rows in which it is active. All float32.

    A transcoder reads one place and reconstructs another (origin.wiring): x is d_in wide, x_hat
    d_out, pre_acts = x @ W_enc + b_enc, and W_skip [d_in, d_out], if there is one, adds x @ W_skip.
    A crosscoder's x and x_hat are several places side by side.

    The parameters don't require gradients: training computes its own. With requires_grad_(), or
    on an x that requires them, encode, decode and forward are differentiable.
    """

    threshold: Tensor
    max_act: Tensor
    density: Tensor

    def __init__(
        self,
        config: SAEConfig,
        d_model: int,
        origin: Origin | None = None,
        *,
        d_out: int | None = None,
    ) -> None:
        """d_model: width of what is read. d_out: of what is reconstructed; None if it is that."""
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.d_out = d_out or d_model
        self.origin = origin or Origin()
        self.kernels = Kernels()
        self._architecture = architecture_of(config)
        # Feature by feature in memory, as the sums over codes want it: W_enc is a view.
        self.W_enc_rows = _parameter(config.d_sae, d_model)
        self.W_dec = _parameter(config.d_sae, self.d_out)
        self.b_enc = _parameter(config.d_sae)
        self.b_dec = _parameter(self.d_out)
        has_skip = self.wiring is not None and self.wiring.skip
        self.W_skip = _parameter(d_model, self.d_out) if has_skip else None
        shape = self._architecture.threshold_shape(config)
        self.register_buffer("threshold", torch.zeros(shape))
        self.register_buffer("max_act", torch.zeros(config.d_sae))
        self.register_buffer("density", torch.zeros(config.d_sae))

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[d_model, d_sae]: a transposed view."""
        return self.W_enc_rows.T

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.config.d_sae

    @property
    def architecture(self) -> str:
        """Name of the architecture, such as batch_topk."""
        return self._architecture.name

    @property
    def expected_l0(self) -> float | None:
        """The L0 that training aimed at (k); None if the architecture doesn't fix it."""
        return self.config.expected_l0

    @property
    def hookpoint(self) -> str | None:
        """Place in the model that it was trained at; None of a crosscoder, which has several."""
        return self.origin.hookpoint

    @property
    def wiring(self) -> Wiring | None:
        """What it reads and reconstructs; None if that isn't recorded."""
        if self.origin.wiring is not None or self.hookpoint is None:
            return self.origin.wiring
        return wiring_of(self.hookpoint)

    @property
    def is_tied(self) -> bool:
        """Whether it reconstructs what it reads."""
        return self.wiring is None or self.wiring.is_tied

    @property
    def has_one_output(self) -> bool:
        """Whether it reconstructs one place, and not several as a crosscoder does."""
        return self.wiring is None or len(self.wiring.writes) == 1

    @property
    def max_norm(self) -> float:
        """Rows of a larger L2 norm were never trained on."""
        return self.origin.max_norm

    @property
    def weights(self) -> Weights:
        """The four weights, both matrices feature by feature."""
        return Weights(self.W_enc_rows, self.W_dec, self.b_enc, self.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Dense acts: x [..., d_model] of any float dtype -> [..., d_sae] float32.

        Rows are encoded each by itself; see in_domain for those that were never trained on.
        Raises: SourceError if x isn't d_model wide.
        """
        acts = self.encode_sparse(x).to_dense(self.d_sae).view(*x.shape[:-1], self.d_sae)
        if torch.is_grad_enabled() and (x.requires_grad or self.W_enc_rows.requires_grad):
            pre_acts = self._centred(x) @ self.W_enc + self.b_enc
            return pre_acts * (acts > 0)  # [..., d_sae]
        return acts

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> Codes:
        """Active features of x [..., d_model], whose leading axes become one of rows."""
        pre_acts = self.pre_acts(x)
        return self._architecture.select(pre_acts, self.config, self.threshold, self.kernels)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction from dense acts: [..., d_sae] -> [..., d_out], without W_skip's part."""
        return acts @ self.W_dec + self.b_dec

    def decode_sparse(self, codes: Codes) -> Tensor:
        """Reconstruction from codes: [batch, d_out], without W_skip's part.

        Differentiable in codes.acts.
        """
        return sum_by_row(codes, self.W_dec) + self.b_dec

    def skip(self, x: Tensor) -> Tensor | float:
        """What W_skip adds to the reconstruction of x [..., d_model]: [..., d_out]; 0 if there is
        none."""
        return 0.0 if self.W_skip is None else x.to(self.b_dec.dtype) @ self.W_skip

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction x_hat of x: [..., d_model] -> [..., d_out] float32."""
        if torch.is_grad_enabled() and (x.requires_grad or self.W_enc_rows.requires_grad):
            from sae.sparse_autograd import reconstructed

            x_hat = reconstructed(self, x.reshape(-1, self.d_model), self.encode_sparse(x))
            return x_hat.view(*x.shape[:-1], self.d_out) + self.skip(x)
        decoded = self.decode_sparse(self.encode_sparse(x))
        return decoded.view(*x.shape[:-1], self.d_out) + self.skip(x)

    def in_domain(self, x: Tensor) -> Tensor:
        """Whether rows are of a norm that was trained on: [..., d_model] -> [...] bool.

        Rows of massive norm (attention sinks) were left out; what the SAE makes of them is void.
        """
        norms: Tensor = x.float().norm(dim=-1)
        return norms <= self.max_norm

    def pre_acts(self, x: Tensor) -> PreActs:
        """Pre-activations of x [..., d_model], to be computed tile by tile."""
        if x.shape[-1] != self.d_model:
            raise SourceError(
                f"x is {x.shape[-1]} wide; this SAE expects d_model={self.d_model} "
                f"({self.hookpoint or 'no hookpoint recorded'}). Pass the activations it is for"
            )
        return PreActs(self._centred(x.reshape(-1, self.d_model)), self.W_enc_rows, self.b_enc)

    def save(self, path: str | Path) -> Path:
        """Write config.json and sae.safetensors into the folder path, each atomically."""
        from sae.storage import save_sae

        return save_sae(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> SAE:
        """Read the folder path, checking format, shapes, sizes and hash before anything is used.

        Raises: FormatError, MissingFileError, CorruptFileError, NewerFormatError, ConfigError.
        """
        from sae.storage import load_sae

        return load_sae(Path(path)).to(device)

    def _centred(self, x: Tensor) -> Tensor:
        rows = x.to(self.b_dec.dtype)
        return rows - self.b_dec if self.is_tied else rows


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)
