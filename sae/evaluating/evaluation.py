"""SAE + held-out activations (+ language model) -> Report, beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.evaluating.absorption import measure_absorption
from sae.evaluating.baselines import Fitted
from sae.evaluating.cross_entropy import cross_entropy_of, measure_losses, sae_and_ablations
from sae.evaluating.dictionary import describe_dictionary
from sae.evaluating.held_out import HeldOutRows, fitting_wiring
from sae.evaluating.labelled import LabelledRows
from sae.evaluating.probing import probe
from sae.evaluating.reconstruction import measure, sae_reconstructs
from sae.evaluating.report import Baseline, Report
from sae.evaluating.stability import stability
from sae.reading import sample_rows
from sae.sources import EvaluationSource, SplicedModel

DEFAULTS = EvalConfig()
# A feature active in more rows than this is dense.
DENSE = 0.1


@torch.no_grad()
def evaluate(
    sae: SAE,
    source: EvaluationSource,
    lm: SplicedModel | None = None,
    config: EvalConfig = DEFAULTS,
    hookpoint: str | None = None,
    *,
    baselines: Sequence[Baseline] = (),
    other_seeds: Sequence[SAE] = (),
    labelled: LabelledRows | None = None,
) -> Report:
    """Evaluate an SAE on held-out rows of a source and, with lm, spliced into its model.

    hookpoint: needed only if the SAE doesn't say. baselines: further rows for the report, each
    from baseline_of. other_seeds: SAEs that differ in their seed alone. labelled: held-out rows
    with labels, for probing and absorption. Rows of massive norm are left out by the source and
    counted apart. The report's fields say what each figure is.
    Raises: SourceError if the source or another SAE doesn't fit, or no row is held out.
    """
    wiring = fitting_wiring(sae, source, hookpoint)
    train_rows = sample_rows(source, wiring, config.baseline_rows, seed=config.seed)
    train_rows = train_rows.to(sae.b_dec.device)
    rows = HeldOutRows(sae, source, wiring, config)
    own = measure(sae_reconstructs(sae), rows)
    fitted = Fitted.on(train_rows, sae, own.reconstruction.l0, config.seed)
    losses = None
    if lm is not None:
        replacements = sae_and_ablations(sae, train_rows.y.mean(0)) | fitted.replacements()
        losses = measure_losses(lm, source, wiring, replacements, sae.max_norm, config)
    is_active = own.n_active > 0
    max_norm = source.max_norm(wiring.reads[0]) if len(wiring.reads) == 1 else math.inf
    return Report(
        hookpoint=wiring.name,
        split=config.split,
        n_rows=own.n_rows,
        n_massive=source.n_massive(wiring.reads[0], split=config.split),
        max_norm=max_norm if math.isfinite(max_norm) else None,
        reconstruction=own.reconstruction,
        n_features=sae.d_sae,
        n_dead=int((~is_active).sum()),
        n_dense=int((own.n_active > DENSE * own.n_rows).sum()),
        dictionary=describe_dictionary(sae, own, config),
        cross_entropy=cross_entropy_of(losses) if losses else None,
        stability=stability(sae, other_seeds, is_active.nonzero().squeeze(1))
        if other_seeds
        else None,
        probing=probe(sae, labelled, config) if labelled else None,
        absorption=measure_absorption(sae, labelled, config) if labelled and sae.is_tied else None,
        baselines=(*fitted.measured(rows, losses, labelled, config), *baselines),
    )
