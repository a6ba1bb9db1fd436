"""Rows of a report for what an SAE must beat, measured by the same definitions.

Two are made here, from train rows alone: the untrained twin and PCA. Others are SAEs that a caller
trained, and `baseline_of` measures them: with a frozen random decoder (arXiv 2602.14111), or on a
randomly initialised copy of the model (arXiv 2501.17727).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae.autoencoder import SAE
from sae.config import EvalConfig
from sae.evaluating.cross_entropy import measure_losses, recovered, sae_and_ablations
from sae.evaluating.fitted import PCA, LinearMap, fit_linear_map, fit_pca, untrained_twin
from sae.evaluating.held_out import HeldOutRows, fitting_wiring
from sae.evaluating.labelled import LabelledRows
from sae.evaluating.probing import probe
from sae.evaluating.reconstruction import dense_reconstructs, measure, sae_reconstructs
from sae.evaluating.report import Baseline, Reconstruction
from sae.evaluating.splicing import Replacement, SplicedLosses
from sae.reading import Batch, sample_rows
from sae.sources import EvaluationSource, SplicedModel

DEFAULTS = EvalConfig()


class Fitted(NamedTuple):
    """The baselines that are made of train rows. untrained: the twin. dense: the mean and the first
    principal components, as many as the SAE's L0; of a transcoder the best linear map instead."""

    untrained: SAE
    dense: PCA | LinearMap

    @classmethod
    def on(cls, rows: Batch, sae: SAE, l0: float, seed: int) -> Fitted:
        """rows: train rows on the SAE's device."""
        twin = untrained_twin(sae, rows, sae.expected_l0 or l0, seed)
        if sae.is_tied:
            return cls(twin, fit_pca(rows.x, rank=max(1, round(l0))))
        return cls(twin, fit_linear_map(rows))

    def replacements(self) -> dict[str, Replacement]:
        """What each puts in the place of rows, by name."""
        device = self.untrained.b_dec.device
        return {
            "untrained": lambda x: self.untrained(x.to(device)),
            self.dense.name: lambda x: self.dense(x.to(device)),
        }

    def measured(
        self,
        rows: HeldOutRows,
        losses: SplicedLosses | None,
        labelled: LabelledRows | None,
        config: EvalConfig,
    ) -> tuple[Baseline, ...]:
        """Both, on the same rows, tokens and labels as the SAE."""
        untrained = _row(
            "untrained",
            "the same SAE before training: random directions, b_dec at the mean",
            measure(sae_reconstructs(self.untrained), rows).reconstruction,
            losses,
            "untrained",
        )
        dense = _row(
            self.dense.name,
            self.dense.what,
            measure(dense_reconstructs(self.dense), rows).reconstruction,
            losses,
            self.dense.name,
        )
        return with_probing(untrained, self.untrained, labelled, config), dense


def with_probing(
    row: Baseline, sae: SAE, labelled: LabelledRows | None, config: EvalConfig
) -> Baseline:
    """The row with what the SAE's features tell of labels, in the mean; as it is without labels."""
    found = probe(sae, labelled, config) if labelled else None
    if found is None:
        return row
    return row.model_copy(update={"probing": found.model_copy(update={"labels": ()})})


@torch.no_grad()
def baseline_of(
    sae: SAE,
    source: EvaluationSource,
    name: str,
    what: str,
    *,
    lm: SplicedModel | None = None,
    config: EvalConfig = DEFAULTS,
    hookpoint: str | None = None,
    labelled: LabelledRows | None = None,
) -> Baseline:
    """The row of a trained SAE that serves as another one's baseline: pass it to evaluate.

    name: such as frozen_decoder or random_model. what: what it is, in a few words.
    source, lm: its own. With a frozen decoder that is the other SAE's source and model; an SAE of a
        randomly initialised copy is measured on that copy's activations.
    labelled: rows of that source with labels, for probing.
    Raises: SourceError as evaluate does.
    """
    wiring = fitting_wiring(sae, source, hookpoint)
    found = measure(sae_reconstructs(sae), HeldOutRows(sae, source, wiring, config))
    losses = None
    if lm is not None:
        rows = sample_rows(source, wiring, config.baseline_rows, seed=config.seed)
        replacements = sae_and_ablations(sae, rows.y.mean(0))
        losses = measure_losses(lm, source, wiring, replacements, sae.max_norm, config)
    row = _row(name, what, found.reconstruction, losses, "spliced")
    return with_probing(row, sae, labelled, config)


def _row(
    name: str, what: str, found: Reconstruction, losses: SplicedLosses | None, loss: str
) -> Baseline:
    """loss: what it is called among the losses."""
    return Baseline(
        name=name,
        what=what,
        reconstruction=found,
        spliced=losses.replaced[loss].cross_entropy if losses else None,
        recovered=recovered(losses, loss) if losses else None,
        kl=losses.replaced[loss].kl if losses else None,
    )
