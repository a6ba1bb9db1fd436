"""Feature absorption: a feature for a broad property stays silent where a specific one is active.

"Starts with S" fires on most words with S, but not on " short", whose own feature has taken the
direction into its decoder. So the broad feature isn't what it seems, and recall is lost.

For each broad label, with w the unit direction of a logistic probe on x:
1. The main features are those that together stand for the label: the k-sparse probe's, those
   that are more active in positives alone, k raised while it gains more than 0.03 in F1 (on train
   rows), up to 10.
2. Test rows that are positive and that the probe on x finds count. In each, a feature contributes
   act * (W_dec row . w) to w, of the whole (x - b_dec) . w.
3. full: every main feature is silent, and the one feature that contributes most has a decoder
   cosine of at least 0.025 with w and contributes at least 0.4 of the whole.
4. fraction: the up to 3 features, not main, of a decoder cosine of at least 0.1 with w, that
   contribute most; if they give less than 0.4 of the whole, or the main features give all of it: 0.
   If the main features give nothing: 1. Else absorbed / (absorbed + main), where absorbed is what
   those 3 contribute, at most what the main features leave.

Source: Chanin et al. 2024, arXiv 2409.14507 (full); Karvonen et al. 2025 (SAEBench), arXiv
2503.09532 (fraction), thresholds included. Ours differs in that rows are the tokens of running
text at their own position, where theirs are words in a spelling prompt, so that figures compare
between SAEs evaluated here and not with published ones; that contributions are of x - b_dec, which
is what features add up to, where theirs is x; and that the features of step 1 are ranked by mean
difference, where theirs are by an L1 probe.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae.autoencoder import SAE
from sae.codes import Codes
from sae.config import EvalConfig
from sae.evaluating.labelled import (
    FEWEST_EXAMPLES,
    Examples,
    Label,
    LabelledRows,
    balanced_examples,
    columns,
    encoded,
)
from sae.evaluating.logistic import fit_logistic, score_of
from sae.evaluating.probing import separation_of_features
from sae.evaluating.report import AbsorbedLabel, Absorption

MOST_MAIN_FEATURES = 10
F1_GAIN = 0.03
# A label whose probe on x has a lower F1 isn't in x plainly enough to be absorbed.
LEAST_F1 = 0.6
FULL_COSINE = 0.025
FRACTION_COSINE = 0.1
LEAST_SHARE = 0.4
MOST_ABSORBERS = 3


class RowAbsorption(NamedTuple):
    """is_full: [n] bool. fraction: [n] float64, from 0 to 1."""

    is_full: Tensor
    fraction: Tensor


def measure_absorption(sae: SAE, rows: LabelledRows, config: EvalConfig) -> Absorption | None:
    """Absorption of the broad labels, by the definition above; None if none can be measured."""
    codes = encoded(sae, rows.x)
    found = []
    for label in rows.labels:
        examples = balanced_examples(label, config.n_probe_examples, config.seed)
        if label.is_broad and examples is not None:
            measured = _of_label(sae, label, examples, codes, rows.x)
            found += [] if measured is None else [measured]
    if not found:
        return None
    return Absorption(
        n_labels=len(found),
        full=sum(each.full for each in found) / len(found),
        fraction=sum(each.fraction for each in found) / len(found),
        n_main_features=sum(len(each.main_feature_ids) for each in found) / len(found),
        labels=tuple(found),
    )


def main_features(codes: Codes, examples: Examples, is_positive: Tensor, d_sae: int) -> Tensor:
    """The features that stand for a label, by step 1: int64, best first, at least one."""
    apart = separation_of_features(codes, examples.train, is_positive, d_sae)
    ranked = apart.topk(min(MOST_MAIN_FEATURES, d_sae))
    chosen = ranked.indices[: max(1, int((ranked.values > 0).sum()))]
    acts, truth = columns(codes, chosen, d_sae)[examples.train], is_positive[examples.train]
    best, n_kept = -1.0, 0
    for k in range(1, len(chosen) + 1):
        f1 = score_of(fit_logistic(acts[:, :k], truth).score(acts[:, :k]), truth).f1
        if f1 <= best + F1_GAIN:
            break
        best, n_kept = f1, k
    return chosen[:n_kept]


def absorption_of_rows(
    codes: Codes, cosines: Tensor, projections: Tensor, whole: Tensor, main: Tensor
) -> RowAbsorption:
    """Steps 2 to 4 for every row of codes.

    cosines, projections: [d_sae], of decoder rows with w, and on it. whole: [n], (x - b_dec) . w.
    main: int64, the main features.
    """
    whole = whole.double()
    is_main = torch.zeros(len(cosines), dtype=torch.bool)
    is_main[main] = True
    entry_main, entry_rows = is_main[codes.feature_ids], codes.rows()
    given = codes.acts.double() * projections.double()[codes.feature_ids]
    from_main = _sum(given, entry_rows, entry_main, len(whole))
    aligned = ~entry_main & (cosines[codes.feature_ids] >= FRACTION_COSINE) & (given > 0)
    absorbing = _largest(given, entry_rows, aligned, len(whole), MOST_ABSORBERS).sum(1)
    unaccounted = (whole - from_main).clamp(min=0)
    absorbed = torch.minimum(absorbing, unaccounted)
    fraction = torch.where(from_main <= 0, 1.0, absorbed / (absorbed + from_main.clamp(min=1e-30)))
    is_none = (from_main >= whole) | (absorbing < LEAST_SHARE * whole) | (whole <= 0)
    top = _largest(given, entry_rows, cosines[codes.feature_ids] >= FULL_COSINE, len(whole), 1)
    is_silent = _sum(torch.ones_like(given), entry_rows, entry_main, len(whole)) == 0
    top_of_all = _largest(given, entry_rows, given > 0, len(whole), 1)
    is_full = is_silent & (top >= top_of_all)[:, 0] & (top[:, 0] >= LEAST_SHARE * whole)
    return RowAbsorption(is_full & (whole > 0), fraction.masked_fill(is_none, 0.0))


def _of_label(
    sae: SAE, label: Label, examples: Examples, codes: Codes, x: Tensor
) -> AbsorbedLabel | None:
    is_positive = label.is_positive.cpu()
    probe = fit_logistic(x[examples.train], is_positive[examples.train])
    if score_of(probe.score(x[examples.test]), is_positive[examples.test]).f1 < LEAST_F1:
        return None
    counted = (label.is_test.cpu() & is_positive).nonzero().squeeze(1)
    counted = counted[probe.score(x[counted]) > 0]
    if len(counted) < FEWEST_EXAMPLES:
        return None
    main = main_features(codes, examples, is_positive, sae.d_sae)
    direction = functional.normalize(probe.weight.float(), dim=0)
    W_dec, b_dec = sae.W_dec.cpu(), sae.b_dec.cpu()
    found = absorption_of_rows(
        rows_of(codes, counted),
        functional.normalize(W_dec, dim=1) @ direction,
        W_dec @ direction,
        (x[counted] - b_dec) @ direction,
        main,
    )
    return AbsorbedLabel(
        name=label.name,
        n_rows=len(counted),
        main_feature_ids=tuple(main.tolist()),
        full=float(found.is_full.double().mean()),
        fraction=float(found.fraction.mean()),
    )


def rows_of(codes: Codes, rows: Tensor) -> Codes:
    """The codes of some rows, in the order asked for."""
    starts, counts = codes.offsets[rows], codes.n_active()[rows]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    places = torch.arange(int(offsets[-1])) + (starts - offsets[:-1]).repeat_interleave(counts)
    return Codes(codes.acts[places], codes.feature_ids[places], offsets)


def _sum(values: Tensor, rows: Tensor, is_counted: Tensor, n_rows: int) -> Tensor:
    """Sum of the counted entries of each row: [n_rows]."""
    return values.new_zeros(n_rows).index_add(0, rows[is_counted], values[is_counted])


def _largest(values: Tensor, rows: Tensor, is_counted: Tensor, n_rows: int, n: int) -> Tensor:
    """The n largest counted entries of each row, 0 where there are fewer: [n_rows, n], >= 0."""
    found = values.new_zeros(n_rows, n)
    left, at = values[is_counted], rows[is_counted]
    for i in range(n):
        best = values.new_zeros(n_rows).scatter_reduce(0, at, left, "amax")
        found[:, i] = best
        # One entry a row is struck out, the first of equal ones.
        order = torch.where(left == best[at], torch.arange(len(left)), len(left))
        first = torch.full((n_rows,), len(left)).scatter_reduce(0, at, order, "amin")
        left = torch.where(torch.arange(len(left)) == first[at], 0.0, left)
    return found
