"""A trained SAE -> what its features look like as a whole, for histograms."""

from typing import NamedTuple

import torch
from torch import Tensor

from sae import SAE

N_COMPARED = 4096
"""Features that are compared with all others: a sample, where there are more."""
_ROWS = 512


class FeatureStatistics(NamedTuple):
    """Each feature's figures over a sample of training rows, or of its weights alone.

    log10_density: [n_active], of the fraction of rows in which it is active. n_never_active: those
    that were active in none. max_act: [n_active], the largest activation. max_cosine: [n_compared],
    with the most similar other decoder row. decoder_norms: [d_sae], by place that is reconstructed
    (of one place all are 1). encoder_norms: [d_sae].
    """

    log10_density: Tensor
    n_never_active: int
    max_act: Tensor
    max_cosine: Tensor
    decoder_norms: dict[str, Tensor]
    encoder_norms: Tensor

    def histograms(self) -> dict[str, Tensor]:
        """What there is to draw, by name."""
        norms = {f"decoder_norm {place}".strip(): n for place, n in self.decoder_norms.items()}
        return {
            "log10_density": self.log10_density,
            "max_act": self.max_act,
            "max_decoder_cosine": self.max_cosine,
            **norms,
            "encoder_norm": self.encoder_norms,
        }


def feature_statistics(sae: SAE) -> FeatureStatistics:
    """The figures of a finished SAE."""
    is_active = sae.density > 0
    places = sae.wiring.writes if sae.wiring is not None else ("",)
    parts = sae.W_dec.detach().chunk(len(places), dim=1)
    return FeatureStatistics(
        log10_density=sae.density[is_active].log10(),
        n_never_active=int((~is_active).sum()),
        max_act=sae.max_act[is_active],
        max_cosine=max_cosines(sae.W_dec.detach()),
        decoder_norms={place: part.norm(dim=1) for place, part in zip(places, parts, strict=True)},
        encoder_norms=sae.W_enc_rows.detach().norm(dim=1),
    )


def max_cosines(directions: Tensor, n_compared: int = N_COMPARED) -> Tensor:
    """The cosine of each row of directions [n, d] with the most similar other one.

    Of more than n_compared rows, evenly chosen ones are compared with all. Returns: [n_compared].
    """
    unit: Tensor = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = len(unit)
    if n < 2:
        return torch.zeros(0)
    chosen = torch.arange(n) if n <= n_compared else torch.linspace(0, n - 1, n_compared).long()
    found: list[Tensor] = []
    for ids in chosen.split(_ROWS):
        cosines: Tensor = unit[ids] @ unit.T  # [rows, n]
        cosines[torch.arange(len(ids)), ids] = -1
        found.append(cosines.amax(1))
    together: Tensor = torch.cat(found)
    return together
