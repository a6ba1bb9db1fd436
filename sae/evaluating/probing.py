"""k-sparse probing: how much of a label do k features tell, beside x and k coordinates of x.

Source: Gurnee et al. 2023, arXiv 2305.01610; on SAEs, Karvonen et al. 2025 (SAEBench), arXiv
2503.09532. Ours differs in the labels, which callers give (SAEBench has eight data sets of text),
in rows being single tokens (theirs are means over a text), and in dividing the mean difference by
the spread, so that neither loud features nor loud coordinates win by loudness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae.autoencoder import SAE
from sae.codes import Codes
from sae.config import EvalConfig
from sae.evaluating.labelled import (
    Examples,
    Label,
    LabelledRows,
    balanced_examples,
    columns,
    encoded,
)
from sae.evaluating.logistic import fit_logistic, score_of
from sae.evaluating.report import ProbedLabel, ProbeScore, Probing


def probe(sae: SAE, rows: LabelledRows, config: EvalConfig) -> Probing | None:
    """Probes for every label with enough examples; None if there is no such label."""
    codes = encoded(sae, rows.x)
    found = []
    for label in rows.labels:
        examples = balanced_examples(label, config.n_probe_examples, config.seed)
        if examples is not None:
            found.append(_probe_label(label, examples, codes, rows.x, sae.d_sae, config.probe_k))
    if not found:
        return None
    return Probing(
        n_labels=len(found),
        x=_mean([each.x for each in found]),
        features={str(k): _mean([each.features[str(k)] for each in found]) for k in config.probe_k},
        coordinates={
            str(k): _mean([each.coordinates[str(k)] for each in found]) for k in config.probe_k
        },
        labels=tuple(found),
    )


def separation_of_features(codes: Codes, rows: Tensor, is_positive: Tensor, d_sae: int) -> Tensor:
    """Each feature's difference of mean acts, positives less negatives, over its spread: [d_sae].

    rows: int64, those that count. is_positive: [n] bool. The spread is the root of the mean of the
    two classes' variances (Cohen's d); 0 where a feature never differs.
    """
    role = torch.zeros(codes.n_rows, dtype=torch.int64)
    role[rows] = 1 + is_positive[rows].long()
    roles = role[codes.rows()]
    means, variances = [], []
    for which in (1, 2):
        here, n = roles == which, int((role == which).sum())
        ids, acts = codes.feature_ids[here], codes.acts[here].double()
        mean = torch.bincount(ids, weights=acts, minlength=d_sae) / n
        means.append(mean)
        square = torch.bincount(ids, weights=acts.square(), minlength=d_sae) / n
        variances.append(square - mean.square())
    return _separation(means, variances)


def separation_of_coordinates(x: Tensor, rows: Tensor, is_positive: Tensor) -> Tensor:
    """The same of x's own coordinates: [d_model]."""
    classes = [x[rows[is_positive[rows] == has]].double() for has in (False, True)]
    return _separation([c.mean(0) for c in classes], [c.var(0, correction=0) for c in classes])


def _separation(means: Sequence[Tensor], variances: Sequence[Tensor]) -> Tensor:
    difference = means[1] - means[0]
    spread = ((variances[0] + variances[1]) / 2).clamp(min=0).sqrt()
    return torch.where(difference == 0, 0.0, difference / spread.clamp(min=1e-30))


def _probe_label(
    label: Label, examples: Examples, codes: Codes, x: Tensor, d_sae: int, ks: Sequence[int]
) -> ProbedLabel:
    is_positive = label.is_positive.cpu()
    apart = separation_of_features(codes, examples.train, is_positive, d_sae)
    chosen = apart.abs().topk(min(max(ks), d_sae)).indices
    acts = columns(codes, chosen, d_sae)
    apart_in_x = separation_of_coordinates(x, examples.train, is_positive)
    places = apart_in_x.abs().topk(min(max(ks), x.shape[1])).indices
    return ProbedLabel(
        name=label.name,
        n_train=len(examples.train),
        n_test=len(examples.test),
        feature_ids=tuple(chosen.tolist()),
        x=_score(x, is_positive, examples),
        features={str(k): _score(acts[:, :k], is_positive, examples) for k in ks},
        coordinates={str(k): _score(x[:, places[:k]], is_positive, examples) for k in ks},
    )


def _score(inputs: Tensor, is_positive: Tensor, examples: Examples) -> ProbeScore:
    """Of a probe that is fitted on the train rows and scored on the test rows."""
    fit = fit_logistic(inputs[examples.train], is_positive[examples.train])
    return score_of(fit.score(inputs[examples.test]), is_positive[examples.test])


def _mean(scores: Sequence[ProbeScore]) -> ProbeScore:
    names = ProbeScore.model_fields
    return ProbeScore(**{n: sum(getattr(s, n) for s in scores) / len(scores) for n in names})
