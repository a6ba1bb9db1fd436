"""SAE + held-out activations (+ language model) -> Report, beside two baselines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.baselines import PCA, fit_pca, untrained_twin
from sae.config import EvalConfig
from sae.errors import SourceError
from sae.reading import sample_rows
from sae.report import Baseline, CrossEntropy, Reconstruction, Report
from sae.sources import EvaluationSource, SplicedModel
from sae.splicing import Replacement, SplicedLosses, spliced_losses
from sae.wiring import wiring_of

DEFAULTS = EvalConfig()
# Nats a token that ablation must cost, or no fraction of that is worth telling.
LEAST_COST = 0.02
# A feature active in more rows than this is dense.
DENSE = 0.1


class Reconstructed(NamedTuple):
    """x_hat: [batch, d_model]. n_active: [d_sae] int64, rows each feature was active in."""

    x_hat: Tensor
    n_active: Tensor


class Measured(NamedTuple):
    """A reconstruction over all rows, how many there were, and how often features were active."""

    reconstruction: Reconstruction
    n_rows: int
    n_active: Tensor


@torch.no_grad()
def evaluate(
    sae: SAE,
    source: EvaluationSource,
    lm: SplicedModel | None = None,
    config: EvalConfig = DEFAULTS,
    hookpoint: str | None = None,
) -> Report:
    """Evaluate an SAE on held-out rows of a source and, with lm, spliced into its model.

    hookpoint: needed only if the SAE doesn't say. Rows of massive norm are left out by the source
    and counted apart. The report's fields say what each figure is.
    Raises: SourceError if the source doesn't fit the SAE, or has no held-out rows.
    """
    hookpoint = _fitting_hookpoint(sae, source, hookpoint)
    fitted_on = sample_rows(source, wiring_of(hookpoint), config.baseline_rows, seed=config.seed).x
    fitted_on = fitted_on.to(sae.b_dec.device)
    rows = _Rows(sae, source, hookpoint, config)
    own = _measure(_sae_reconstructs(sae), rows)
    untrained = untrained_twin(sae, fitted_on, config.seed)
    pca = fit_pca(fitted_on, rank=max(1, round(own.reconstruction.l0)))
    losses = None
    if lm is not None:
        replacements = _replacements(sae, untrained, pca, fitted_on)
        losses = _losses(lm, source, hookpoint, replacements, sae.max_norm, config)
    max_norm = source.max_norm(hookpoint)
    return Report(
        hookpoint=hookpoint,
        split=config.split,
        n_rows=own.n_rows,
        n_massive=source.n_massive(hookpoint, split=config.split),
        max_norm=max_norm if math.isfinite(max_norm) else None,
        reconstruction=own.reconstruction,
        n_features=sae.d_sae,
        n_dead=int((own.n_active == 0).sum()),
        n_dense=int((own.n_active > DENSE * own.n_rows).sum()),
        cross_entropy=_cross_entropy(losses) if losses else None,
        baselines=_baselines(untrained, pca, rows, losses),
    )


class _Rows:
    """The held-out rows, as often as wanted, float32 on the SAE's device; and their mean."""

    def __init__(
        self, sae: SAE, source: EvaluationSource, hookpoint: str, config: EvalConfig
    ) -> None:
        self._source, self._hookpoint, self._config = source, hookpoint, config
        self._device = sae.b_dec.device
        total = torch.zeros(sae.d_model, dtype=torch.float64, device=self._device)
        n_rows = 0
        for x in self:
            total += x.sum(0, dtype=torch.float64)
            n_rows += len(x)
        if n_rows == 0:
            raise SourceError(
                f"{hookpoint} has no {config.split} rows to evaluate on; harvest with held-out "
                "documents, or name another split"
            )
        self.mean = total / n_rows

    def __iter__(self) -> Iterator[Tensor]:
        config, n_read = self._config, 0
        batches = self._source.batches(
            self._hookpoint, config.batch_size, seed=config.seed, split=config.split
        )
        for x in batches:
            x = x if config.n_rows is None else x[: config.n_rows - n_read]
            n_read += len(x)
            yield x.to(self._device)
            if n_read == config.n_rows:
                return


def _measure(reconstruct: Callable[[Tensor], Reconstructed], rows: _Rows) -> Measured:
    """All sums in float64, over all rows, divided once."""
    errors, deviations, cosines, n_active = [], [], [], []
    for x in rows:
        x_hat, active = reconstruct(x)
        errors.append((x - x_hat).double().square().sum(1))
        deviations.append((x.double() - rows.mean).square().sum(1))
        cosines.append(torch.cosine_similarity(x, x_hat, dim=1).double())
        n_active.append(active)
    error, deviation = torch.cat(errors), torch.cat(deviations)
    if not deviation.sum() > 0:
        raise SourceError(f"the {len(error)} rows evaluated don't vary, so FVU is undefined")
    counts = torch.stack(n_active).sum(0)
    found = Reconstruction(
        l0=float(counts.sum()) / len(error),
        fvu=float(error.sum() / deviation.sum()),
        fvu_token_median=float((error / deviation.clamp(min=1e-30)).median()),
        cosine=float(torch.cat(cosines).mean()),
    )
    return Measured(found, len(error), counts)


