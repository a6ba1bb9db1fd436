"""An SAE's reconstruction for autograd, at a cost that grows with L0: for losses of a whole model.

Training has gradients of its own (`sae.gradients`). Here what follows the reconstruction is
unknown: its gradient comes back, and goes on through the codes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae.codes import Codes
from sae.kernels import Kernels

if TYPE_CHECKING:
    from sae.autoencoder import SAE


def reconstructed(sae: SAE, x: Tensor, codes: Codes) -> Tensor:
    """Decode codes of x [batch, d_model]: [batch, d_out], without W_skip's part.

    Differentiable in x and in the four weights. Which features are active counts as constant.
    """
    x_hat: Tensor = _Reconstruct.apply(
        (codes, sae.kernels, sae.is_tied), x.to(sae.b_dec.dtype), *sae.weights
    )
    return x_hat


class _Reconstruct(torch.autograd.Function):
    """pre_acts = (x - b_dec) @ W_enc.T + b_enc at the codes' entries, x_hat = acts @ W_dec + b_dec.

    Without b_dec on the first side where the SAE isn't tied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Codes, Kernels, bool],
        x: Tensor,
        W_enc: Tensor,
        W_dec: Tensor,
        b_enc: Tensor,
        b_dec: Tensor,
    ) -> Tensor:
        codes, kernels, _ = how
        ctx.how = how
        ctx.save_for_backward(x, W_enc, W_dec, b_enc, b_dec)
        return kernels.sum_by_row(codes, W_dec) + b_dec

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x_hat: Tensor) -> tuple[Tensor | None, ...]:
        (codes, kernels, is_tied), (x, W_enc, W_dec, b_enc, b_dec) = ctx.how, ctx.saved_tensors
        pull = grad_x_hat.contiguous()
        of_entries = kernels.dot_by_entry(codes, pull, W_dec)
        rows = x - b_dec if is_tied else x
        sums = kernels.feature_sums(codes, of_entries, rows, codes.acts, pull, len(b_enc))
        of_b_dec = pull.sum(0)
        if is_tied:  # it is taken away before the encoder too
            of_b_dec = of_b_dec - sums.of_weights @ W_enc
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = kernels.sum_by_row(Codes(of_entries, codes.feature_ids, codes.offsets), W_enc)
        return None, of_x, sums.of_inputs, sums.of_errors, sums.of_weights, of_b_dec
