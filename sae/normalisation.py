"""Training's units: rows centred and scaled on the way in, and folded into the weights at the end.

    x_scaled = (x - in_center) * in_scale          y_scaled = (y - out_center) * out_scale

Scales make the mean squared norm of what a hookpoint gives its width, so that settings mean the
same for every model. A saved SAE works on raw activations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae.autoencoder import SAE


class Normalisation(NamedTuple):
    """in_center, in_scale: [d_in]. out_center, out_scale: [d_out]. The scales of one hookpoint's
    channels are equal."""

    in_center: Tensor
    in_scale: Tensor
    out_center: Tensor
    out_scale: Tensor

    def inputs(self, x: Tensor) -> Tensor:
        """Raw x [batch, d_in] in training's units."""
        return (x - self.in_center).mul_(self.in_scale)

    def outputs(self, y: Tensor) -> Tensor:
        """Raw y [batch, d_out] in training's units."""
        return (y - self.out_center).mul_(self.out_scale)

    def to(self, device: torch.device | str) -> Normalisation:
        """The same on another device."""
        return Normalisation(*(each.to(device) for each in self))

    @torch.no_grad()
    def fold_(self, sae: SAE) -> SAE:
        """Make an SAE of training's units into one of raw activations, in place.

        Where one place is reconstructed, decoder rows keep norm 1, and acts are in raw units. A
        crosscoder's decoder is in each place's own units, and its acts stay those of training.
        Either way act * W_dec row is what a feature contributes.
        """
        factor = self.out_scale[0] if sae.has_one_output else torch.ones(())
        shift = self.in_center * self.in_scale  # x_scaled = x * in_scale - shift
        if not sae.is_tied:
            sae.b_enc.sub_(sae.W_enc_rows @ shift)
        if sae.W_skip is not None:
            sae.b_dec.sub_(shift @ sae.W_skip)
            sae.W_skip.mul_(self.in_scale.unsqueeze(1)).div_(self.out_scale)
        sae.b_dec.div_(self.out_scale).add_(self.out_center)
        sae.W_enc_rows.mul_(self.in_scale / factor)
        sae.W_dec.div_(self.out_scale / factor)
        sae.b_enc.div_(factor)
        sae.threshold.div_(factor)
        return sae


def scale_of(rows: Tensor, center: Tensor) -> float:
    """What makes the mean squared norm of rows [n_rows, width] less center their width."""
    mean_square = float((rows.double() - center.double()).square().sum(1).mean())
    return float((rows.shape[1] / mean_square) ** 0.5)