def _sae_reconstructs(sae: SAE) -> Callable[[Tensor], Reconstructed]:
    def reconstruct(x: Tensor) -> Reconstructed:
        codes = sae.encode_sparse(x)
        n_active = torch.bincount(codes.feature_ids, minlength=sae.d_sae)
        return Reconstructed(sae.decode_sparse(codes), n_active)

    return reconstruct


def _pca_reconstructs(pca: PCA) -> Callable[[Tensor], Reconstructed]:
    def reconstruct(x: Tensor) -> Reconstructed:
        # Every component is active in every row, so L0 is the rank.
        rank = len(pca.components)
        return Reconstructed(pca(x), torch.full((rank,), len(x), device=x.device))

    return reconstruct


def _replacements(sae: SAE, untrained: SAE, pca: PCA, rows: Tensor) -> dict[str, Replacement]:
    """What is put in the place of rows [n, d_model], by name."""
    device, mean = sae.b_dec.device, rows.mean(0)
    return {
        "spliced": lambda x: sae(x.to(device)),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x.device).expand_as(x),
        "untrained": lambda x: untrained(x.to(device)),
        "pca": lambda x: pca(x.to(device)),
    }


def _cross_entropy(losses: SplicedLosses) -> CrossEntropy:
    spliced = losses.replaced["spliced"]
    return CrossEntropy(
        n_tokens=losses.n_tokens,
        clean=losses.clean,
        spliced=spliced.cross_entropy,
        zero_ablated=losses.replaced["zero"].cross_entropy,
        mean_ablated=losses.replaced["mean"].cross_entropy,
        recovered=_recovered(losses, "spliced"),
        kl=spliced.kl,
    )


def _recovered(losses: SplicedLosses, name: str) -> float | None:
    """How much of the loss that ablation costs is there again; None if it costs next to nothing."""
    ablated = losses.replaced["zero"].cross_entropy
    if abs(ablated - losses.clean) < LEAST_COST:
        return None
    return (ablated - losses.replaced[name].cross_entropy) / (ablated - losses.clean)


def _losses(
    lm: SplicedModel,
    source: EvaluationSource,
    hookpoint: str,
    replacements: dict[str, Replacement],
    max_norm: float,
    config: EvalConfig,
) -> SplicedLosses:
    return spliced_losses(
        lm,
        source,
        hookpoint,
        replacements,
        max_norm=max_norm,
        n_tokens=config.n_lm_tokens,
        batch_size=config.lm_batch_size,
        split=config.split,
    )


def _baselines(
    untrained: SAE, pca: PCA, rows: _Rows, losses: SplicedLosses | None
) -> tuple[Baseline, ...]:
    """Both baselines, on the same rows and tokens as the SAE."""
    fitted = {
        "untrained": (
            "the same SAE before training: random directions, b_dec at the mean",
            _sae_reconstructs(untrained),
        ),
        "pca": (
            f"the mean and the first {len(pca.components)} principal components of train rows",
            _pca_reconstructs(pca),
        ),
    }
    return tuple(
        Baseline(
            name=name,
            what=what,
            reconstruction=_measure(reconstruct, rows).reconstruction,
            spliced=losses.replaced[name].cross_entropy if losses else None,
            recovered=_recovered(losses, name) if losses else None,
        )
        for name, (what, reconstruct) in fitted.items()
    )


def _fitting_hookpoint(sae: SAE, source: EvaluationSource, hookpoint: str | None) -> str:
    """The hookpoint to evaluate at, if the source's activations there are of the SAE's kind."""
    if hookpoint and sae.hookpoint and hookpoint != sae.hookpoint:
        raise SourceError(
            f"this SAE was trained at {sae.hookpoint}, not {hookpoint}; leave hookpoint out, or "
            "load the SAE of that hookpoint"
        )
    hookpoint = hookpoint or sae.hookpoint
    if hookpoint is None:
        raise SourceError("this SAE doesn't say where it was trained; give hookpoint")
    provenance, d_model = source.provenance(hookpoint), source.d_model(hookpoint)
    _require_same_split(provenance, sae.origin.provenance)
    found, expected = provenance.get("model"), sae.origin.provenance.get("model")
    if d_model != sae.d_model:
        raise SourceError(
            f"the source holds d_model={d_model} ({found or 'unknown model'}, {hookpoint}); this "
            f"SAE expects {sae.d_model}. Give the matching cache, or harvest again"
        )
    if found and expected and found != expected:
        raise SourceError(
            f"the source was harvested from {found}; this SAE was trained on {expected}. Give the "
            "matching cache, or harvest again"
        )
    return hookpoint


def _require_same_split(found: dict[str, Any], trained: dict[str, Any]) -> None:
    """Raises: SourceError if rows that count as held out here may have been trained on."""
    if any(found.get(name) != trained.get(name) for name in ("data", "data_revision")):
        return  # another text: none of it was trained on
    here, then = found.get("heldout_fraction"), trained.get("heldout_fraction")
    if here != then:
        raise SourceError(
            f"the source has heldout_fraction={here}, this SAE was trained with {then}: rows that "
            "count as held out here may have been trained on. Open the cache with the same value"
        )
