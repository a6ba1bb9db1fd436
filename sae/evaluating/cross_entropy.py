"""An SAE and its baselines spliced into the model -> what that does to its predictions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.evaluating.report import CrossEntropy
from sae.evaluating.splicing import Replacement, SplicedLosses, spliced_losses
from sae.sources import EvaluationSource, SplicedModel
from sae.wiring import Wiring

# Nats a token that ablation must cost, or no fraction of that is worth telling.
LEAST_COST = 0.02


def measure_losses(
    lm: SplicedModel,
    source: EvaluationSource,
    wiring: Wiring,
    replacements: Mapping[str, Replacement],
    max_norm: float,
    config: EvalConfig,
) -> SplicedLosses:
    """Cross-entropies with each replacement in turn, on the tokens that the config asks for."""
    return spliced_losses(
        lm,
        source,
        wiring,
        replacements,
        max_norm=max_norm,
        n_tokens=config.n_lm_tokens,
        batch_size=config.lm_batch_size,
        split=config.split,
    )


def sae_and_ablations(sae: SAE, mean: Tensor) -> dict[str, Replacement]:
    """What is put in the place of rows: the SAE's x_hat ("spliced"), zeros, and mean [d_out]."""
    device = sae.b_dec.device
    return {
        "spliced": lambda x: sae(x.to(device)),
        "zero": lambda x: x.new_zeros(len(x), sae.d_out),
        "mean": lambda x: mean.to(x.device).expand(len(x), -1),
    }


def cross_entropy_of(losses: SplicedLosses) -> CrossEntropy:
    """The SAE's figures among the losses."""
    spliced = losses.replaced["spliced"]
    return CrossEntropy(
        n_tokens=losses.n_tokens,
        clean=losses.clean,
        spliced=spliced.cross_entropy,
        zero_ablated=losses.replaced["zero"].cross_entropy,
        mean_ablated=losses.replaced["mean"].cross_entropy,
        recovered=recovered(losses, "spliced"),
        recovered_from_mean=recovered(losses, "spliced", ablated="mean"),
        kl=spliced.kl,
    )


def recovered(losses: SplicedLosses, name: str, ablated: str = "zero") -> float | None:
    """How much of the loss that ablation costs is there again; None if it costs next to nothing."""
    without = losses.replaced[ablated].cross_entropy
    if abs(without - losses.clean) < LEAST_COST:
        return None
    return (without - losses.replaced[name].cross_entropy) / (without - losses.clean)
