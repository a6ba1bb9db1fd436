"""SAEs that differ in their seed -> how far they found the same features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.errors import SourceError
from sae.evaluating.matching import match_directions, nearest_directions
from sae.evaluating.report import Stability

# Source: Paulo and Belrose 2025, arXiv 2501.16615: above it a feature counts as found again.
SAME_FEATURE = 0.7


@torch.no_grad()
def stability(sae: SAE, others: Sequence[SAE], which: Tensor | None = None) -> Stability:
    """Cosines of decoder rows with those of others, matched one to one: see `Stability`.

    which: [n] int64, the features of sae that count; all if left out.
    Raises: SourceError if there is no other SAE, or its decoder has another width.
    """
    if not others:
        raise SourceError("no other SAE was given; train one with another seed and pass it")
    which = torch.arange(sae.d_sae, device=sae.W_dec.device) if which is None else which
    matched, nearest = [], []
    for other in others:
        if other.W_dec.shape[1] != sae.W_dec.shape[1]:
            raise SourceError(
                f"the other SAE's decoder is {other.W_dec.shape[1]} wide, this one's "
                f"{sae.W_dec.shape[1]}; give SAEs of the same place in the same model"
            )
        own, theirs = sae.W_dec[which], other.W_dec.to(sae.W_dec.device)
        matched.append(match_directions(own, theirs).cosine.double())
        nearest.append(nearest_directions(own, theirs).cosine.double())
    return Stability(
        n_others=len(others),
        n_features=len(which),
        matched_cosine=float(torch.cat(matched).mean()) if len(which) else 0.0,
        matched_fraction=_fraction(matched),
        max_cosine=float(torch.cat(nearest).mean()) if len(which) else 0.0,
    )


def _fraction(cosines: Sequence[Tensor]) -> float:
    joined = torch.cat(list(cosines))
    return float((joined > SAME_FEATURE).double().mean()) if len(joined) else 0.0
