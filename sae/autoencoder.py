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
from sae.embedding_bags import sum_by_row
from sae.errors import SourceError
from sae.gradients import Weights
from sae.selection import PreActs


class Origin(Config):
    """Where an SAE comes from, saved with it."""

    hookpoint: str | None = Field(
        default=None, description="Place in the model that it was trained at."
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

    The parameters don't require gradients: training computes its own. With requires_grad_(), or
    on an x that requires them, encode, decode and forward are differentiable.
    """

    threshold: Tensor
    max_act: Tensor
    density: Tensor

    def __init__(self, config: SAEConfig, d_model: int, origin: Origin | None = None) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.origin = origin or Origin()
        self._architecture = architecture_of(config)
        shape = (config.d_sae, d_model)
        # Feature by feature in memory, as the sums over codes want it: W_enc is a view.
        self.W_enc_rows = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.W_dec = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae), requires_grad=False)
        self.b_dec = nn.Parameter(torch.zeros(d_model), requires_grad=False)
        self.register_buffer("threshold", torch.zeros(()))
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
        return self._architecture.expected_l0(self.config)

    @property
    def hookpoint(self) -> str | None:
        """Place in the model that it was trained at."""
        return self.origin.hookpoint

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
            pre_acts = (x.to(self.b_dec.dtype) - self.b_dec) @ self.W_enc + self.b_enc
            return pre_acts * (acts > 0)  # [..., d_sae]
        return acts

    @torch.no_grad()
    def encode_sparse(self, x: Tensor) -> Codes:
        """Active features of x [..., d_model], whose leading axes become one of rows."""
        return self._architecture.select(self.pre_acts(x), self.config, self.threshold)

    def decode(self, acts: Tensor) -> Tensor:
        """Reconstruction from dense acts: [..., d_sae] -> [..., d_model]."""
        return acts @ self.W_dec + self.b_dec

    def decode_sparse(self, codes: Codes) -> Tensor:
        """Reconstruction from codes: [batch, d_model]. Differentiable in codes.acts."""
        return sum_by_row(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction x_hat of x: [..., d_model] -> [..., d_model] float32."""
        if torch.is_grad_enabled() and (x.requires_grad or self.W_enc_rows.requires_grad):
            return self.decode(self.encode(x))
        return self.decode_sparse(self.encode_sparse(x)).view(x.shape)

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
        rows = x.reshape(-1, self.d_model).to(self.b_dec.dtype)
        return PreActs(rows - self.b_dec, self.W_enc_rows, self.b_enc)

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
